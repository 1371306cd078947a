"""How efficient data-parallel training on n GPUs is, from bytes and operations: a model with its assumptions in one place.

A step computes for ``compute`` seconds, the last ``backward`` of which are the training backward pass; the attack before it needs no
communication. Gradients leave in buckets, in the order in which the backward pass makes them, over one channel, each by a ring
all-reduce: ``2 (n - 1) / n * bytes / bandwidth + hops * latency``. A share ``overlap`` of the time in which the channel works during the
backward pass is hidden behind it; what is left waits at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Network:
    """What connects the processes.

    Args:
        bandwidth: bytes a second that one process sends (and receives at the same time).
        latency: seconds of one hop.
        hops: ``ring``: ``2 (n - 1)`` hops an all-reduce; ``tree``: ``2 log2 n``, what libraries take for many processes.
    """

    bandwidth: float
    latency: float
    hops: Literal["ring", "tree"] = "ring"

    def all_reduce(self, size: float, n: int) -> float:
        """Seconds of an all-reduce of so many bytes over n processes; none on one."""
        if n == 1:
            return 0.0
        hops = 2 * (n - 1) if self.hops == "ring" else 2 * math.ceil(math.log2(n))
        return 2 * (n - 1) / n * size / self.bandwidth + hops * self.latency

    def gather(self, size: float, n: int) -> float:
        """Seconds of an all-gather of so many bytes of each process: ``(n - 1) bytes / bandwidth``, and the hops of half an all-reduce."""
        return (n - 1) * size / self.bandwidth + self.all_reduce(0, n) / 2


@dataclass(frozen=True)
class Step:
    """One training step of one process.

    Args:
        compute: seconds without any communication.
        backward: of these, the training backward pass, which is last.
        buckets: bytes of each bucket of gradients, in the order in which they are ready; each is ready when its share is made.
        gathers: bytes of each gather, of this process; nothing hides them.
    """

    compute: float
    backward: float
    buckets: Sequence[float]
    gathers: Sequence[float] = ()

    def seconds(self, network: Network, n: int, overlap: float) -> float:
        """Of the step on n processes.

        Args:
            network: what connects them.
            n: processes.
            overlap: share of a transfer under the backward pass that costs nothing: 0 where the same cores transfer and compute.
        """
        ready, free, hidden, total, made = 0.0, 0.0, 0.0, 0.0, 0.0
        whole = sum(self.buckets)
        for size in self.buckets:
            made += size
            ready = self.backward * made / whole
            lasts = network.all_reduce(size, n)
            began = max(ready, free)
            free = began + lasts
            total += lasts
            hidden += max(0.0, min(free, self.backward) - began)
        exposed = total - overlap * hidden
        return self.compute + exposed + sum(network.gather(size, n) for size in self.gathers)

    def efficiency(self, network: Network, n: int, overlap: float) -> float:
        """``compute / seconds``: the share of n processes' work that is training."""
        return self.compute / self.seconds(network, n, overlap)


def buckets_of(sizes: Sequence[int], first: int = 2**20, cap: int = 25 * 2**20) -> list[int]:
    """Bytes of DDP's buckets for parameters of these bytes, given in the order of the model: filled from the last one on.

    A bucket closes when it has reached its cap: 1 MiB for the first, 25 MiB for the others (torch's defaults).
    """
    buckets, now = [], 0
    for size in reversed(sizes):
        now += size
        if now >= (first if not buckets else cap):
            buckets.append(now)
            now = 0
    return [*buckets, now] if now else buckets


def sent(op: str, size: float, n: int) -> float:
    """Bytes that one process sends for a collective over ``size`` bytes of its own, by ring.

    ``allreduce: 2 (n - 1) / n size``, ``allgather: (n - 1) size``, ``broadcast: size`` at most; ``scatter``, ``alltoall`` and
    ``reduce_scatter``, all but the process's own part: ``(n - 1) / n size``.
    """
    others = (n - 1) / n
    factor = {"allreduce": 2 * others, "allgather": n - 1, "broadcast": 1, "scatter": others, "alltoall": others, "reduce_scatter": others}
    return factor[op] * size
