"""What autograd holds is counted exactly, and methods hold what their forwards say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from aft.clip import ModelSpec
from bench import memory


def test_saved_bytes_are_those_of_the_activations() -> None:
    """A chain of products: each layer keeps its input (weights and images are not counted), and after the backward pass nothing is held."""
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Sigmoid()) for _ in range(3)))
    x = torch.rand(4, 8)
    known = {t.untyped_storage().data_ptr() for t in (*layers.parameters(), x)}
    with memory.saving(known) as saved:
        loss = layers(x).sum()
        assert saved.now == saved.most == 3 * 4 * 8 * 4  # the sigmoid's output is the next layer's input: one storage
        loss.backward()
        del loss
    assert saved.now == 0


def test_the_peak_is_of_what_is_held_at_once() -> None:
    """Two graphs, one after the other, hold as much as one; side by side twice as much."""
    def one(x: torch.Tensor) -> torch.Tensor:
        return x.sigmoid().sum()

    x = torch.rand(1000, requires_grad=True)
    with memory.saving({x.untyped_storage().data_ptr()}) as apart:
        for _ in range(2):
            one(x).backward()
    with memory.saving({x.untyped_storage().data_ptr()}) as together:
        (one(x) + one(x)).backward()
    assert (apart.most, together.most) == (4000, 8000)


@pytest.mark.filterwarnings("ignore")
def test_methods_hold_what_their_views_are(tiny: ModelSpec) -> None:
    """TeCoA holds what plain fine-tuning holds, PMG-AFT two views of it; recomputing holds less; a teacher stays between steps."""
    found = {name: memory.measured(name, tiny, 32, 4, less=False) for name in ("plain", "TeCoA", "PMGAFT")}
    less = memory.measured("plain", tiny, 32, 4, less=True)
    plain = found["plain"]["saved"]
    assert plain and found["TeCoA"]["saved"] == pytest.approx(plain, rel=0.02)
    assert found["PMGAFT"]["saved"] == pytest.approx(2 * plain, rel=0.05)
    assert less["saved"] < 0.6 * plain
    assert found["PMGAFT"]["kept"] > found["TeCoA"]["kept"] == found["plain"]["kept"]
    assert all(one["allocated"] >= one["saved"] for one in found.values())


@pytest.mark.filterwarnings("ignore")
def test_gradients_of_the_step_before_are_kept(tiny: ModelSpec, tmp_path: Path) -> None:
    """Of plain fine-tuning by AdamW: the whole model, and of each weight that learns two moments and one gradient."""
    found = memory.measured("plain", tiny, 32, 4, less=False)
    method = memory.make("plain", tiny)
    whole, learning = ([p.nbytes for p in method.parameters() if p.requires_grad or every] for every in (True, False))
    buffers = sum(b.nbytes for b in method.buffers())
    assert found["kept"] == pytest.approx(sum(whole) + buffers + 3 * sum(learning), rel=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["plain", "PMGAFT"])
def test_gradients_that_are_freed_make_room(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Late in the backward pass a step holds the same, whether the last step's gradients were there when it began or not."""
    there = memory.measured(name, ModelSpec("miniclip32"), 32, 2, less=False)
    start = memory.Measure.on_train_batch_start

    def without(self: memory.Measure, trainer: L.Trainer, module: L.LightningModule, batch: Any, place: int) -> None:
        """The step before leaves none."""
        module.zero_grad()
        start(self, trainer, module, batch, place)

    monkeypatch.setattr(memory.Measure, "on_train_batch_start", without)
    gone = memory.measured(name, ModelSpec("miniclip32"), 32, 2, less=False)
    assert there["kept"] - gone["kept"] > 10e6
    assert there["kept"] + there["allocated"] == pytest.approx(gone["kept"] + gone["allocated"], rel=0.02)


def test_blocks_of_before_make_no_room() -> None:
    """Out of order: 100 bytes, an end without its beginning, 50 more at once, and 30 after the first are gone."""
    changes = [(1, 11, 100), (2, 12, -40), (4, 11, -100), (3, 13, 50), (5, 14, 30)]
    assert memory.highest(changes) == 150


def test_the_command_shows_and_keeps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each method both ways, with its ratios to plain; a file elsewhere leaves the page as it is."""
    one = {"saved": 2_000_000, "allocated": 3_000_000, "kept": 1_000_000}
    monkeypatch.setattr(memory, "measured", lambda name, *given: {**one, "saved": one["saved"] * (1 + (name == "PMGAFT"))})
    monkeypatch.setattr(memory, "growth", lambda steps: {"per_step": {"tensors": 0.0}, "census": []})
    page = memory.PAGE.read_bytes()
    told = memory.main(["--quick", "--out", str(tmp_path / "memory.json")])
    assert json.loads((tmp_path / "memory.json").read_text()) == told and memory.PAGE.read_bytes() == page
    shown = capsys.readouterr().out
    assert "PMGAFT, recomputed" in shown and "2.00" in shown and "left behind by a step: tensors 0" in shown
