"""AOM's step by its vectors, its anchor against a loop; noise, blur, views and the anti-adversary against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from aft.attacks.noise import normal, uniform
from aft.clip.stages import encode_in_stages
from aft.defenses import anti_adversary, defend, open_gates
from aft.defenses.aom import step
from aft.errors import ConfigError, InputError
from tests.defenses.made import NAMES, TEMPLATES, draw_of, make

Z, MU = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([[0.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("strength, path, expected", [
    (0.0, "linear", (1, 0)), (1.0, "linear", (0, 1)), (0.5, "linear", (0.7071068, 0.7071068)), (2.0, "linear", (-0.4472136, 0.8944272)),
    (0.0, "geodesic", (1, 0)), (1.0, "geodesic", (0, 1)), (0.5, "geodesic", (0.7071068, 0.7071068)),
    (1.5, "geodesic", (-0.7071068, 0.7071068)),
    (2.0, "geodesic", (-1, 0)), (9.0, "geodesic", (-1, 0)),
])  # fmt: skip
def test_the_step_by_its_vectors(strength, path, expected):
    """Towards the anchor and beyond; the rotation ends at 180 degrees."""
    torch.testing.assert_close(step(Z, MU, strength, path), torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", ["linear", "geodesic"])
def test_aom_of_strength_zero_is_the_undefended_model(precise, images, keys, tmp_path, path):
    """Embedding for embedding, lengths included."""
    defended = make("aom", precise, tmp_path, strength=0.0, path=path, gate=None)
    torch.testing.assert_close(encode_in_stages(defended, images, draw_of(keys)).embedding_BD, precise.encode(images).embedding_BD)


def test_aom_of_strength_one_is_its_anchor(vit, images, keys, tmp_path):
    """The unit mean of unit embeddings of noisy copies, each of its own noise."""
    defended = make("aom", vit, tmp_path, strength=1.0, gate=None, samples=3, sigma="16/255")
    draw, total = draw_of(keys), 0
    for turn in range(3):
        noisy = images + 16 / 255 * normal(keys, draw.count(turn), (3, 32, 32)).double()
        total = total + F.normalize(vit.encode(noisy.clamp(0, 1)).embedding_BD, dim=1)
    torch.testing.assert_close(encode_in_stages(defended, images, draw).unit_BD, F.normalize(total, dim=1))


@pytest.mark.parametrize("suspicious", ["above", "below"])
def test_aoms_gate_acts_on_the_suspicious_side(vit, images, keys, tmp_path, suspicious):
    """Of a drift in the middle of those that there are; the others stay as they are."""
    draw = draw_of(keys)
    wide = make("aom", vit, tmp_path, gate=0.0, suspicious="above")
    drift = wide.stages.embedding.gate(images, draw).statistic_n
    assert open_gates(wide, images, draw)["embedding"].all()
    middle = float(drift.median())
    defended = make("aom", vit, tmp_path, gate=middle, suspicious=suspicious)
    opened = open_gates(defended, images, draw)["embedding"]
    assert torch.equal(opened, drift > middle if suspicious == "above" else drift < middle) and int(opened.sum()) == 3
    moved = encode_in_stages(defended, images, draw).embedding_BD
    stayed = torch.isclose(moved, vit.encode(images).embedding_BD, rtol=1e-9, atol=1e-12).all(1)
    assert torch.equal(stayed, ~opened)


def test_noise_is_what_it_says(vit, images, keys, tmp_path):
    """Uniform in the box, or normal; cut to [0, 1]."""
    draw = draw_of(keys)
    flat = make("noise", vit, tmp_path, scale="8/255").stages.pixels.run(images, draw)
    expected = (images + 8 / 255 * (2 * uniform(keys, draw.count(), (3, 32, 32)).double() - 1)).clamp(0, 1)
    torch.testing.assert_close(flat, expected)
    bell = make("noise", vit, tmp_path, scale="8/255", distribution="normal").stages.pixels.run(images, draw)
    torch.testing.assert_close(bell, (images + 8 / 255 * normal(keys, draw.count(), (3, 32, 32)).double()).clamp(0, 1))


def test_low_pass_keeps_what_is_slow_and_takes_what_is_fast(vit, tmp_path):
    """A constant stays, a checkerboard becomes grey, a wave of wavelength 8 is damped by the Gaussian's transfer function."""
    column = torch.arange(32, dtype=torch.float64)
    blur = make("low_pass", vit, tmp_path, sigma=1.5).stages.pixels.run
    shown = lambda row: blur(row.expand(1, 3, 32, 32).contiguous(), None)[..., 8:-8, 8:-8]  # noqa: E731
    torch.testing.assert_close(shown(torch.full((32,), 0.3).double()), torch.full((1, 3, 16, 16), 0.3).double(), rtol=0, atol=1e-12)
    assert (shown(column % 2) - 0.5).abs().max() < 0.01
    wave = 0.5 + 0.4 * (2 * torch.pi * column / 8).cos()
    damped = 0.5 + 0.4 * torch.exp(torch.tensor(-((2 * torch.pi / 8 * 1.5) ** 2) / 2)) * (2 * torch.pi * column[8:-8] / 8).cos()
    torch.testing.assert_close(shown(wave), damped.expand(1, 3, 16, 16).double(), rtol=0, atol=5e-3)
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(make("low_pass", vit, tmp_path, sigma=0.0).stages.pixels.run(x, None), x)


