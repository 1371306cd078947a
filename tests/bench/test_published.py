"""The loops that ours is compared with take the same step: only the way differs, so a ratio of times is a ratio of ways."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aft.attacks import PGD, sample_keys
from aft.batch import Batch
from aft.clip import ModelSpec
from aft.methods import FARE, AdversarialFineTuning, OptimizerSpec, TeCoA
from bench.published import ExtraPass, TextEachStep, start_in_ball, uphill
from tests.conftest import Calls, MemoryData, make_trainer

EPS, STEP_SIZE, STEPS = 8 / 255, 3 / 255, 3


def ours(
    kind: type[AdversarialFineTuning], clip: ModelSpec, data: MemoryData, folder: Path
) -> tuple[AdversarialFineTuning, dict[str, Tensor]]:
    """A method before its step, and its gradient: what one step of plain descent with rate 1 takes from the weights, float64."""
    plain = OptimizerSpec(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant")
    method = kind(clip, attack=PGD(eps=EPS, step_size=STEP_SIZE, steps=STEPS), optimizer=plain)
    before = copy.deepcopy(method).double()
    make_trainer(folder, max_steps=1, precision="64-true", limit_val_batches=0).fit(method, datamodule=data)
    now = dict(method.model.visual.named_parameters())
    return before, {name: value.detach() - now[name].detach() for name, value in before.model.visual.named_parameters()}


def same_start(batch: Batch) -> Tensor:
    """The point that our attack starts from."""
    attack = PGD(eps=EPS, step_size=STEP_SIZE, steps=STEPS)
    return attack.threat.random_start(batch.images, sample_keys(0, 0, batch.index), 0)


def compare(gradient: dict[str, Tensor], tower: torch.nn.Module) -> None:
    """To 1e-8 of the largest entry."""
    largest = max(float(value.abs().max()) for value in gradient.values())
    assert largest > 0
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None
        assert float((parameter.grad - gradient[name]).abs().max()) < 1e-8 * largest, name


def test_the_loop_that_encodes_texts_takes_our_tecoa_step(tiny: ModelSpec, tmp_path: Path) -> None:
    data = MemoryData(dtype=torch.float64)
    method, gradient = ours(TeCoA, tiny, data, tmp_path)
    batch = data.batches()[0]
    loop = TextEachStep(method.model, [data.templates[0].format(name) for name in data.class_lists["train"]], EPS, STEP_SIZE, STEPS, lr=0.0)
    texts = Calls(loop.model.clip.transformer)
    loop.step(batch, same_start(batch))
    compare(gradient, loop.model.visual)
    assert texts.count == STEPS + 1


def test_the_loop_with_an_extra_pass_takes_our_fare_step(tiny: ModelSpec, tmp_path: Path) -> None:
    data = MemoryData(dtype=torch.float64)
    method, gradient = ours(FARE, tiny, data, tmp_path)
    batch = data.batches()[0]
    loop = ExtraPass(method.model, EPS, STEP_SIZE, STEPS, lr=0.0)
    student = Calls(loop.student)
    loop.step(batch, same_start(batch))
    compare(gradient, loop.student)
    assert student.count == STEPS + 2


def test_points_stay_in_ball_and_box() -> None:
    images = torch.rand(4, 3, 8, 8)
    point = uphill(start_in_ball(images, 0.1), torch.randn_like(images), images, 0.1, 0.5)
    assert float((point - images).abs().max()) <= 0.1 + 1e-6
    assert 0 <= float(point.min()) and float(point.max()) <= 1


@pytest.mark.parametrize("kind", [TextEachStep, ExtraPass])
def test_the_callers_model_stays_as_it_is(kind: type, tiny: ModelSpec, data: MemoryData) -> None:
    method = TeCoA(tiny, attack=PGD(eps=EPS, step_size=STEP_SIZE, steps=1))
    before = copy.deepcopy(method.model.state_dict())
    texts = [["a cat", "a dog", "a ship"]] if kind is TextEachStep else []
    kind(method.model, *texts, EPS, STEP_SIZE, 1).step(data.batches()[0])
    assert all(torch.equal(value, before[name]) for name, value in method.model.state_dict().items())
