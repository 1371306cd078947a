"""Which images make which batch: the order of training (seeded, resumable, split over ranks) and of evaluation (exact, no padding).

Both are samplers whose items stand for whole batches; the data set beneath makes a batch at once, without work per image.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from aft.batch import Batch
from aft.errors import ConfigError, RunError
from datamodules.augment import Augment, apply, draw
from datamodules.images import ImageStore, in_unit_range

ORDER, AUGMENTATION = 0, 1  # separate streams of random numbers under one seed


@dataclass(frozen=True)
class BatchKey:
    """One batch: the samples, and where their random draws come from.

    Args:
        rows_B: ``int64 [B]``, places in the set.
        epoch, step: of training, from 0; the step counts within the epoch.
        start: place of the first sample in the global batch.
        total: samples in the global batch.
    """

    rows_B: Tensor
    epoch: int = 0
    step: int = 0
    start: int = 0
    total: int = 0


class TrainOrder(Sampler[BatchKey]):
    """A new permutation each epoch, cut into global batches, of which rank r of W takes the r-th part. The remainder is dropped.

    The global batches depend on (seed, epoch) and their size only; ``set_epoch`` is what Lightning calls.

    Args:
        count: training images.
        batch_size: images a process and step.
        seed: of the order and the augmentation.
        rank, world: this process among how many.

    Raises:
        ConfigError: fewer images than one global batch.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.count, self.batch_size, self.seed, self.rank, self.world = count, batch_size, seed, rank, world
        self.epoch = self.start = self.drawn = self.played = 0
        if len(self) == 0:
            raise ConfigError(f"batch_size = {batch_size} on {world} processes needs {batch_size * world} training images, "
                              f"but there are {count}: lower batch_size.")

    def __len__(self) -> int:
        return self.count // (self.batch_size * self.world)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation; another epoch than the one at hand begins at its first batch."""
        if epoch != self.epoch:
            self.epoch, self.start, self.drawn, self.played = epoch, 0, 0, 0

    def depends_on(self) -> dict[str, Any]:
        """The settings under which a place in the epoch means what it meant."""
        return {"images": self.count, "global_batch": self.batch_size * self.world, "seed": self.seed}

    def __iter__(self) -> Iterator[BatchKey]:
        first, self.start = self.start, 0
        order = torch.from_numpy(np.random.default_rng((self.seed, ORDER, self.epoch)).permutation(self.count))
        total, begin = self.batch_size * self.world, self.rank * self.batch_size
        for step in range(first, len(self)):
            place = step * total + begin
            yield BatchKey(order[place:place + self.batch_size], self.epoch, step, begin, total)


