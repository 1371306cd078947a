"""The diffusion prior and CLIPure-Diff: its loss by the formula, training that learns a distribution, files, and climbs that go uphill."""

from __future__ import annotations

import json
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from aft.attacks import sample_keys
from aft.attacks.noise import normal, uniform
from aft.clip import load_model
from aft.clip.files import file_hash
from aft.clip.stages import encode_in_stages
from aft.defenses import LatentDiffusionPrior, defend, fit_prior, load_prior
from aft.defenses.clipure_diff import SHIPPED
from aft.defenses.dalle2 import Dalle2Prior
from aft.defenses.fit_prior import FitPrior, mean_loss
from aft.errors import ConfigError, WeightsError
from tests.conftest import MemoryData
from tests.defenses.made import draw_of, make


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random unit vectors."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


CENTRES = unit(4, 8, seed=7)


def clusters(count: int, seed: int = 0) -> torch.Tensor:
    """Unit vectors of width 8 near one of four."""
    return F.normalize(CENTRES[torch.arange(count) % 4] + 0.3 * unit(count, 8, seed=seed), dim=-1)


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> LatentDiffusionPrior:
    """A prior that was trained on the clusters."""
    made = FitPrior(data=_WithImages(), hidden=32, blocks=1, epochs=40, batch_size=100, lr=1e-2)
    return made.fit(clusters(1000))[0]


class _WithImages(MemoryData):
    """The images in memory as an evaluation set."""

    name = "memory"

    def evaluation_set(self, split):
        """All of them, whatever the split."""
        from aft.batch import EvaluationSet

        rows = torch.arange(len(self.labels))
        return EvaluationSet(self.name, split, self.images, self.labels, rows, self.class_lists["train"], self.templates)


def test_the_loss_is_the_formula():
    """Squared error of v at the noisy point, per sample, after standardising."""
    prior = LatentDiffusionPrior(8, hidden=16, blocks=2)
    prior.standardise_by(clusters(500))
    z, time, noise = clusters(5, seed=3), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]), torch.randn(5, 8)
    x = (z - clusters(500).mean(0)) / clusters(500).std(0)
    for row in range(5):
        keep, add = math.cos(math.pi / 2 * time[row]), math.sin(math.pi / 2 * time[row])
        guess = prior((keep * x + add * noise)[row : row + 1], time[row : row + 1])[0]
        expected = (guess - (keep * noise[row] - add * x[row])).square().mean()
        torch.testing.assert_close(prior.loss(z, time, noise)[row], expected, rtol=1e-4, atol=1e-5)


def test_it_learns_which_embeddings_are_likely(learned):
    """Those of the clusters cost less than others of the same length, on vectors that it has not seen; who knows nothing pays 1."""
    seen = mean_loss(learned, clusters(500, seed=9))
    assert seen < 0.8 and seen < 0.7 * mean_loss(learned, unit(500, 8, seed=9))


def test_a_file_gives_the_same_prior(learned, tmp_path):
    """In half precision, with its shape and origin; the hash is the file's; torch's generator does not move."""
    learned.origin = {"model": "toy"}
    digest = learned.save(tmp_path / "a" / "prior.safetensors")
    stream = torch.get_rng_state()
    back = load_prior(tmp_path / "a" / "prior.safetensors")
    assert torch.equal(torch.get_rng_state(), stream) and not back.training and not any(p.requires_grad for p in back.parameters())
    assert back.sha256 == digest and back.origin == {"model": "toy"} and back.width == 8
    assert mean_loss(back, clusters(200)) == pytest.approx(mean_loss(learned, clusters(200)), rel=1e-2)


def test_damaged_and_foreign_files_are_named(learned, tmp_path):
    """No file, no safetensors, another project's."""
    with pytest.raises(WeightsError, match="no prior at"):
        load_prior(tmp_path / "none.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_prior(tmp_path / "torn.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="no latent diffusion prior"):
        load_prior(tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="hidden = 0"):
        LatentDiffusionPrior(8, hidden=0)


