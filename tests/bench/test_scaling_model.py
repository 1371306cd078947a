"""The model of many GPUs: its limits, and torch's buckets."""

from __future__ import annotations

import pytest

from bench.scaling_model import Network, Step, buckets_of, sent

NETWORK = Network(bandwidth=1e9, latency=1e-6)
STEP = Step(compute=0.1, backward=0.04, buckets=[2e7] * 5)


def test_one_process_sends_nothing() -> None:
    assert NETWORK.all_reduce(1e9, 1) == 0 and STEP.efficiency(NETWORK, 1, 0.0) == 1 and sent("allreduce", 8, 1) == 0


def test_an_all_reduce_nears_twice_its_bytes() -> None:
    """2 (n - 1) / n: the bytes themselves on two processes, twice as many on very many; and latency on top."""
    still = Network(1e9, 0.0)
    assert still.all_reduce(1e9, 2) == pytest.approx(1.0) and still.all_reduce(1e9, 10**6) == pytest.approx(2.0, rel=1e-5)
    assert NETWORK.all_reduce(0, 8) == pytest.approx(14e-6) and Network(1e9, 1e-6, "tree").all_reduce(0, 512) == pytest.approx(18e-6)


def test_without_overlap_all_of_it_waits_and_with_overlap_what_is_left_after_the_backward_pass() -> None:
    """On two processes 5 x 20 ms of transfers, of which 32 ms fit behind the 40 ms of the backward pass (the first is ready at 8)."""
    still = Network(1e9, 0.0)
    assert STEP.seconds(still, 2, 0.0) == pytest.approx(0.1 + 0.1)
    assert STEP.seconds(still, 2, 1.0) == pytest.approx(0.1 + 0.1 - 0.032)
    assert STEP.seconds(Network(1e12, 0.0), 2, 1.0) == pytest.approx(0.1 + 2e-5)  # the last bucket has nothing to hide behind


def test_attack_steps_scale_better() -> None:
    """More computing for the same bytes."""
    longer = Step(compute=0.3, backward=0.04, buckets=STEP.buckets)
    assert all(longer.efficiency(NETWORK, n, 0.5) > STEP.efficiency(NETWORK, n, 0.5) for n in (2, 8, 64, 512))


def test_gathers_cost() -> None:
    """(n - 1) times the bytes of one process."""
    gathering = Step(0.1, 0.04, STEP.buckets, gathers=[1e6])
    assert gathering.seconds(Network(1e9, 0.0), 8, 1.0) - STEP.seconds(Network(1e9, 0.0), 8, 1.0) == pytest.approx(7e-3)


def test_buckets_are_filled_from_the_end() -> None:
    assert buckets_of([30, 10, 10, 5], first=10, cap=20) == [15, 40]
    assert sum(buckets_of([3, 1, 4, 1, 5], 4, 6)) == 14 and buckets_of([]) == []
