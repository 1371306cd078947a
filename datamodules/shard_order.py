"""Which process and which worker reads which part of which shard: exact, even, and a function of (seed, epoch) alone.

Once an epoch the shards are put in a random order and their samples on one line. The line is cut into stretches, one a rank and lane
(a lane is what one worker reads), each as long as the batches that this lane makes; what is left at the end is dropped. So every rank
makes the same number of batches, no sample comes twice, and a lane reads its shards from the beginning to the end, two of them in part.
Within a stretch samples are shuffled in windows. Any batch can be found from (epoch, step), so a resumed run goes on exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aft.errors import ConfigError
from datamodules.order import ORDER, BatchKey, TrainOrder

SHARDS, WINDOW = 0, 1  # separate streams of random numbers


@dataclass(frozen=True)
class Piece:
    """The samples ``first`` to ``last`` of one shard (its place among all)."""

    shard: int
    first: int
    last: int


class ShardOrder(TrainOrder):
    """The batches of an epoch over shards; a key names epoch and step alone, the reader finds the samples.

    Args:
        counts: samples of each shard.
        batch_size: images a process and step.
        seed: of the order.
        rank, world: this process among how many, given by the caller: no environment variable is read.
        workers: processes of this rank that read; 0: itself.
        window: samples shuffled together; at least a batch.

    Raises:
        ConfigError: fewer images than one global batch, or fewer shards than readers.
    """

    def __init__(self, counts: Sequence[int], batch_size: int, seed: int, rank: int = 0, world: int = 1, *, workers: int = 0,
                 window: int = 2048) -> None:
        super().__init__(sum(counts), batch_size, seed, rank, world)
        self.counts, self.lanes = tuple(counts), max(1, workers)
        self.batches_a_window = max(1, window // batch_size)
        if len(counts) < world * self.lanes:
            raise ConfigError(f"{len(counts)} shards are too few for {world} processes with num_workers = {workers}: each of the "
                              f"{world * self.lanes} readers needs one. Lower num_workers, or make more shards (--per-shard).")

    def depends_on(self) -> dict[str, Any]:
        """The settings under which a place in the epoch means what it meant; here also who reads what."""
        return {**super().depends_on(), "shards": len(self.counts), "processes": self.world, "readers": self.lanes,
                "window": self.batches_a_window}

    def __iter__(self) -> Iterator[BatchKey]:
        first, self.start = self.start, 0
        for step in range(first, len(self)):
            yield BatchKey(torch.empty(0, dtype=torch.long), self.epoch, step, self.rank * self.batch_size, self.batch_size * self.world)

    def stretch(self, lane: int) -> tuple[int, int]:
        """Where the part of a lane of this rank begins and ends on the line of all samples."""
        sizes = [len(range(one, len(self), self.lanes)) * self.batch_size for one in range(self.lanes)]
        begin = self.rank * len(self) * self.batch_size + sum(sizes[:lane])
        return begin, begin + sizes[lane]

    def pieces(self, epoch: int, lane: int, skip: int = 0) -> Iterator[Piece]:
        """What a lane reads in an epoch, in order, after the first ``skip`` samples."""
        begin, end = self.stretch(lane)
        begin += skip
        order = np.random.default_rng((self.seed, ORDER, epoch, SHARDS)).permutation(len(self.counts))
        place = 0
        for shard in order.tolist():
            first, last = max(0, begin - place), min(self.counts[shard], end - place)
            if first < last:
                yield Piece(shard, first, last)
            place += self.counts[shard]

    def find(self, step: int) -> tuple[int, int, int]:
        """Lane and window that a step's batch lies in, and which of the window's batches it is."""
        lane, turn = step % self.lanes, step // self.lanes
        return lane, turn // self.batches_a_window, turn % self.batches_a_window

    def shuffled(self, epoch: int, lane: int, window: int, count: int) -> np.ndarray:
        """The order in which the ``count`` samples of a window are used."""
        return np.random.default_rng((self.seed, ORDER, epoch, WINDOW, self.rank, lane, window)).permutation(count)