class ExactOrder(Sampler[BatchKey]):
    """Every sample once, in order: rank r of W takes r, r + W, ...; no padding, the last batch may be smaller.

    Args:
        count: samples of the set.
        batch_size: images a process and step.
        rank, world: this process among how many.
    """

    def __init__(self, count: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.batches = torch.arange(rank, count, world).split(batch_size) if rank < count else ()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[BatchKey]:
        return (BatchKey(rows_B) for rows_B in self.batches)


class Batches(Dataset[Batch]):
    """Makes the batch of a key: images from the store, their draws applied, float32 in [0, 1], or as bytes for a ``TrainLoader``.

    Args:
        images: the store.
        rows_N: ``int64 [N]``, which of its images belong to this set.
        labels_N, index_N: ``int64 [N]``, label (none where there are captions) and stable number of each.
        captions: a text for each image; none where there are labels.
        augment, padding, seed: of the augmentation; padding in pixels.
        as_bytes: leave images ``uint8``.
    """

    def __init__(self, images: ImageStore, rows_N: Tensor, labels_N: Tensor | None, index_N: Tensor, *,
                 captions: Sequence[str] | None = None, augment: Augment = "none", padding: int = 0, seed: int = 0,
                 as_bytes: bool = False) -> None:
        self.images, self.rows_N, self.labels_N, self.index_N, self.captions = images, rows_N, labels_N, index_N, captions
        self.augment, self.padding, self.seed, self.as_bytes = augment, padding, seed, as_bytes

    def __len__(self) -> int:
        return len(self.rows_N)

    def __getitem__(self, key: BatchKey) -> Batch:
        images_BCHW = self.images.take(self.rows_N[key.rows_B])
        if self.augment != "none":
            draws = draw(self.augment, key.total, self.padding, (self.seed, AUGMENTATION, key.epoch, key.step))
            images_BCHW = apply(images_BCHW, draws.part(key.start, key.start + len(key.rows_B)))
        labels_B = None if self.labels_N is None else self.labels_N[key.rows_B]
        captions = None if self.captions is None else [self.captions[row] for row in key.rows_B.tolist()]
        return Batch(images_BCHW if self.as_bytes else in_unit_range(images_BCHW), self.index_N[key.rows_B], labels_B, captions)


class TrainLoader(DataLoader[Batch]):
    """A DataLoader of whole batches whose place in the epoch is in the checkpoint: Lightning saves and restores it.

    Its processes make images of bytes, a quarter of what floats are: copying floats between processes took longer than decoding them.

    Iteration starts with the first batch asked for, not with ``iter()``: Lightning opens the iterator before it sets the epoch.

    Args:
        batches: what makes a batch of a key.
        order: the keys of an epoch.
        num_workers: processes that make batches; 0: this one.
        replay: how often each batch comes, in a row and with the same augmentation; it is made once.
        as_bytes: yield images as the bytes that they are made of; else float32 in [0, 1].

    Raises:
        RunError: resumed in the middle of an epoch, with another global batch, seed or number of images than then.
    """

    def __init__(self, batches: Dataset[Any], order: TrainOrder, num_workers: int = 0, replay: int = 1,
                 as_bytes: bool = False) -> None:
        super().__init__(batches, sampler=order, batch_size=None, num_workers=num_workers, persistent_workers=num_workers > 0,
                         worker_init_fn=leave_signals if num_workers else None)
        self.order, self.replay, self.as_bytes = order, replay, as_bytes
        self._saved_under = self.depends_on()

    def __len__(self) -> int:
        return len(self.order) * self.replay

    def depends_on(self) -> dict[str, Any]:
        """The settings under which a place in the epoch means what it meant."""
        return self.order.depends_on() | ({"replay": self.replay} if self.replay > 1 else {})

    def __iter__(self) -> Iterator[Batch]:
        if (self.order.start or self.order.played) and self._saved_under != self.depends_on():
            raise RunError(f"the checkpoint is in the middle of an epoch of {self._saved_under}, this run has "
                           f"{self.depends_on()}: keep these settings, or resume from a checkpoint at the end of an epoch.")
        self.order.drawn, first = self.order.start, self.order.played
        for batch in self.once():
            for turn in range(first, self.replay):
                self.order.played = (turn + 1) % self.replay
                self.order.drawn += not self.order.played
                yield batch
            first = 0

    def once(self) -> Iterator[Batch]:
        """Each batch of the epoch once."""
        return map(self.unpack, super().__iter__())

    def unpack(self, made: Any) -> Batch:
        """The batch out of what ``batches`` made."""
        return made if self.as_bytes else replace(made, images=in_unit_range(made.images))

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the batches already drawn in it, how often the last one was, and the settings that this place depends on."""
        return {"epoch": self.order.epoch, "drawn": self.order.drawn, "played": self.order.played, "of": self.depends_on()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the batches that were drawn. With other settings the next iteration raises, unless a new epoch begins first."""
        self.order.epoch = state["epoch"]
        self.order.start = self.order.drawn = state["drawn"]
        self.order.played = state.get("played", 0)  # not there in checkpoints of before replays
        self._saved_under = state["of"]


def leave_signals(worker: int) -> None:
    """In a loader's process: schedulers and Ctrl-C signal it together with the process that trains, which still needs its batches."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
