"""Laws of stages as an attack sees them: the smooth form and the soft gate, their limit, and a forward that stays hard."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aft.clip.stages import Gate, Stage, Stages, as_attacked, encode_in_stages
from aft.errors import ConfigError
from tests.staged import Around, LinearTower


def statistic(x, draw=None):
    """The first pixel."""
    return Gate(x[:, 0, 0, 0], 0.5)


SIGN = Stage(lambda x, draw: x + 0.1 * (x - 0.5).sign(), smooth=lambda x, draw: x + 0.1 * torch.tanh(9 * (x - 0.5)), gate=statistic,
             otherwise=lambda x, draw: x / 2)  # fmt: skip


@pytest.fixture
def images():
    """Four images on both sides of the gate."""
    x = torch.rand(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x[:, 0, 0, 0] = torch.tensor([0.2, 0.49, 0.51, 0.9])
    return x.requires_grad_()


def encoded(images, **how):
    """Through the stage."""
    return encode_in_stages(Around(Stages(SIGN), LinearTower()), images, **how).embedding_BD


def slope(value, images):
    """Of its sum."""
    return torch.autograd.grad(value.sum(), images, retain_graph=True)[0]


def test_a_soft_gate_mixes_the_smooth_form_and_what_is_done_when_it_is_shut(images):
    """``w smooth(x) + (1 - w) otherwise(x)``, ``w = sigmoid((s - t) / (T |t|))``."""
    weight = torch.sigmoid((images[:, 0, 0, 0] - 0.5) / (0.2 * 0.5)).view(-1, 1, 1, 1)
    mixed = weight * SIGN.smooth(images, None) + (1 - weight) * images / 2
    assert torch.allclose(encoded(images, gate_temperature=0.2), LinearTower().encode(mixed).embedding_BD, atol=1e-14)


def test_a_cold_gate_is_the_hard_one(images):
    """As the temperature falls, what is left is the smooth form where the gate is open and the other where it is shut."""
    hard = torch.where(statistic(images).open_n.view(-1, 1, 1, 1), SIGN.smooth(images, None), images / 2)
    assert torch.allclose(encoded(images, gate_temperature=1e-4), LinearTower().encode(hard).embedding_BD, atol=1e-12)
    assert torch.equal(encoded(images)[0], LinearTower().encode(images / 2).embedding_BD[0])


def test_a_hard_forward_has_the_bits_of_the_model_and_the_slope_of_the_soft_one(images):
    """The tower's own derivative is taken where the model really is; for a linear tower the whole slope is the soft one's."""
    given = encoded(images, gate_temperature=0.1, hard_forward=True)
    assert torch.equal(given, encoded(images))
    assert torch.allclose(slope(given, images), slope(encoded(images, gate_temperature=0.1), images), atol=1e-14)
    assert not torch.allclose(slope(given, images), slope(encoded(images), images))


def test_a_threshold_of_zero_has_a_temperature_of_its_own(images):
    """No division by zero."""
    stage = Stage(lambda x, draw: 2 * x, gate=lambda x, draw: Gate(x[:, 0, 0, 0] - 0.5, 0.0))
    soft = as_attacked(Stages(stage), gate_temperature=0.1).pixels
    weight = torch.sigmoid((images[:, 0, 0, 0] - 0.5) / 0.1).view(-1, 1, 1, 1)
    assert torch.allclose(soft.run(images, None), (1 + weight) * images)


def test_a_temperature_of_zero_is_refused(images):
    """It is no soft gate."""
    with pytest.raises(ConfigError, match="above 0"):
        encoded(images, gate_temperature=0.0)


def counted(form, seen):
    """The same, noting which images it is shown, by their second pixel."""
    def run(x, draw):
        """Notes and runs."""
        seen.append(sorted(x[:, 0, 0, 1].tolist()))
        return form(x, draw)

    return run


def test_a_gated_stage_runs_on_the_images_that_it_acts_on(images):
    """With the values, dtype and slope of running on all and choosing; none is run where no gate is open, all where all are."""
    marks, seen = images.detach()[:, 0, 0, 1].tolist(), []
    stage = Stage(counted(SIGN.run, seen), gate=statistic, otherwise=SIGN.otherwise)
    given = encode_in_stages(Around(Stages(stage), LinearTower()), images).embedding_BD
    chosen = torch.where(statistic(images).open_n.view(-1, 1, 1, 1), SIGN.run(images, None), SIGN.otherwise(images, None))
    assert torch.equal(given, LinearTower().encode(chosen).embedding_BD) and seen == [sorted(marks[2:])]
    assert torch.equal(slope(given, images), slope(LinearTower().encode(chosen).embedding_BD, images))
    for rows, ran in ((slice(0, 2), []), (slice(2, 4), [sorted(marks[2:])])):
        seen.clear()
        part = encode_in_stages(Around(Stages(stage), LinearTower()), images[rows]).embedding_BD
        assert torch.equal(part, given[rows]) and seen == ran
    seen.clear()
    encode_in_stages(Around(Stages(replace(stage, batch_coupled=True)), LinearTower()), images)
    assert seen == [sorted(marks)], "neighbours count"


def test_a_soft_gate_leaves_out_what_changes_no_bit(images):
    """Cold, the images far below the threshold are not shown to the smooth form, and slope and forward are those of showing it all."""
    marks, seen = images.detach()[:, 0, 0, 1].tolist(), []
    stage = Stage(SIGN.run, gate=statistic, otherwise=SIGN.otherwise, smooth=counted(SIGN.smooth, seen))
    for temperature, shown in ((0.1, marks), (0.004, marks[1:])):
        seen.clear()
        given = encode_in_stages(Around(Stages(stage), LinearTower()), images, gate_temperature=temperature).embedding_BD
        weight = torch.sigmoid((images[:, 0, 0, 0] - 0.5) / (temperature * 0.5)).view(-1, 1, 1, 1)
        mixed = LinearTower().encode(weight * SIGN.smooth(images, None) + (1 - weight) * images / 2).embedding_BD
        assert seen == [sorted(shown)] and torch.allclose(given, mixed, rtol=1e-14, atol=0)
        assert torch.allclose(slope(given, images), slope(mixed, images), rtol=1e-13, atol=1e-13)


def test_what_is_its_own_smooth_form_runs_once(images):
    """A stage without a sign and a gate is not run a second time for the forward of C."""
    seen = []
    stage = Stage(counted(lambda x, draw: x**2, seen))
    encode_in_stages(Around(Stages(stage), LinearTower()), images, gate_temperature=0.1, hard_forward=True)
    assert len(seen) == 1
    asked = []
    gate = Stage(SIGN.run, gate=lambda x, draw: asked.append(1) or statistic(x), smooth=SIGN.smooth)
    encode_in_stages(Around(Stages(gate), LinearTower()), images, gate_temperature=0.1, hard_forward=True)
    assert len(asked) == 1, "its gate neither"


@pytest.mark.parametrize("shut", [lambda x, draw: (4 * x).round() / 4, lambda x, draw: x.detach() / 2], ids=["rounds", "detached"])
def test_a_soft_gate_spares_no_image_whose_only_slope_is_the_soft_one(images, shut):
    """Attacks scale each image's gradient, so that a tiny one has a direction: where the other branch has no slope nothing is left out."""
    stage = replace(SIGN, otherwise=shut)
    given = encode_in_stages(Around(Stages(stage), LinearTower()), images, gate_temperature=0.004).embedding_BD
    weight = torch.sigmoid((images[:, 0, 0, 0] - 0.5) / (0.004 * 0.5)).view(-1, 1, 1, 1)
    mixed = LinearTower().encode(weight * SIGN.smooth(images, None) + (1 - weight) * shut(images, None)).embedding_BD
    ours, expected = (slope(value, images).flatten(1) for value in (given, mixed))
    assert (expected.abs().amax(1) > 0).all() and torch.allclose(ours, expected, rtol=1e-12, atol=0)
