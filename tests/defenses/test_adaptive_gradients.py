"""Attack C's gradient is the slope of the expected loss, for every defence of the registry; and attacks that know it reach every one."""

from __future__ import annotations

import pytest
import torch

from aft.attacks import PGD, ClassificationObjective
from aft.attacks.adaptive import Expected, gate_rates
from aft.attacks.sight import Dice, Sight, gated, opaque
from aft.clip.stages import encode_in_stages
from tests.defenses.made import EVERY, NAMES, TEMPLATES, make


def expected(defended, labels, keys, **how):
    """C on the margin."""
    sight = Sight(defended, opaque(defended.stages), hard_forward=how.pop("hard_forward", True))
    text_KD = defended.text_bank(NAMES, TEMPLATES)
    inner = ClassificationObjective(lambda x: defended.logits(encode_in_stages(sight, x), text_KD), labels, "margin")
    return Expected(inner, sight, Dice(keys), **how)


@pytest.mark.parametrize(("name", "settings"), [*((name, {}) for name in EVERY), ("ttc", {"threshold": None}), ("aom", {"gate": None})])
def test_the_gradient_of_c_is_that_of_the_expected_loss(name, settings, vit, images, keys, tmp_path):
    """Central differences of the mean over the same draws along a random direction, of the forward that C differentiates: 1e-3 relative."""
    x, keys, labels = images[:3].clamp(0.1, 0.9), keys[:3], torch.tensor([0, 1, 2])
    defended = make(name, vit.requires_grad_(False), tmp_path, **settings)
    objective, rows = expected(defended, labels, keys, hard_forward=False, draws=2), torch.arange(3)
    objective.sight.temperature = 0.5
    draws = Dice(keys).throw(rows, 2) if defended.stages.random else [None]
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective.value(leaf, rows, draws).sum(), leaf)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = []
    for step in (1e-5, 1e-6, 1e-7):
        ahead, behind = (objective.value(x + sign * step * direction, rows, draws).sum().detach() for sign in (1, -1))
        found.append(float((ahead - behind) / (2 * step)))
    assert min(abs(one - float((slope * direction).sum())) for one in found) <= 1e-3 * abs(float((slope * direction).sum())), found


@pytest.mark.parametrize("name", EVERY)
def test_a_hard_forward_is_the_model_and_has_a_gradient(name, vit, images, keys, tmp_path):
    """For one draw C's loss is that of the defended model, bit for bit; no image's gradient is zero; every gate can be asked."""
    x, keys, labels = images[:3], keys[:3], torch.tensor([0, 1, 2])
    defended = make(name, vit, tmp_path)
    objective, rows = expected(defended, labels, keys, period=5), torch.arange(3)
    (draw,) = Dice(keys).throw(rows, 1) if defended.stages.random else [None]
    leaf = x.clone().requires_grad_()
    judged = objective(leaf, rows)
    with torch.no_grad():
        logits = defended.logits(encode_in_stages(defended, x, draw), defended.text_bank(NAMES, TEMPLATES))
    assert torch.allclose(judged.loss_n, ClassificationObjective(lambda _: logits, labels, "margin")(x, rows).loss_n, rtol=1e-12)
    (given,) = torch.autograd.grad(judged.loss_n.sum(), leaf)
    assert torch.allclose(given.flatten(1).abs().amax(1), torch.ones(3, dtype=torch.float64)) and int(objective.meter.dead_B.sum()) == 0
    if gated(defended.stages):
        assert gate_rates(defended, x, [draw]).shape == (3,)


@pytest.mark.parametrize("name", EVERY)
def test_c_climbs_through_every_defence(name, vit, images, keys, tmp_path):
    """Five steps raise the loss at the attack's own draws, on average over the images."""
    labels = torch.arange(7) % 3
    defended = make(name, vit, tmp_path)
    found = PGD(eps=0.1, relative_step_size=0.3, steps=5, keep="best", drop_broken=False)(
        expected(defended, labels, keys, period=6, draws=2 if defended.stages.random else 1), images, keys
    )
    assert float(found.gain_B.mean()) > 0
