"""Laws of corruptions: noise belongs to the image, figures are what counting gives, nothing is done twice; and the package itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import eval as command
from aft.cards import read_arrays
from aft.errors import AftError, ConfigError, DataError
from aft.evaluation import Cell, Place, corruptions, evaluate, plan
from aft.evaluation.corruptions import KINDS, SEEDED, Corruptions
from aft.evaluation.judge import Cost
from aft.evaluation.runner import card_path

SOME = Corruptions(("fog", "gaussian_noise", "glass_blur"), (1, 4))


def spoil(picture, severity, corruption_name, seed=None):
    """In the place of the package: noise of numpy's global generator, or of a seed of its own where the kind takes one."""
    assert (seed is not None) == (corruption_name in SEEDED)
    noise = np.random.normal(size=picture.shape) if seed is None else np.random.default_rng(seed).normal(size=picture.shape)
    return (picture.astype(float) + 12 * severity * noise).clip(0, 255).astype(np.uint8)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """``spoil`` in the place of the package."""
    monkeypatch.setattr(corruptions, "corrupter", lambda: spoil)


@pytest.fixture
def large(data):
    """The set with images of 32 px, of which the model is right on those that are bright enough."""
    return replace(data, images=torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(3)))


def images(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and their numbers."""
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(n) * 11


@pytest.mark.parametrize("kind", ["gaussian_noise", "glass_blur"])
def test_noise_belongs_to_the_image(stub, kind):
    """The same in any batch and order, and after other numbers were drawn; another image, kind, severity or seed has another."""
    x, index = images()
    same = x[:1].expand(6, -1, -1, -1)
    whole = SOME.apply(x, index, kind, 4)
    np.random.seed(5)
    order = torch.tensor([4, 1])
    assert torch.equal(SOME.apply(x[order], index[order], kind, 4), whole[order])
    looks = [one.apply(same, index, *which) for one in (SOME, replace(SOME, seed=1)) for which in ((kind, 4), (kind, 1), ("snow", 4))]
    assert len(torch.cat(looks).unique(dim=0)) == 36
    assert whole.dtype == x.dtype and torch.equal((whole * 255).round() / 255, whole)


def test_no_generator_is_moved(stub):
    """numpy's is as before, also after an exception; torch's is not read."""
    x, index = images()
    before, torch_before = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    SOME.apply(x, index, "fog", 1)
    with pytest.raises(ZeroDivisionError), corruptions.numpy_seeded(3):
        raise ZeroDivisionError
    assert np.array_equal(before, np.random.get_state()[1]) and torch.equal(torch_before, torch.random.get_rng_state())


def test_the_card_says_every_kind(stub, model, large, tmp_path):
    """Figures are those of the verdicts, clustered by image; clean accuracy is that of the clean protocol; finished costs nothing."""
    cell = Cell(model, large, plan("corruptions", eps=0, steps=1, targets=1, classes=5, corruptions=SOME))
    card = evaluate(cell, tmp_path, batch_size=16)
    seen = read_arrays(card_path(tmp_path, "model", cell).with_suffix(".npz"))["corrupted"]
    told = card["metrics"]["corruptions"]
    assert seen.shape == (40, 6) and (told["kinds"], told["severities"]) == (["gaussian_noise", "glass_blur", "fog"], [1, 4])
    assert told["mean_accuracy"] == pytest.approx(seen.mean()) and 0 < seen.mean() < 1
    assert told["mean_accuracy_standard_error"] == pytest.approx(seen.mean(1).std(ddof=1) / 40**0.5)
    fog = told["per_kind"]["fog"]
    assert fog["mean_accuracy"] == pytest.approx(seen[:, 4:].mean()) and fog["by_severity"][1] == pytest.approx(seen[:, 5].mean())
    assert told["table"] == "ImageNet-C" and card["robust_accuracy"] is None and card["threat"] is None
    clean = evaluate(Cell(model, large, plan("clean", eps=0, steps=1, targets=1, classes=5)), tmp_path)
    assert clean["clean_accuracy"] == card["clean_accuracy"] and clean["cell"] != card["cell"]
    assert card["cost"]["forwards"] == 40 * 7
    with Cost(model.visual) as cost:
        assert evaluate(cell, tmp_path) == card
    assert cost.forwards == 0


def test_processes_and_batches_change_nothing(stub, model, large, tmp_path):
    """Nor does a kill: parts are kept."""
    cell = Cell(model, large, plan("corruptions", eps=0, steps=1, targets=1, classes=5, corruptions=SOME))
    whole = evaluate(cell, tmp_path / "one")

    def stop(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(cell, tmp_path / "two", batch_size=7, place=Place(0, 2), log=stop)
    with Cost(model.visual) as cost:
        evaluate(cell, tmp_path / "two", batch_size=9, place=Place(0, 2))
    made = evaluate(cell, tmp_path / "two", batch_size=9, place=Place(1, 2))
    assert cost.forwards == 13 * 7 and made["metrics"]["corruptions"] == whole["metrics"]["corruptions"]
    other = replace(cell.protocol, corruptions=replace(SOME, seed=1))
    assert replace(cell, protocol=other).id != cell.id


def test_what_does_not_fit_is_named(stub, data):
    """An unknown kind or severity, none, images that are too small, and a package that is missing."""
    for settings, message in (
        ({"kinds": ("fgo",)}, "unknown corruption 'fgo'.*did you mean 'fog'"), ({"severities": (1, 6)}, r"\[1, 6\] holds 6: they are 1"),
        ({"kinds": ()}, "one kind and one severity"), ({"severities": ()}, "one kind and one severity"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            Corruptions(**settings)
    with pytest.raises(DataError, match="images of 6 x 6 pixels are too small for corruptions: give images of 32 x 32"):
        SOME.apply(data.images[:2], torch.arange(2), "fog", 1)


def test_a_missing_package_is_named(monkeypatch):
    """With what to install."""
    monkeypatch.setitem(__import__("sys").modules, "imagecorruptions", None)
    with pytest.raises(ConfigError, match=r"imagecorruptions-imaug .*pip install 'aft\[corruptions\]'"):
        corruptions.corrupter()


def test_the_command_takes_them(stub, tmp_path, capsys):
    """As a protocol beside others: a column of its own, and what was looked at below; a wrong kind is named before anything is measured."""
    words = ["--data", "datamodules.Sample", "--models", "{m: {name: tiny}}", "--n", "10", "--out", str(tmp_path), "--eps", "[1/255]",
             "--steps", "1", "--protocols", "[clean, corruptions, pgd]"]  # fmt: skip
    made = command.main([*words, "--corruptions.kinds", "[fog, snow]", "--corruptions.severities", "[2]"])
    assert [card["protocol"]["name"] for _, card in made] == ["clean", "corruptions", "pgd"]
    said = " ".join(capsys.readouterr().out.split())
    assert "corruptions %" in said and "mean accuracy over 2 kinds at severities 2 of ImageNet-C's table" in said
    for wrong, message in (("--corruptions.kinds=[fgo]", "fog"), ("--corruptions.severities=[9]", "1 .mild. to 5")):
        with pytest.raises(AftError, match=message):
            command.main([*words, wrong])


@pytest.mark.parametrize("kind", KINDS)
def test_the_package_gives_the_same_picture_for_the_same_image(kind):
    """Every kind at 32 px, mildest and strongest: a change, in [0, 1], the same on a second call and beside other images."""
    pytest.importorskip("imagecorruptions", reason="the package that makes the pictures: pip install 'aft[corruptions]'")
    x, index = images(3)
    smooth = torch.nn.functional.interpolate(x[:, :, :4, :4], size=32, mode="bilinear")
    for severity in (1, 5):
        made = Corruptions().apply(smooth, index, kind, severity)
        assert made.shape == x.shape and made.min() >= 0 and made.max() <= 1 and (made - smooth).abs().max() > 1 / 255
        assert torch.equal(Corruptions().apply(smooth[1:], index[1:], kind, severity), made[1:])
