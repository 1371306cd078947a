"""WebDataset shards as a datamodule: streamed for training, read by place for validation and evaluation."""

from __future__ import annotations

from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from aft.batch import Batch, CaptionedSet, EvaluationSet
from aft.clip.prompts import warn_of_duplicates
from aft.errors import ConfigError, DataError, unknown_name
from datamodules import manifest as manifests
from datamodules.common import ImageData, check_least
from datamodules.images import ImageStore, load
from datamodules.manifest import Location, Manifest, Verify
from datamodules.order import Batches, ExactOrder
from datamodules.shard_order import ShardOrder
from datamodules.shard_reader import ShardIndex
from datamodules.shard_stream import ShardBatches, ShardLoader

Split = Literal["train", "holdout", "test"]


class Shards(ImageData):
    """Tars of ``key.jpg`` (png, webp) with ``key.cls`` or ``key.txt``, and a ``manifest.json`` beside them; satisfies ``ClassData``.

    ``python -m datamodules.convert`` makes them. Training reads them as streams, local or remote; held-out and test shards are local.
    An epoch is a function of (seed, epoch, processes, workers); it is exact, resumable, and equally long on every process: each
    sample comes once, but for the remainder of (samples / global batch), the end of that epoch's last shard, which is dropped.
    Shards of captions yield ``Batch.captions`` and have an empty class list ``train``.

    Args:
        train: folder or URL of the training shards; in a URL ``{}`` stands for the file name, without it the name comes last.
            URLs are read with fsspec (``s3://`` needs the package s3fs, ``gs://`` gcsfs); a connection that fails is tried again.
        holdout: folder of shards with held-out training images to validate on; none: no validation.
        test: folder of shards with the test images; none: there is no test set.
        name: id of the data set in result files; none: the last part of ``train``.
        window: samples that a reader shuffles together; it holds their encoded bytes in memory.
        max_pixels: most pixels that a training image's header may announce; larger ones count as damaged.
        verify: of local shards, before training: ``size`` compares lengths with the manifest, ``sha256`` reads every byte, ``none``
            leaves it to the reader, which skips what is missing.
        allow_pipe: let a ``pipe:`` URL start a shell command.
        **kwargs: what every set of images takes, see ``datamodules.common.ImageData``; ``cache_bytes`` is of held-out and test images.

    Raises:
        ConfigError: a setting is out of range; when training starts, too few shards or samples.
        DataError: on first use, when a manifest is missing or disagrees with its shards.
    """

    def __init__(self, train: str, holdout: str | None = None, test: str | None = None, name: str | None = None, window: int = 2048,
                 max_pixels: int = 2**26, verify: Verify = "size", allow_pipe: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_least(window=(window, 1), max_pixels=(max_pixels, 1))
        if verify not in ("none", "size", "sha256"):
            raise ConfigError(unknown_name("verify", verify, ("none", "size", "sha256")))
        self.locations = {split: Location(path, allow_pipe) for split, path in (("train", train), ("holdout", holdout), ("test", test))
                          if path is not None}
        self.holdout, self.window, self.max_pixels, self.verify = holdout, window, max_pixels, verify
        self.name: str = name or PurePosixPath(train.removesuffix("{}")).name
        self._manifests: dict[str, Manifest] = {}
        self._stores: dict[str, tuple[ShardIndex, ImageStore]] = {}

    def manifest(self, split: Split) -> Manifest:
        """What the shards of a split hold; compared with the files when it is first asked for.

        Raises:
            DataError: the split is not given, or its manifest is missing or wrong.
        """
        if split not in self.locations:
            raise DataError(f"{self.name} has no {split} shards: give their folder as {split}.")
        if split not in self._manifests:
            found = manifests.read(self.locations[split])
            manifests.check(found, self.locations[split], self.verify)
            if split == "holdout" and found.classes is None:
                raise DataError(f"the holdout shards of {self.name} hold captions: validation needs classes.")
            self._manifests[split] = found
        return self._manifests[split]

    @cached_property
    def class_phrases(self) -> tuple[tuple[str, ...], ...]:
        """For each training class every phrase that is true of it, its name first; empty for captions."""
        phrases = self.manifest("train").classes or ()
        warn_of_duplicates(tuple(of_class[0] for of_class in phrases))
        return phrases

    @property
    def class_lists(self) -> dict[str, tuple[str, ...]]:
        """Class names by list: ``train`` (empty for captions) and ``holdout`` (the validation loader's)."""
        train = tuple(phrases[0] for phrases in self.class_phrases)
        return {"train": train} | ({"holdout": self.names("holdout")} if self.holdout else {})

    @property
    def val_class_lists(self) -> tuple[str, ...]:
        """The class list of each validation loader."""
        return ("holdout",) if self.holdout else ()

    def names(self, split: Split) -> tuple[str, ...]:
        """Class names of a split's labels.

        Raises:
            DataError: held-out images have other classes than the training images.
        """
        names = tuple(phrases[0] for phrases in self.manifest(split).classes or ())
        trained = tuple(phrases[0] for phrases in self.class_phrases) if split == "holdout" else ()
        if trained and names != trained:
            raise DataError(f"the holdout shards of {self.name} have other classes ({', '.join(names[:4])} ...) than the training shards "
                            f"({', '.join(trained[:4])} ...): make both from one source (--holdout).")
        return names

    def setup(self, stage: str | None = None) -> None:
        """Reads the manifests and checks the shards against them, for ``fit`` and ``validate``."""
        self.check_sampler()
        if stage in (None, "fit", "validate"):
            self.manifest("train")
            _ = self.class_lists

    def train_dataloader(self) -> ShardLoader:
        """Whole batches; each process reads its own part of the epoch.

        Raises:
            ConfigError: fewer images than a global batch, or fewer shards than readers.
        """
        if self.image_size is not None:
            self.check_padding((self.image_size, self.image_size))
        found = self.manifest("train")
        order = ShardOrder([shard.samples for shard in found.shards], self.batch_size, self.seed, *self.place(),
                           workers=self.num_workers, window=self.window)
        batches = ShardBatches(self.locations["train"], found, order, image_size=self.image_size, max_pixels=self.max_pixels,
                               augment=self.augment, padding=self.padding)
        return ShardLoader(batches, self.num_workers, self.max_bad_share, self.replay, self.in_fit)

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader over the held-out images, or none. Every image once over all processes, which may differ in length."""
        if not self.holdout:
            return []
        held = self.evaluation_set("holdout")
        images = held.images
        assert isinstance(images, ImageStore)
        batches = Batches(images, torch.arange(len(held)), held.labels_N, held.index_N)
        return [DataLoader(batches, sampler=ExactOrder(len(held), self.batch_size, *self.place()), batch_size=None)]

    def evaluation_set(self, split: Split) -> EvaluationSet:
        """A split to score image by image, without augmentation; of caption shards a ``CaptionedSet``, for retrieval.

        There, each line of ``key.txt`` (or each of the list ``captions`` in ``key.json``) is a caption, and samples with the same
        encoded image are one image.

        Args:
            split: ``test``, ``holdout`` or ``train``; their shards must be local.

        Raises:
            ConfigError: no such split.
            DataError: there are no such shards, a sample has neither class nor caption, or they are not local.
        """
        if split not in ("test", "holdout", "train"):
            raise ConfigError(unknown_name("split", split, ("test", "holdout", "train")))
        names = self.names(split)
        index, store = self._store(split)
        kept = store.positions_N
        if not names:
            rows, captions = index.captions_by_image(kept.tolist())
            numbers = torch.tensor(index.indices())[kept[rows]]
            return CaptionedSet.of(self.name, split, store, numbers, captions, positions_N=rows)
        return EvaluationSet(self.name, split, store, torch.tensor(index.labels())[kept], torch.tensor(index.indices())[kept], names,
                             self.templates)

    def _store(self, split: Split) -> tuple[ShardIndex, ImageStore]:
        if split not in self._stores:
            index = ShardIndex(self.locations[split], self.manifest(split))
            self._stores[split] = (index, load(index, image_size=self.image_size, cache_bytes=self.cache_bytes,
                                               max_bad_share=self.max_bad_share))
        return self._stores[split]
