"""Two processes: what is counted on the wire is what parameters and embeddings say; the link is found from its transfers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aft.errors import RunError
from bench import scaling, scaling_two
from bench.scaling_model import Network
from bench.speed import processes
from bench.speed.row import Effort


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bytes_on_the_wire_are_those_of_gradients_and_gathers(tmp_path: Path) -> None:
    """By hook and dispatcher, for a method that couples no samples and for one that does; every kind of step was timed."""
    found = scaling.run_two(tmp_path, quick=True)
    one, other = scaling.wire(found)
    for row in (one, other):
        assert row["by_hook"] == row["gradients"] > 0 and row["gathers_counted"] == row["gathers_expected"]
        assert row["collectives"]["allreduce"] >= row["gradients"] and row["sent"] >= row["gradients"]
    assert one["method"] == "TeCoA" and one["gathers_counted"] == 0 and other["gathers_counted"] > 0
    assert all(len(seconds) == 2 and min(seconds) > 0 for kinds in found["steps"].values() for seconds in kinds.values())
    assert len(scaling.compared(found, scaling.fitted(found["transfers"]))) == 1


def test_every_kind_comes_first_in_turn(tmp_path: Path) -> None:
    """Each once a turn, and each first equally often; the data has the images that the clock takes them for."""
    steps = [scaling_two.kind_at(step) for step in range(9)]
    assert all(sorted(steps[turn:turn + 3]) == sorted(scaling_two.KINDS) for turn in (0, 3, 6))
    assert sorted(steps[::3]) == sorted(scaling_two.KINDS)
    data = scaling_two.Turns(8, 3)
    data.trainer = SimpleNamespace(global_rank=0)  # type: ignore[assignment]
    assert [len(batch.images) for batch in data.train_dataloader()] == [8 if kind == "alone" else 4 for kind in steps]


def test_a_step_has_taken_as_long_as_its_slower_process() -> None:
    """But for those of the first process alone, when the second one is done at once."""
    first, second = {"synced": [1.0, 4.0], "alone": [5.0, 6.0]}, {"synced": [3.0, 2.0], "alone": [9.0, 9.0]}
    assert scaling.as_the_slower(first, second) == {"synced": [3.0, 4.0], "alone": [5.0, 6.0]}


def test_gradients_are_compared_by_the_largest_entry_and_only_where_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """.5 off where the largest is 4; a gradient that is not a number is not equal to another, and is refused by name of what to look at."""
    given = {1: [4.0, 1.0], 2: [4.0, 1.5]}

    def start(job: str, processes: int, folder: Path, steps: int = 1) -> None:
        """As a job leaves it."""
        torch.save({"weight": torch.tensor(given[processes])}, folder / f"{job}-{processes}.pt")

    monkeypatch.setattr(processes, "start", start)
    assert processes.same_gradients(Effort()).values == [0.125]
    for broken in (1, 2):
        monkeypatch.setitem(given, broken, [4.0, float("nan")])
        with pytest.raises(RunError, match="not finite"):
            processes.same_gradients(Effort())
        monkeypatch.setitem(given, broken, [4.0, 1.0])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_are_held_against_one_with_the_same_batch() -> None:
    """Twice the slower process's step over the step alone, turn by turn."""
    found = processes.overhead(Effort(quick=True))
    assert found.values == [2 * two / one for two, one in zip(found.parts["synced"], found.parts["alone"], strict=True)]
    assert len(found.values) == 2 and found.told["all_reduce"] > 0 and found.told["global_batch"] == 64


def test_the_link_is_found_from_its_transfers() -> None:
    """Bandwidth and latency that made the times come out again."""
    link = Network(2e9, 50e-6)
    found = scaling.fitted({str(size): [link.all_reduce(size, 2)] * 3 for size in (2**12, 2**18, 2**24)})
    assert found.bandwidth == pytest.approx(2e9, rel=1e-6) and found.latency == pytest.approx(50e-6, rel=1e-6)


def test_the_model_of_many() -> None:
    """More attack steps and faster links are more efficient, more GPUs less; gradients are the image tower's, in fp32."""
    rows = {(row["model"], row["attack_steps"]): row for row in scaling.many()}
    assert rows["ViT-B-32", 0]["bytes"] == pytest.approx(4 * 87.8e6, rel=0.01)
    for model, _ in scaling.MODELS:
        some, none = (rows[model, k]["efficiency"] for k in (10, 0))
        assert all(0 < none[at][hops] < some[at][hops] < 1 for at in none for hops in ("ring", "tree"))
        near, far = (some[f"{n}, a 200 Gb/s card a GPU"]["tree"] for n in (64, 512))
        assert some["8, in a node"]["tree"] > near > far > some["512, one 100 Gb/s card a node"]["tree"]
