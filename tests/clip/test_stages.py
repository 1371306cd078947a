"""Laws of a staged model: one forward from its stages, the same for a plain model, and BPDA that changes the backward alone."""

from __future__ import annotations

import pytest
import torch

from aft.attacks import sample_keys
from aft.attacks.noise import normal, uniform
from aft.clip.stages import PURPOSES, USES_A_DRAW, Draw, Gate, Stage, Stages, draws_for, encode_in_stages
from aft.errors import ConfigError, InputError
from tests.staged import Around, LinearTower

KEYS = sample_keys(0, 0, torch.arange(4))


@pytest.fixture
def tower():
    """The same each time."""
    return LinearTower()


@pytest.fixture
def images():
    """Four images."""
    return torch.rand(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def rounded(images, draw):
    """To four grey levels: no gradient."""
    return (images * 3).round() / 3


def test_a_plain_model_is_its_tower(tower, images):
    """Bit for bit, and any draw is ignored."""
    assert torch.equal(encode_in_stages(tower, images).embedding_BD, tower.encode(images).embedding_BD)
    assert torch.equal(encode_in_stages(tower, images, Draw(KEYS)).embedding_BD, tower.encode(images).embedding_BD)


def test_stages_run_in_their_order(tower, images):
    """Pixels before the tower, embeddings after it beside the images that were embedded."""
    seen = []
    stages = Stages(
        Stage(lambda x, draw: 1 - x), Stage(lambda z, x, draw: seen.append(x) or 2 * z)
    )  # fmt: skip
    z = encode_in_stages(Around(stages, tower), images).embedding_BD
    assert torch.equal(z, 2 * tower.encode(1 - images).embedding_BD) and torch.equal(seen[0], 1 - images)
    assert list(stages.declared) == ["pixels", "embedding"] and not stages.random


def test_bpda_keeps_the_forward_and_makes_the_backward_the_identity(tower, images):
    """Rounding has no gradient; with BPDA the gradient is the tower's at the rounded image, and the output is the same bits."""
    defended = Around(Stages(Stage(rounded, differentiable=False)), tower)
    images.requires_grad_(True)
    plain, passed = encode_in_stages(defended, images).embedding_BD, encode_in_stages(defended, images, bpda=["pixels"]).embedding_BD
    assert torch.equal(plain, passed)
    assert torch.autograd.grad(plain.sum(), images)[0].abs().max() == 0
    at = rounded(images, None).detach().requires_grad_(True)
    expected = torch.autograd.grad(tower.encode(at).embedding_BD.sum(), at)[0]
    assert torch.equal(torch.autograd.grad(passed.sum(), images)[0], expected)


def test_bpda_keeps_no_graph_of_what_it_replaces(tower, images):
    """The stage's own activations would be held for nothing; a stage that takes gradients says so, and its result still has none."""
    seen = []

    def climb(x, draw):
        """One step uphill, by a gradient of its own."""
        seen.append(torch.is_grad_enabled())
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return leaf + torch.autograd.grad(tower.encode(leaf).embedding_BD.sum(), leaf)[0]

    images.requires_grad_(True)
    defended = Around(Stages(Stage(climb)), tower)
    passed = encode_in_stages(defended, images, bpda=["pixels"]).embedding_BD
    encode_in_stages(defended, images)
    expected = torch.autograd.grad(tower.encode(images).embedding_BD.sum(), images)[0]
    assert seen == [False, True] and torch.equal(torch.autograd.grad(passed.sum(), images)[0], expected)


def test_bpda_of_the_embedding_hides_the_images_that_stand_beside(tower, images):
    """The identity in z alone: no second way from the images into the loss."""
    defended = Around(Stages(embedding=Stage(lambda z, x, draw: z.sign() * x.sum())), tower)
    images.requires_grad_(True)
    got = torch.autograd.grad(encode_in_stages(defended, images, bpda=["embedding"]).embedding_BD.sum(), images)[0]
    assert torch.equal(got, torch.autograd.grad(tower.encode(images).embedding_BD.sum(), images)[0])


def test_a_gate_lets_a_stage_act_above_its_threshold_alone(tower, images):
    """The statistic is the image's first pixel; the others pass as they are, also under BPDA."""
    gate = lambda x, draw: Gate(x[:, 0, 0, 0], 0.5)  # noqa: E731
    stage = Stage(lambda x, draw: torch.zeros_like(x), gate=gate)
    assert stage.gated and not Stage(rounded).gated
    images[:, 0, 0, 0] = torch.tensor([0.4, 0.5, 0.6, 1.0])
    for bpda in ((), ("pixels",)):
        z = encode_in_stages(Around(Stages(stage), tower), images, bpda=bpda).embedding_BD
        assert torch.equal(z[:2], tower.encode(images).embedding_BD[:2]) and z[2:].abs().max() == 0


def test_what_a_shut_gate_leaves_may_be_another_thing_than_nothing(tower, images):
    """Where the gate is shut the stage does its ``otherwise``, with the same arguments."""
    stage = Stage(lambda x, draw: torch.zeros_like(x), gate=lambda x, draw: Gate(x[:, 0, 0, 0], 0.5), otherwise=lambda x, draw: x / draw)
    images[:, 0, 0, 0] = torch.tensor([0.4, 0.5, 0.6, 1.0])
    z = encode_in_stages(Around(Stages(stage), tower), images, 2).embedding_BD
    assert torch.equal(z[:2], tower.encode(images / 2).embedding_BD[:2]) and z[2:].abs().max() == 0


def test_a_random_stage_needs_a_draw_and_is_a_function_of_it(tower, images):
    """The same draw gives the same bits for a sample in any batch; another draw gives others."""
    stage = Stage(lambda x, draw: x + normal(draw.keys_n, draw.count(), x.shape[1:]).to(x), random=True)
    defended = Around(Stages(stage), tower)
    with pytest.raises(InputError, match="random and got no draw"):
        encode_in_stages(defended, images)
    first, second = draws_for("scoring", KEYS, 2)
    whole = encode_in_stages(defended, images, first).embedding_BD
    alone = encode_in_stages(defended, images[2:3], Draw(KEYS[2:3], first.number)).embedding_BD
    assert torch.equal(whole[2:3], alone) and not torch.equal(whole, encode_in_stages(defended, images, second).embedding_BD)


def test_draws_of_different_purposes_never_meet():
    """The last number of one purpose is below the first of the next; a draw's uses stay its own; an attack's start is none of them."""
    start = uniform(KEYS, 0, (8,))
    assert all(not torch.equal(start, uniform(KEYS, draws_for(purpose, KEYS)[0].count(), (8,))) for purpose in PURPOSES)
    scoring, selection, attack = (draws_for(purpose, KEYS)[0] for purpose in ("scoring", "selection", "attack"))
    assert scoring.count(USES_A_DRAW - 1) < Draw(KEYS, scoring.number + 1).count() <= selection.count() < attack.count()
    last = draws_for("scoring", KEYS, first=selection.number - scoring.number - 1)[0]
    assert last.count(USES_A_DRAW - 1) < selection.count()


@pytest.mark.parametrize("wrong, words", [
    (lambda tower, x: encode_in_stages(tower, x, bpda=["pixls"]), "pixls"),
    (lambda tower, x: draws_for("atack", KEYS), "did you mean 'attack'"),
    (lambda tower, x: draws_for("attack", KEYS, first=1 << 32), "below"),
    (lambda tower, x: Draw(KEYS).count(USES_A_DRAW), "take another draw"),
])  # fmt: skip
def test_what_does_not_exist_is_named(tower, images, wrong, words):
    """Unknown stage, unknown purpose, numbers beyond a range."""
    with pytest.raises(ConfigError, match=words):
        wrong(tower, images)