def test_the_command_embeds_trains_and_writes(tmp_path, monkeypatch, tiny):
    """From YAML, on any datamodule; embeddings are made once; the file says where it came from."""
    settings = {"data": {"class_path": f"{__name__}._WithImages"}, "clip": {"name": "tiny"}, "out": str(tmp_path / "p.safetensors"),
                "cache": str(tmp_path / "cache"), "hidden": 16, "blocks": 1, "epochs": 2, "batch_size": 8, "n": 16}  # fmt: skip
    (tmp_path / "prior.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setitem(sys.modules, __name__, sys.modules[_WithImages.__module__])
    prior = fit_prior.main(["-c", str(tmp_path / "prior.yaml")])
    origin = load_prior(tmp_path / "p.safetensors").origin
    assert prior.width == 16 and origin["embeddings"] == "16" and origin["steps"] == "4" and origin["data"] == "memory"
    assert origin["model_sha256"] == load_model("tiny").record.sha256 and float(origin["holdout_loss"]) > 0
    kept = sorted((tmp_path / "cache").iterdir())
    monkeypatch.setattr(fit_prior, "embed_all", lambda *_: pytest.fail("embedded twice"))
    fit_prior.main(["-c", str(tmp_path / "prior.yaml"), "--epochs", "1"])
    assert len(kept) == 2 and sorted((tmp_path / "cache").iterdir()) == kept


def test_settings_of_the_training_are_checked():
    """Counts and the datamodule."""
    with pytest.raises(ConfigError, match="epochs = 0"):
        FitPrior(data=_WithImages(), epochs=0)
    with pytest.raises(ConfigError, match=r"no evaluation_set\(split\)"):
        FitPrior(data=MemoryData())


def test_purification_goes_uphill(learned, tmp_path):
    """A vector beside its cluster becomes likelier with each step, and comes nearer to the cluster's centre."""
    path = tmp_path / "clusters.safetensors"
    learned.save(path)
    model = load_model("tiny")
    model.record.config["embed_dim"] = 8
    z, keys = F.normalize(clusters(64, seed=4) + 0.6 * unit(64, 8, seed=5), dim=-1), sample_keys(0, 0, torch.arange(64))
    centres = CENTRES[torch.arange(64) % 4]
    losses, along = [mean_loss(learned, z)], [float((z * centres).sum(1).mean())]
    for steps in (2, 6):
        defended = defend(model, "clipure_diff", prior=str(path), steps=steps, step=0.1, samples=8)
        moved = defended.stages.embedding.run(5 * z, None, draw_of(keys))
        torch.testing.assert_close(moved.norm(dim=1), torch.full((64,), 5.0))
        losses.append(mean_loss(learned, F.normalize(moved, dim=1)))
        along.append(float((F.normalize(moved, dim=1) * centres).sum(1).mean()))
    assert losses[0] > losses[1] > losses[2] and along[0] < along[1] < along[2]


def test_it_is_differentiated_with_its_inner_gradient(vit, images, keys, tmp_path):
    """Finite differences of the whole climb in float64."""
    defended = make("clipure_diff", vit, tmp_path, steps=2, step=0.3)
    run, draw = defended.stages.embedding.run, draw_of(keys[:1])
    z = vit.encode(images[:1]).embedding_BD.detach().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda at: run(at, images[:1], draw), (z,), atol=1e-6)


def test_a_prior_belongs_to_a_model(vit, tmp_path):
    """None ships for this one; one of another width, or settings out of range, are refused."""
    with pytest.raises(ConfigError, match="no diffusion prior ships for vit"):
        defend(vit, "clipure_diff")
    LatentDiffusionPrior(8, hidden=8, blocks=1).save(tmp_path / "narrow.safetensors")
    with pytest.raises(ConfigError, match="of width 8, vit gives 16"):
        defend(vit, "clipure_diff", prior=str(tmp_path / "narrow.safetensors"))
    for settings, words in (({"samples": 0}, "samples = 0"), ({"first": 0.5, "last": 0.4}, "first = 0.5"), ({"last": 1.0}, "last = 1.0")):
        with pytest.raises(ConfigError, match=words):
            make("clipure_diff", vit, tmp_path, **settings)


def test_the_shipped_prior_is_minicips_and_warns_of_what_was_fine_tuned():
    """It loads for MiniCLIP-32; its file says on which weights it was trained; small enough to ship."""
    model = load_model("miniclip32")
    path = SHIPPED[model.record.sha256]
    defended = defend(model, "clipure_diff")
    assert defended.prior.origin["model_sha256"] == model.record.sha256 and path.stat().st_size < 5_000_000
    assert defended.settings["prior_sha256"] == file_hash(path)
    assert file_hash(path) in (path.parent / "README.md").read_text()
    from dataclasses import replace

    model.record = replace(model.record, sha256="0" * 64, base_sha256=model.record.sha256, method="tecoa")
    with pytest.warns(UserWarning, match="of other weights .25f19f9a1fe2."):
        defend(model, "clipure_diff")


