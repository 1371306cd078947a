"""TTC against a loop written from its five steps; its weights, its budget, its gate."""

from __future__ import annotations

import pytest
import torch

from aft.attacks.noise import uniform
from aft.clip.stages import encode_in_stages
from aft.defenses import defend, open_gates, ttc
from aft.defenses.ttc import step_weights
from aft.errors import ConfigError
from tests.defenses.made import draw_of, make

EPS, STEP, TAU = 4 / 255, 1 / 255, 0.05


def by_hand(model, x, draw, threshold):
    """The algorithm as its paper's summary has it, one image at a time; the pixels that are shown, and r."""
    shown, drift = [], []
    for row in range(len(x)):
        image = x[row : row + 1]
        noise = uniform(draw.keys_n[row : row + 1], draw.count(), image.shape[1:]).double() * 2 - 1
        deltas = [(image + (EPS * noise)).clamp(0, 1) - image]
        embedded = model.encode(image).embedding_BD
        drift.append(float(((model.encode(image + deltas[0]).embedding_BD - embedded).norm() / embedded.norm()).detach()))
        for _ in range(2):
            at = (image + deltas[-1]).detach().requires_grad_(True)
            (slope,) = torch.autograd.grad((model.encode(at).embedding_BD - embedded.detach()).square().sum(), at)
            deltas.append((image + (deltas[-1] + STEP * slope.sign()).clamp(-EPS, EPS)).clamp(0, 1) - image)
        weighted = sum(weight * delta for weight, delta in zip((0.01588, 0.11731, 0.86681), deltas, strict=True))
        shown.append(image + (weighted if drift[-1] < threshold else deltas[0]))
    return torch.cat(shown), torch.tensor(drift)


def test_the_weights():
    """Of two steps and beta 2, and of four."""
    assert step_weights(2, 2.0) == pytest.approx([0.0159, 0.1173, 0.8668], abs=5e-5)
    assert step_weights(4, 2.0) == pytest.approx([0.00029, 0.00214, 0.01584, 0.11702, 0.86470], abs=5e-6)
    assert sum(step_weights(400, 2.0)) == pytest.approx(1)


def test_it_is_the_algorithm(precise, images, keys, tmp_path):
    """On images that it counterattacks and on images whose gate is shut: there the random noise stays."""
    draw = draw_of(keys)
    _, drift = by_hand(precise, images, draw, TAU)
    middle = float(drift.sort().values[2:4].mean())
    expected, _ = by_hand(precise, images, draw, middle)
    defended = make("ttc", precise, tmp_path, threshold=middle)
    opened = open_gates(defended, images, draw)["pixels"]
    assert int(opened.sum()) == 3 and torch.equal(opened, drift < middle)
    got = encode_in_stages(defended, images, draw).embedding_BD
    torch.testing.assert_close(got, precise.encode(expected).embedding_BD, rtol=1e-4, atol=1e-5)


def test_it_stays_in_its_budget(vit, images, keys, tmp_path):
    """In its box and in [0, 1], with steps that would leave both; in single precision too."""
    for x in (images, images.float()):
        defended = make("ttc", vit.to(x.dtype), tmp_path, step_size="9/255", steps=3, threshold=None)
        stage = defended.stages.pixels
        for form in (stage.run, stage.smooth, stage.otherwise):
            shown = form(x, draw_of(keys))
            assert (shown - x).abs().max() <= EPS + 1e-7 and shown.min() >= 0 and shown.max() <= 1
            assert (shown - x).abs().max() > EPS / 2


def test_a_gate_of_none_counterattacks_all_and_of_zero_nobody(vit, images, keys, tmp_path):
    """With a threshold of 0 what is left is random noise alone."""
    always, never = make("ttc", vit, tmp_path, threshold=None), make("ttc", vit, tmp_path, threshold=0.0)
    assert always.stages.pixels.gate is None and not open_gates(never, images, draw_of(keys))["pixels"].any()
    noise = make("noise", vit, tmp_path)
    torch.testing.assert_close(encode_in_stages(never, images, draw_of(keys)).embedding_BD,
                               encode_in_stages(noise, images, draw_of(keys)).embedding_BD)  # fmt: skip


def test_the_gate_may_look_through_the_original_tower(vit, images, keys, tmp_path):
    """A fine-tuned model asks its original; the model's own tower is then not asked, and the card says whose it was."""
    other = vit.undefended.__class__(vit.clip.__class__.__new__(vit.clip.__class__), vit.tokenizer, vit.record)
    other.clip = torch.nn.Module()
    other.clip.visual = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 16)).double()
    defended = make("ttc", vit, tmp_path, gate_model=other)
    gate, draw = defended.stages.pixels.gate(images, draw_of(keys)), draw_of(keys)
    noised = defended.stages.pixels.otherwise(images, draw)
    moved = (other.encode(noised).embedding_BD - other.encode(images).embedding_BD).norm(dim=1)
    torch.testing.assert_close(-gate.statistic_n, moved / other.encode(images).embedding_BD.norm(dim=1))
    assert gate.threshold == -TAU and defended.settings["gate_model"] == f"vit:{vit.record.sha256[:12]}"
    named = defend(vit, "ttc", gate_model="tiny")
    assert named.settings["gate_model"].startswith("tiny:") and next(named.gate_model.parameters()).dtype == torch.float64


def test_the_smooth_form_has_the_derivative_of_what_it_computes(vit, images, keys, tmp_path, monkeypatch):
    """Finite differences through the inner gradients, with a softening whose scale is fixed (its own is a constant to the gradient)."""
    monkeypatch.setattr(ttc, "softened_sign", lambda gradient: torch.tanh(0.3 * gradient))
    stage = make("ttc", vit, tmp_path, steps=2).stages.pixels
    x, draw = images[:2].clamp(0.1, 0.9), draw_of(keys[:2])
    way = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    seen = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(6))
    value = lambda at: (stage.smooth(at, draw) * seen).sum()  # noqa: E731
    (slope,) = torch.autograd.grad(value(at := x.clone().requires_grad_(True)), at)
    differences = (value(x + 1e-5 * way) - value(x - 1e-5 * way)) / 2e-5
    assert float((slope * way).sum()) == pytest.approx(float(differences), rel=1e-4)
    (through_noise_alone,) = torch.autograd.grad((stage.otherwise(at, draw) * seen).sum(), at)
    assert not torch.allclose(slope, through_noise_alone, rtol=1e-3)  # the counterattack has a part in it


@pytest.mark.parametrize("settings, words", [
    ({"threshold": -0.1}, "threshold = -0.1"), ({"threshold": float("nan")}, "threshold = nan"), ({"steps": 0}, "steps = 0"),
    ({"eps": 4}, "write 4/255"), ({"step_size": "x"}, "step_size = 'x'"), ({"beta": float("inf")}, "beta = inf"),
])  # fmt: skip
def test_bad_settings_are_named(vit, settings, words):
    """Thresholds, steps and lengths out of range."""
    with pytest.raises(ConfigError, match=words):
        defend(vit, "ttc", **settings)


def test_a_defended_gate_model_is_refused(vit, tmp_path):
    """Its stages would be left out silently."""
    with pytest.raises(ConfigError, match="itself defended"):
        defend(vit, "ttc", gate_model=make("low_pass", vit, tmp_path))
