"""Training batches from shards: each reader holds one window of encoded samples and decodes the batches of it.

Shapes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from aft.batch import Batch
from aft.errors import DataError
from datamodules.augment import Augment, apply, draw
from datamodules.images import DAMAGED, decode, other_size
from datamodules.manifest import Location, Manifest
from datamodules.order import AUGMENTATION, BatchKey, TrainLoader
from datamodules.shard_order import ShardOrder
from datamodules.shard_reader import Sample, read_shard


@dataclass(frozen=True)
class Decoded:
    """One good sample: ``uint8 [3, H, W]``, and its label or caption."""

    sample: Sample
    pixels_CHW: np.ndarray
    label: int | None
    caption: str | None


class ShardBatches(Dataset[tuple[Batch, list[str]]]):
    """Makes the batch of a key from a stream, images as bytes; together with it, what was damaged.

    The place of a damaged sample is taken by a good one of the same batch (of the same window, where a batch has none), so that
    every process makes every step with whole batches and the samples of all other batches stay where they are.

    Args:
        location, manifest: the shards.
        order: what a key stands for.
        image_size: side to fit every image to, pixels; none: all images have one size.
        max_pixels: most pixels that an image's header may announce.
        augment, padding: of the augmentation; padding in pixels.
    """

    def __init__(self, location: Location, manifest: Manifest, order: ShardOrder, *, image_size: int | None, max_pixels: int,
                 augment: Augment, padding: int) -> None:
        self.location, self.manifest, self.order = location, manifest, order
        self.image_size, self.max_pixels, self.augment, self.padding = image_size, max_pixels, augment, padding
        self._forget()

    def _forget(self) -> None:
        self._held: tuple[int, ...] = ()
        self._samples: list[Sample] = []
        self._next: tuple[int, ...] = ()
        self._stream: Iterator[Sample] = iter(())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": (), "_samples": [], "_next": (), "_stream": None}

    def __getitem__(self, key: BatchKey) -> tuple[Batch, list[str]]:
        lane, window, place = self.order.find(key.step)
        samples = self._window(key.epoch, lane, window)
        size = self.order.batch_size
        good, damaged = self._decode_all(samples[place * size:(place + 1) * size])
        if not good:
            good = list(islice(self._decode_all(samples, 1)[0], 1))
        if not good:
            raise DataError(f"{len(samples)} samples in a row are damaged ({'; '.join(damaged[:3])} ...): make the shards again.")
        chosen = list(islice(cycle(good), size))
        return self._batch(chosen, key), damaged

    def _batch(self, chosen: list[Decoded], key: BatchKey) -> Batch:
        for one in chosen:
            if one.pixels_CHW.shape != chosen[0].pixels_CHW.shape:
                raise other_size(one.sample.name, one.pixels_CHW.shape[1:], chosen[0].pixels_CHW.shape[1:])
        images_BCHW = torch.from_numpy(np.stack([one.pixels_CHW for one in chosen]))
        if self.augment != "none":
            draws = draw(self.augment, key.total, self.padding, (self.order.seed, AUGMENTATION, key.epoch, key.step))
            images_BCHW = apply(images_BCHW, draws.part(key.start, key.start + len(chosen)))
        index_B = torch.tensor([one.sample.index for one in chosen])
        labels = [one.label for one in chosen if one.label is not None]
        captions = [one.caption for one in chosen if one.caption is not None]
        return Batch(images_BCHW, index_B, torch.tensor(labels) if labels else None, captions or None)

    def _window(self, epoch: int, lane: int, window: int) -> list[Sample]:
        """The samples of a window in the order of use; read on from the one before it, or from where it begins."""
        if self._held != (epoch, lane, window):
            size = self.order.batches_a_window * self.order.batch_size
            if self._next != (epoch, lane, window):
                self._stream = self._read(epoch, lane, window * size)
            self._held, self._samples = (), []  # free one window before the next is read
            samples = list(islice(self._stream, size))
            self._samples = [samples[place] for place in self.order.shuffled(epoch, lane, window, len(samples))]
            self._held, self._next = (epoch, lane, window), (epoch, lane, window + 1)
        return self._samples

    def _read(self, epoch: int, lane: int, skip: int) -> Iterator[Sample]:
        for piece in self.order.pieces(epoch, lane, skip):
            yield from read_shard(self.location, self.manifest.shards[piece.shard], piece.first, piece.last)

    def _decode_all(self, samples: list[Sample], enough: int | None = None) -> tuple[list[Decoded], list[str]]:
        """The good ones (``enough`` of them, if given), and names and reasons of the damaged ones."""
        good, damaged = [], []
        for sample in samples:
            try:
                good.append(self._decode(sample))
            except DAMAGED as error:
                damaged.append(f"{sample.name} ({error})")
            if len(good) == enough:
                break
        return good, damaged

    def _decode(self, sample: Sample) -> Decoded:
        pixels_CHW = decode(sample.image(), self.image_size, self.max_pixels)
        if self.manifest.classes is None:
            return Decoded(sample, pixels_CHW, None, sample.caption())
        return Decoded(sample, pixels_CHW, sample.label(len(self.manifest.classes)), None)


class ShardLoader(TrainLoader):
    """A resumable loader over shards that counts damaged samples and stops when there are too many.

    Args:
        batches: what makes a batch of a key.
        num_workers: processes that read and decode; 0: this one.
        max_bad_share: largest share of this process's samples of an epoch that may be damaged, 0 to 1.
        replay: how often each batch comes, in a row; it is read and counted once.
        as_bytes: as ``TrainLoader``.

    Raises:
        DataError: more than that.
        RunError: as ``TrainLoader``.
    """

    def __init__(self, batches: ShardBatches, num_workers: int, max_bad_share: float, replay: int = 1,
                 as_bytes: bool = False) -> None:
        super().__init__(batches, batches.order, num_workers, replay, as_bytes)
        self.max_bad_share, self.skipped, self._epoch = max_bad_share, 0, 0

    def unpack(self, made: tuple[Batch, list[str]]) -> Batch:
        """The batch; what was damaged is counted, but not again for a batch in whose replay a resume lies."""
        batch, damaged = made
        if not self.order.played:
            self._count(damaged)
        return super().unpack(batch)

    def _count(self, damaged: list[str]) -> None:
        """Adds to this epoch's count; a line at 1, 2, 4, 8 ... damaged samples."""
        if self._epoch != self.order.epoch:
            self._epoch, self.skipped = self.order.epoch, 0
        before, self.skipped = self.skipped, self.skipped + len(damaged)
        of = len(self.order) * self.order.batch_size
        text = (f"process {self.order.rank}: {self.skipped} of its {of} samples of epoch {self._epoch} are damaged so far: "
                f"{'; '.join(damaged[:3])}{' ...' if len(damaged) > 3 else ''}")
        if self.skipped > self.max_bad_share * of:
            raise DataError(f"{text}. At most a share of {self.max_bad_share} is skipped: mend the shards, or raise max_bad_share.")
        if self.skipped.bit_length() > before.bit_length():
            warnings.warn(f"{text}. They are skipped; good ones of the same batch take their places.", stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """As ``TrainLoader``, and how many samples of this epoch were damaged."""
        return {**super().state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the batches that were drawn, and with their count of damaged samples."""
        super().load_state_dict(state)
        self._epoch, self.skipped = state["epoch"], state["skipped"]