def test_an_image_smaller_than_the_blur_is_named(vit, tmp_path):
    """torch would speak of padding."""
    with pytest.raises(InputError, match="looks 12 pixels far, the images are 8"):
        make("low_pass", vit, tmp_path, sigma=4.0).encode(torch.rand(1, 3, 8, 8, dtype=torch.float64))


def test_the_ensemble_says_what_the_mean_of_logits_says(precise, images, tmp_path):
    """Twelve views, written out; the order of the logits is that of their mean."""
    defended, text_KD = make("tte", precise, tmp_path), precise.text_bank(NAMES, TEMPLATES)
    cuts = [(slice(0, 28), slice(0, 28)), (slice(0, 28), slice(4, 32)), (slice(4, 32), slice(0, 28)), (slice(4, 32), slice(4, 32)),
            (slice(2, 30), slice(2, 30))]  # fmt: skip
    views = [images, *(images[..., top, left] for top, left in cuts)]
    logits = torch.stack([precise(view, text_KD) for whole in views for view in (whole, whole.flip(-1))])
    assert len(logits) == defended.forwards_per_image == 12
    mean = logits.mean(0)
    scale = defended(images, text_KD) / mean
    torch.testing.assert_close(scale, scale[:, :1].expand_as(scale))
    assert (scale > 0).all()
    assert make("tte", precise, tmp_path, crop=1).forwards_per_image == 2


def test_the_anti_adversary_makes_the_model_surer(vit, images, tmp_path):
    """Two steps against the loss of the class that it names, by hand; that class's probability rises on every image."""
    defended, text_KD = make("anti_adversary", vit, tmp_path), vit.text_bank(NAMES, TEMPLATES)
    said = vit(images, text_KD).argmax(1)
    push = torch.zeros_like(images)
    for _ in range(2):
        at = (images + push).requires_grad_(True)
        (slope,) = torch.autograd.grad(F.cross_entropy(vit(at, text_KD), said, reduction="sum"), at)
        push = (images + push - 4 / 255 * slope.sign()).clamp(0, 1) - images
    torch.testing.assert_close(defended(images, text_KD), vit(images + push, text_KD))
    before, after = (logits.softmax(1).gather(1, said[:, None]) for logits in (vit(images, text_KD), defended(images, text_KD)))
    assert (after > before).all()


def test_the_anti_adversary_knows_its_classes(vit, images):
    """It asks for them, and refuses logits over others."""
    defended = defend(vit, "anti_adversary")
    with pytest.raises(ConfigError, match="call its text_bank"):
        defended.encode(images)
    first = defended.text_bank(NAMES, TEMPLATES)
    assert defended(images, first).shape == (7, 3)
    with pytest.raises(ConfigError, match="for other classes"):
        defended(images, vit.text_bank(("car", "bird", "fish"), TEMPLATES))
    with pytest.raises(ConfigError, match="for other classes"):
        defended(images, first[:2])


def test_the_anti_adversarys_smooth_form_has_the_derivative_of_what_it_computes(vit, images, tmp_path, monkeypatch):
    """Finite differences through the inner gradients, with a softening of fixed scale."""
    monkeypatch.setattr(anti_adversary, "softened_sign", lambda gradient: torch.tanh(20 * gradient))
    stage = make("anti_adversary", vit, tmp_path).stages.pixels
    x = images[:2].clamp(0.2, 0.8)
    way, seen = (torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6))
    value = lambda at: (stage.smooth(at, None) * seen).sum()  # noqa: E731
    (slope,) = torch.autograd.grad(value(at := x.clone().requires_grad_(True)), at)
    differences = (value(x + 1e-6 * way) - value(x - 1e-6 * way)) / 2e-6
    assert float((slope * way).sum()) == pytest.approx(float(differences), rel=1e-4)
    assert not torch.allclose(slope, seen, rtol=1e-3)


@pytest.mark.parametrize("name, settings, words", [
    ("aom", {"samples": 0}, "samples = 0"), ("aom", {"sigma": 0}, "sigma = 0"), ("aom", {"sigma": 8}, "write 4/255"),
    ("aom", {"strength": -1.0}, "strength = -1.0"), ("aom", {"path": "straight"}, "path = 'straight'"),
    ("aom", {"gate": -1.0}, "gate = -1.0"),
    ("aom", {"suspicious": "left"}, "suspicious = 'left'"), ("noise", {"scale": 2}, r"scale = 2 is outside \[0, 1\]"),
    ("noise", {"distribution": "flat"}, "distribution = 'flat'"), ("low_pass", {"sigma": -1}, "sigma = -1"),
    ("tte", {"crop": 0}, "crop = 0"), ("tte", {"crop": 1, "flip": False}, "one view"), ("anti_adversary", {"steps": 0}, "steps = 0"),
])  # fmt: skip
def test_bad_settings_are_named(vit, name, settings, words):
    """Noise, samples, gates and shares out of range."""
    with pytest.raises(ConfigError, match=words):
        defend(vit, name, **settings)
