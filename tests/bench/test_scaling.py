"""Two processes: what is counted on the wire is what parameters and embeddings say; the link is found from its transfers."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import scaling
from bench.scaling_model import Network


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
