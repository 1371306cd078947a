"""The batch size that fits: found by trying, halved for what attacks hold beside, and no guess on a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aft.batch import EvaluationSet
from aft.clip import ZeroShotModel
from aft.clip.stages import Gate, Stage
from aft.errors import ConfigError, RunError
from aft.evaluation import Cell, fitting, plan
from aft.evaluation.fitting import attack_pass, half_of_what_fits, images_at_once
from tests.staged import defended, gated_blur, noisy


class Memory:
    """Room for so many images."""

    def __init__(self, room: int) -> None:
        self.room, self.tried = room, list[int]()

    def __call__(self, count: int) -> None:
        """Fails as torch does."""
        self.tried.append(count)
        if count > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("room", "wanted", "expected"), [(100, 10_000, 32), (64, 10_000, 32), (10_000, 10_000, 2048), (10_000, 50, 50)])
def test_half_of_the_largest_power_that_fits(room: int, wanted: int, expected: int) -> None:
    assert half_of_what_fits(Memory(room), wanted) == expected


def test_no_more_is_tried_than_is_there() -> None:
    memory = Memory(10_000)
    assert half_of_what_fits(memory, 20) == 20 and max(memory.tried) <= 64


def test_too_little_for_anything_is_said() -> None:
    with pytest.raises(RunError, match="out of memory"):
        half_of_what_fits(Memory(3), 100)


def test_other_faults_come_out_as_they_are() -> None:
    def broken(count: int) -> None:
        raise ValueError("no such layer")

    with pytest.raises(ValueError, match="no such layer"):
        half_of_what_fits(broken, 100)


def test_a_number_holds_and_a_cpu_takes_the_default(model: ZeroShotModel, data: EvaluationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell(model, data, plan("clean", eps=0, steps=1, targets=1, classes=len(data.class_names)))
    assert images_at_once(7, cell) == 7
    assert images_at_once("auto", cell) == min(100, len(cell.data))
    monkeypatch.setattr(fitting, "ON_A_CPU", 3)
    assert images_at_once("auto", cell) == 3
    with pytest.raises(ConfigError, match="batch_size = 0"):
        images_at_once(0, cell)


def test_a_pass_is_that_of_an_attack_which_knows_the_defence(model: ZeroShotModel, data: EvaluationSet) -> None:
    """A random defence gets its draw, and a smooth form is differentiated for all images, whatever their gates say."""
    smoothed: list[int] = []

    def smooth(x: torch.Tensor, draw: object) -> torch.Tensor:
        """Notes how many there are."""
        smoothed.append(len(x))
        return x * 1

    spared = replace(gated_blur(1e-3), smooth=smooth, gate=lambda x, draw: Gate(x.flatten(1).mean(1) - 2, 1e-3))
    for stage in (None, noisy(0.02), spared):
        behind = model if stage is None else defended(model, pixels=stage)
        cell = Cell(behind, data, plan("oblivious" if stage else "pgd", eps=0.01, steps=1, targets=1, classes=len(data.class_names)))
        attack_pass(cell)(3)
    assert smoothed == [3]


def test_no_size_is_chosen_for_a_defence_whose_figures_it_changes(model: ZeroShotModel, data: EvaluationSet) -> None:
    """Two machines would give two figures under one cell."""
    coupled = Stage(lambda x, draw: x - x.mean(0) + 0.5, batch_coupled=True)
    cell = Cell(defended(model, pixels=coupled), data, plan("oblivious", eps=0.01, steps=1, targets=1, classes=len(data.class_names)))
    assert images_at_once(7, cell) == 7
    with pytest.raises(ConfigError, match="batch_size = auto.*depends on its neighbours"):
        images_at_once("auto", cell)
