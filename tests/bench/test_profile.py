"""How often a step waits for the device, counted by the operations that need an answer; the same on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aft.attacks import PGD
from aft.batch import Batch
from aft.clip import ModelSpec
from aft.methods import FARE, AdversarialFineTuning, OptimizerSpec, TeCoA
from bench import profile as profiled
from bench.profile import Waits
from bench.speed.setting import tiny as small
from tests.conftest import MemoryData, make_trainer


def waits_of_a_step(kind: type[AdversarialFineTuning], tiny: ModelSpec, steps: int, folder: Path) -> int:
    """In the second training step: the first one makes the text bank."""
    method = kind(tiny, attack=PGD(eps="8/255", step_size="4/255", steps=steps), optimizer=OptimizerSpec(name="sgd", schedule="constant"))
    step, counted = method.training_step, []

    def watched(batch: Batch, batch_idx: int) -> Any:
        """Counts while it runs."""
        with Waits() as waits:
            loss = step(batch, batch_idx)
        counted.append(sum(waits.counts.values()))
        return loss

    method.training_step = watched  # type: ignore[method-assign]
    make_trainer(folder, max_steps=2, limit_val_batches=0).fit(method, datamodule=MemoryData())
    return counted[1]


@pytest.mark.parametrize("kind", [TeCoA, FARE])
def test_more_attack_steps_wait_no_more(kind: type[AdversarialFineTuning], tiny: ModelSpec, tmp_path: Path) -> None:
    """Nothing in the attack's loop asks for a number: a GPU is given the whole step at once."""
    few, many = (waits_of_a_step(kind, tiny, steps, tmp_path) for steps in (1, 5))
    assert few == many


def test_only_whole_steps_after_the_first_two_are_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four of them, each with all of its forwards; set-up, which encodes texts, is outside."""
    seen: list[int] = []

    class Context:
        """Stands for a profiler."""

        def __enter__(self) -> None:
            seen.append(len(calls))

        def __exit__(self, *error: object) -> None:
            seen.append(len(calls))

    calls: list[int] = []
    step = TeCoA.training_step
    monkeypatch.setattr(TeCoA, "training_step", lambda *given: (calls.append(1), step(*given))[1])
    profiled.steps_of(small(), 4, 1)(Context())
    assert seen == [2, 6] and len(calls) == 6


def test_the_page_has_the_usual_settings_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both models and the evaluation, with the largest operations and the waits of a step."""
    page = tmp_path / "page.md"
    page.write_text("<!-- bench.profile -->\n<!-- end of bench.profile -->\n")
    monkeypatch.setattr(profiled, "PAGE", page)
    for name in ("MINI", "BASE"):
        monkeypatch.setattr(profiled, name, small())
    profiled.main(["--batch_size", "4", "--images", "2", "--steps", "1"])
    assert "own time" not in page.read_text()
    monkeypatch.setattr(profiled, "an_evaluation", lambda images, steps: profiled.steps_of(small(), 2, 1))
    profiled.main([])
    text = page.read_text()
    assert all(part in text for part in ("MiniCLIP-32, batch 64", "ViT-B/32, batch 8", "evaluation, 32 images", "aten::addmm", "waits: "))


def test_a_wait_is_counted() -> None:
    with Waits() as waits:
        float(torch.ones(1))
        _ = torch.ones(3).nonzero()
        if torch.ones(1) > 0:
            pass
        values, mask = torch.arange(3), torch.tensor([True, False, True])
        _ = values[mask]
        values[mask] = 0
        _ = values[torch.tensor([0, 2])]  # a shape that is known
    assert waits.counts == {"aten::_local_scalar_dense": 2, "aten::nonzero": 1, "aten::index": 1, "aten::index_put_": 1}