def test_a_folder_has_the_prior_of_these_very_weights(vit, tmp_path):
    """By the hash in its file; none and two of them are errors; a file of other weights warns; one that ships needs none there."""
    folder = tmp_path / "priors"
    with pytest.raises(ConfigError, match="priors has no diffusion prior of these weights .vit, none"):
        defend(vit, "clipure_diff", prior=str(folder))
    for name, sha256 in (("a", "0" * 64), ("b", vit.record.sha256), ("c", None)):
        prior = LatentDiffusionPrior(vit.width, hidden=8, blocks=1)
        prior.origin = {} if sha256 is None else {"model_sha256": sha256}
        prior.save(folder / f"{name}.safetensors")
    (folder / "torn.safetensors").write_bytes(b"x")
    assert defend(vit, "clipure_diff", prior=str(folder)).settings["prior"] == "b.safetensors"
    with pytest.warns(UserWarning, match="of other weights .000000000000."):
        defend(vit, "clipure_diff", prior=str(folder / "a.safetensors"))
    (folder / "d.safetensors").write_bytes((folder / "b.safetensors").read_bytes())
    with pytest.raises(ConfigError, match="has 2 priors of vit"):
        defend(vit, "clipure_diff", prior=str(folder))
    assert defend(load_model("miniclip32"), "clipure_diff", prior=str(folder)).settings["prior"] == "miniclip32.safetensors"


def test_the_shipped_prior_knows_images_from_noise():
    """Embeddings of the sample's photographs cost less than random directions with the same mean and spread in each dimension."""
    from datamodules import Sample

    model = load_model("miniclip32")
    images = Sample().evaluation_set("test").batch(range(0, 200, 2)).images
    with torch.no_grad():
        real = F.normalize(model.encode(images).embedding_BD, dim=1)
    prior = load_prior(SHIPPED[model.record.sha256])
    fake = F.normalize(real.mean(0) + real.std(0) * torch.randn(real.shape, generator=torch.Generator().manual_seed(0)), dim=1)
    assert mean_loss(prior, real) < 0.97 * mean_loss(prior, fake)


class _Scheduler(nn.Module):
    """Two schedules of the package's kind."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        share = torch.linspace(0.99, 0.01, timesteps)
        self.num_timesteps, self.loss_type = timesteps, "l2"
        self.register_buffer("sqrt_alphas_cumprod", share.sqrt())
        self.register_buffer("sqrt_one_minus_alphas_cumprod", (1 - share).sqrt())


class _Network(nn.Module):
    """A linear denoiser that checks that no text comes through."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, noisy, times, *, text_embed, text_cond_drop_prob):
        """Ignores the time."""
        assert text_cond_drop_prob == 1 and times.dtype == torch.int64 and not text_embed.any()
        return self.linear(noisy)


class _Prior(nn.Module):
    """The parts of a ``DiffusionPrior`` that the adapter reads."""

    def __init__(self, net: nn.Module, image_embed_dim: int, timesteps: int = 100, predict_x_start: bool = True) -> None:
        super().__init__()
        self.net, self.image_embed_dim, self.noise_scheduler = net, image_embed_dim, _Scheduler(timesteps)
        self.image_embed_scale, self.predict_x_start, self.predict_v, self.training_clamp_l2norm = 4.0, predict_x_start, False, False


@pytest.mark.parametrize("predicts_embedding", [True, False])
def test_a_dalle2_prior_gives_its_training_loss_for_each_sample(predicts_embedding):
    """Of the scaled embedding or of the noise, at the schedule's own steps."""
    prior = _Prior(_Network(16), 16, predict_x_start=predicts_embedding)
    z, time, noise = unit(3, 16), torch.tensor([0.0, 0.5, 0.999]), torch.randn(3, 16)
    keep, add = (schedule[[0, 50, 99]][:, None] for schedule in (prior.noise_scheduler.sqrt_alphas_cumprod,
                                                                   prior.noise_scheduler.sqrt_one_minus_alphas_cumprod))  # fmt: skip
    wanted = 4 * z if predicts_embedding else noise
    expected = (prior.net.linear(keep * 4 * z + add * noise) - wanted).square().mean(1)
    torch.testing.assert_close(Dalle2Prior(prior).loss(z, time, noise), expected)


