"""Rows of what speeds a step up: what is timed, and by whose matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aft.clip import matmul
from aft.clip.attention import unfold_attention
from aft.clip.patches import embed_by_convolution
from bench.speed import compilation, tricks
from bench.speed.row import Effort, NotHere
from bench.speed.rows import ROWS
from bench.speed.setting import tiny

QUICK = Effort(quick=True)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch, on_amd: None) -> Iterator[list[str]]:
    """The tiny model by oneDNN's products; whose products each pass was made by."""
    seen: list[str] = []
    before, attack_pass = matmul.products(), tricks.attack_pass

    def noted(tower: nn.Module, images_BCHW: Tensor) -> Tensor:
        """The pass, noted."""
        seen.append(matmul.products())
        return attack_pass(tower, images_BCHW)

    for module in (tricks, compilation):
        monkeypatch.setattr(module, "MINI", tiny())
        monkeypatch.setattr(module, "attack_pass", noted)
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    assert matmul.use_onednn()
    yield seen
    if before == "torch":
        matmul.use_torch()


def test_compiled_and_eager_multiply_alike(used: list[str]) -> None:
    """Compiled code cannot go to oneDNN: nor does the other side."""
    torch._dynamo.reset()
    found = compilation.measured(QUICK)
    assert set(used) == {"torch"} and found.told["products"] == "torch" and matmul.products() == "onednn"


@pytest.mark.parametrize("undo", [unfold_attention, embed_by_convolution])
def test_only_one_side_is_taken_back(undo: Callable[[nn.Module], None], used: list[str]) -> None:
    """By the products that the row says."""
    kinds: list[set[type]] = []

    def noted(tower: nn.Module) -> None:
        """Before and after."""
        kinds.append({type(module) for module in tower.modules()})
        undo(tower)
        kinds.append({type(module) for module in tower.modules()})

    found = tricks.undone(noted, tiny(), 4, 2)(QUICK)
    assert len(kinds) == 2 and kinds[0] != kinds[1]
    assert set(used) == {"onednn"} and found.told["products"] == "onednn"
    used.clear()
    found = tricks.undone(noted, tiny(), 4, 2, matmul.torchs_products)(QUICK)
    assert set(used) == {"torch"} and found.told["products"] == "torch" and matmul.products() == "onednn"


def test_each_side_of_onednn_is_what_it_says(used: list[str]) -> None:
    """Torch's without, oneDNN's with, in the order of the turns."""
    tricks.onednn(QUICK)
    assert used == ["onednn", "torch", "torch", "onednn"] * 2 and matmul.products() == "onednn"


def test_an_error_leaves_products_as_they_were(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(tower: nn.Module, images_BCHW: Tensor) -> None:
        raise MemoryError

    for module in (tricks, compilation):
        monkeypatch.setattr(module, "attack_pass", fails)
    for row in (tricks.onednn, tricks.undone(unfold_attention, tiny(), 4, 2, matmul.torchs_products), compilation.measured):
        with pytest.raises((MemoryError, NotHere)):
            row(QUICK)
        assert matmul.products() == "onednn"


def test_what_comes_before_a_pass_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by what is done: a pass takes a second, what comes before it ten."""
    clock = [0.0]

    def takes(seconds: float) -> Callable[[], None]:
        """So long."""
        return lambda: clock.append(clock[-1] + seconds)

    monkeypatch.setattr(tricks, "time", SimpleNamespace(perf_counter=lambda: clock[-1]))
    switches = {name: takes(10) for name in ("without", "with")}
    found = tricks.without_over_with(takes(2), takes(1), QUICK, 2, {}, switches)
    assert set(found.parts["without"]) == {2.0} and set(found.parts["with"]) == {1.0} and set(found.values) == {2.0}


def test_a_long_compilation_is_ended_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "LIMIT", 0.5)
    with pytest.raises(NotHere, match="compilation took more than"):
        compilation.compiled(QUICK)


def test_the_other_process_says_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its figures, or why there are none; its cache is empty and its own."""
    caches = []

    def instead(command: list[str], limit: float, env: dict[str, str]) -> str:
        """The same in this process, by a compiler that compiles nothing."""
        caches.append(env["TORCHINDUCTOR_CACHE_DIR"])
        monkeypatch.setattr(compilation, "MINI", tiny())
        monkeypatch.setattr(compilation, "BACKEND", backend)
        compilation.main(*command[3:])
        return ""

    def fails(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> None:
        """No compiler."""
        raise FileNotFoundError

    monkeypatch.setattr(compilation, "to_the_end", instead)
    (row,) = (row for row in ROWS if row.name == "compiled")
    backend: Any = "eager"
    found = row.measure(QUICK)
    assert len(found.values) == 2 and found.told["products"] == "torch"
    torch._dynamo.reset()
    backend = fails
    with pytest.raises(NotHere, match="does not work here"):
        row.measure(QUICK)
    assert len(set(caches)) == 2