def test_a_dalle2_prior_comes_from_its_checkpoint(vit, images, keys, tmp_path, monkeypatch):
    """With the package (a stand-in here), its trainer's file and the configuration beside it; parts of a CLIP in the file are left out."""
    package = types.SimpleNamespace(DiffusionPrior=_Prior, DiffusionPriorNetwork=_Network)
    monkeypatch.setitem(sys.modules, "dalle2_pytorch", package)
    trained = _Prior(_Network(16), 16)
    path = tmp_path / "prior.pth"
    torch.save({"model": {**trained.state_dict(), "clip.weight": torch.zeros(2)}, "step": torch.tensor(3)}, path)
    with pytest.raises(WeightsError, match="prior.json beside it"):
        defend(vit, "clipure_diff", prior=str(path))
    described = {"prior": {"net": {"dim": 16}, "clip": {"make": "openai"}, "image_embed_dim": 16, "timesteps": 100}}
    path.with_suffix(".json").write_text(json.dumps(described))
    defended = defend(vit, "clipure_diff", prior=str(path), steps=2)
    moved = encode_in_stages(defended, images, draw_of(keys)).unit_BD
    assert not torch.allclose(moved, vit.encode(images).unit_BD) and defended.settings["prior_sha256"] == file_hash(path)
    path.with_suffix(".json").write_text(json.dumps({"prior": {"net": {"dim": 8}, "image_embed_dim": 8}}))
    with pytest.raises(WeightsError, match="does not fit prior.json"):
        defend(vit, "clipure_diff", prior=str(path))


def test_without_the_package_the_error_names_the_extra(vit, tmp_path, monkeypatch):
    """Rather than a traceback of an import."""
    monkeypatch.setitem(sys.modules, "dalle2_pytorch", None)
    with pytest.raises(ConfigError, match=r"aft\[diffusion\]"):
        defend(vit, "clipure_diff", prior=str(tmp_path / "prior.pth"))


def test_the_package_itself_where_it_is_there(vit, images, keys, tmp_path):
    """A small prior of its own code, with random weights, written as its trainer writes it; the loss is that of its own training."""
    package = pytest.importorskip("dalle2_pytorch", reason="the extra 'diffusion' is not installed")
    net = {"dim": 16, "depth": 1, "dim_head": 8, "heads": 2, "num_timesteps": 100, "max_text_len": 4}
    prior = package.DiffusionPrior(net=package.DiffusionPriorNetwork(**net), image_embed_dim=16, timesteps=100,
                                   condition_on_text_encodings=False, text_cond_drop_prob=1.0, image_cond_drop_prob=0.0)  # fmt: skip
    prior.eval()
    z, noise, times = unit(1, 16), torch.randn(1, 16), torch.tensor([37])
    own = prior.p_losses(z * prior.image_embed_scale, times, {"text_embed": torch.zeros(1, 16)}, noise)
    torch.testing.assert_close(Dalle2Prior(prior).loss(z, torch.tensor([0.375]), noise)[0], own)
    path = tmp_path / "prior.pth"
    torch.save({"model": prior.state_dict()}, path)
    path.with_suffix(".json").write_text(json.dumps({"prior": {"net": net, "image_embed_dim": 16, "timesteps": 100}}))
    defended = defend(vit, "clipure_diff", prior=str(path), steps=2)
    x = images.requires_grad_(True)
    (slope,) = torch.autograd.grad(encode_in_stages(defended, x, draw_of(keys)).unit_BD.sum(), x)
    assert slope.isfinite().all() and slope.abs().max() > 0


def test_each_step_has_its_own_noise(vit, images, keys, tmp_path):
    """What the prior is shown in a step is counted noise of that step's two uses of the draw."""
    defended, seen = make("clipure_diff", vit, tmp_path), []
    inner = defended.prior.loss
    defended.prior.loss = lambda z, time, noise: seen.append((time, noise)) or inner(z, time, noise)
    draw = draw_of(keys)
    defended.encode(images, draw=draw)
    assert len(seen) == 3
    for turn, (time, noise) in enumerate(seen):
        expected = 0.2 + 0.4 * uniform(keys, draw.count(2 * turn), (2,)).double()
        torch.testing.assert_close(time.view(7, 2), expected)
        assert torch.equal(noise.view(7, 2, 16), normal(keys, draw.count(2 * turn + 1), (2, 16)).double())


