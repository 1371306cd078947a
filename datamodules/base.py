"""What every labelled set shares: decoded once, trained on in a counted order, validated on held-out training images, tested exactly.

Shapes: M files of a split, N good images of it, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from aft.batch import Batch, EvaluationSet
from aft.clip.prompts import warn_of_duplicates
from aft.errors import ConfigError, DataError, unknown_name
from datamodules.common import ImageData, check_least
from datamodules.images import ImageStore, load
from datamodules.order import Batches, ExactOrder, TrainLoader, TrainOrder
from datamodules.sources import Source

HOLDOUT_SEED = 2
"""Runs with other seeds must hold out the same images, or one would choose by images that the run it starts from was trained on.
MiniCLIP-32 was chosen by the images of this seed."""


@dataclass(frozen=True)
class Listing:
    """The files of a split and their classes, not decoded yet.

    Args:
        source: the encoded files.
        labels_M: ``int64 [M]``, places in the list of all classes.
    """

    source: Source
    labels_M: Tensor


@dataclass(frozen=True)
class Subset:
    """Some images of a decoded split.

    Args:
        rows_N: ``int64 [N]``, places in the store.
        labels_N: ``int64 [N]``, places in the class list of the subset.
        index_N: ``int64 [N]``, stable numbers: places among all files of the split, damaged ones included.
    """

    rows_N: Tensor
    labels_N: Tensor
    index_N: Tensor

    def __getitem__(self, keep: Tensor) -> Subset:
        return Subset(self.rows_N[keep], self.labels_N[keep], self.index_N[keep])


class LabelledImages(ImageData, ABC):
    """A labelled set of images as ``trainer.datamodule``; satisfies ``aft.batch.ClassData``.

    The model is chosen on ``holdout`` images of the training set; the test set is only in ``evaluation_set("test")``.
    The trainer must have ``use_distributed_sampler: false``: the loaders split the data over ranks themselves, without padding.

    Args:
        holdout: training images kept out of training to validate on; balanced, 0 for none; the same ones whatever the seed.
        train_classes: train and validate on these classes alone, numbered in this order; none: all.
            ``evaluation_set("test")`` keeps all classes (``EvaluationSet.select`` takes some).
        **kwargs: what every set of images takes, see ``datamodules.common.ImageData``.

    Raises:
        ConfigError: a setting is out of range.
    """

    name = "labelled_images"

    def __init__(self, *, holdout: int = 0, train_classes: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_least(holdout=(holdout, 0))
        self.holdout, self.train_classes = holdout, train_classes
        self._stores: dict[str, ImageStore] = {}

    @abstractmethod
    def listing(self, split: Literal["train", "test"]) -> Listing:
        """The files of a split.

        Raises:
            DataError: there are none.
        """

    @abstractmethod
    def all_classes(self) -> tuple[tuple[str, ...], ...]:
        """For each class of the data set every phrase that is true of it, its name first."""

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of all classes of the data set, in label order. Names that two classes share are listed in one warning."""
        names = tuple(phrases[0] for phrases in self.all_classes())
        warn_of_duplicates(names)
        return names

    @cached_property
    def train_labels(self) -> tuple[int, ...]:
        """The classes that are trained on, as places among all classes.

        Raises:
            DataError: ``train_classes`` has an unknown, repeated or ambiguous name, or fewer than two.
        """
        if self.train_classes is None:
            return tuple(range(len(self.class_names)))
        for name in self.train_classes:
            if name not in self.class_names:
                raise DataError(unknown_name("class in train_classes", name, self.class_names))
            if self.class_names.count(name) > 1 or self.train_classes.count(name) > 1:
                raise DataError(f"train_classes: {name!r} is given twice or names two classes: each name must stand for one class.")
        if len(self.train_classes) < 2:
            raise DataError(f"train_classes = {self.train_classes}: give two classes or more, or none for all.")
        return tuple(self.class_names.index(name) for name in self.train_classes)

    @property
    def class_lists(self) -> dict[str, tuple[str, ...]]:
        """Class names by list: ``train`` (what training labels mean) and ``holdout`` (the validation loader's)."""
        names = tuple(self.class_names[label] for label in self.train_labels)
        return {"train": names} | ({"holdout": names} if self.holdout else {})

    @property
    def val_class_lists(self) -> tuple[str, ...]:
        """The class list of each validation loader."""
        return ("holdout",) if self.holdout else ()

    @property
    def class_phrases(self) -> tuple[tuple[str, ...], ...]:
        """For each training class every phrase that is true of it, its name first."""
        phrases = self.all_classes()
        return tuple(phrases[label] for label in self.train_labels)

    def setup(self, stage: str | None = None) -> None:
        """Decodes the training images, for ``fit`` and ``validate``; the test images wait until they are asked for."""
        self.check_sampler()
        if stage in (None, "fit", "validate"):
            self._train_parts  # noqa: B018  (computed once, here rather than in the first step)

    def train_dataloader(self) -> TrainLoader:
        """Whole batches in the order of (seed, epoch); each process its share of every global batch.

        Raises:
            ConfigError: fewer images than a global batch.
        """
        part = self._train_parts["train"]
        batches = Batches(self.store("train"), part.rows_N, part.labels_N, part.index_N, augment=self.augment, padding=self.padding,
                          seed=self.seed, as_bytes=True)
        order = TrainOrder(len(part.rows_N), self.batch_size, self.seed, *self.place())
        return TrainLoader(batches, order, self.num_workers, self.replay, self.in_fit)

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader over the held-out training images, or none. Every image once over all processes, which may differ in length."""
        if not self.holdout:
            return []
        part = self._train_parts["holdout"]
        order = ExactOrder(len(part.rows_N), self.batch_size, *self.place())
        return [DataLoader(Batches(self.store("train"), part.rows_N, part.labels_N, part.index_N), sampler=order, batch_size=None)]

    def evaluation_set(self, split: Literal["test", "holdout", "train"]) -> EvaluationSet:
        """A split to score image by image, without augmentation.

        Args:
            split: ``test`` (all classes of the data set), ``holdout`` or ``train`` (the training classes).

        Raises:
            ConfigError: no such split.
            DataError: the data set has no such images.
        """
        if split not in ("test", "holdout", "train"):
            raise ConfigError(unknown_name("split", split, ("test", "holdout", "train")))
        if split == "holdout" and not self.holdout:
            raise DataError("holdout = 0 keeps no images to evaluate on: set holdout, or take the split 'test'.")
        part = self._whole("test") if split == "test" else self._train_parts[split]
        names = self.class_names if split == "test" else self.class_lists["train"]
        return EvaluationSet(self.name, split, self.store("test" if split == "test" else "train"), part.labels_N, part.index_N, names,
                             self.templates, positions_N=part.rows_N)

    def store(self, split: Literal["train", "test"]) -> ImageStore:
        """All good images of a split; decoded on first use."""
        if split not in self._stores:
            self._stores[split] = load(self.listing(split).source, image_size=self.image_size, cache_bytes=self.cache_bytes,
                                       max_bad_share=self.max_bad_share)
            if split == "train":
                self.check_padding(self._stores[split].size)
        return self._stores[split]

    def _whole(self, split: Literal["train", "test"]) -> Subset:
        index_N = self.store(split).positions_N
        return Subset(torch.arange(len(index_N)), self.listing(split).labels_M[index_N], index_N)

    @cached_property
    def _train_parts(self) -> dict[str, Subset]:
        part = self._whole("train")
        new_label = torch.full((len(self.class_names),), -1, dtype=torch.long)
        new_label[list(self.train_labels)] = torch.arange(len(self.train_labels))
        part = Subset(part.rows_N, new_label[part.labels_N], part.index_N)[new_label[part.labels_N] >= 0]
        held = choose_in_turn(part.labels_N, part.index_N, self.holdout, HOLDOUT_SEED)
        lost = set(part.labels_N.tolist()) - set(part.labels_N[~held].tolist())
        if lost or int(held.sum()) < self.holdout:
            raise ConfigError(f"holdout = {self.holdout} of {len(held)} training images leaves nothing to train on in "
                              f"{len(lost)} classes: hold out fewer.")
        return {"train": part[~held], "holdout": part[held]}


def choose_in_turn(labels_N: Tensor, index_N: Tensor, count: int, seed: int) -> Tensor:
    """A balanced choice: one image of each class in turn, within a class in the order of a hash of (seed, stable number).

    Choices nest (the first n of more), and a missing image moves no other class's choice.

    Args:
        labels_N, index_N: ``int64 [N]``, class and stable number.
        count: how many to choose.
        seed: of the hash.

    Returns:
        ``bool [N]``, true where chosen; in total ``min(count, N)``.
    """
    key = mix(index_N.numpy().astype(np.uint64) + mix(np.full(1, seed, np.uint64)))
    by_class = np.lexsort((key, labels_N.numpy()))
    sizes = np.bincount(labels_N.numpy())
    turn = np.empty(len(by_class), np.int64)
    turn[by_class] = np.concatenate([np.arange(size) for size in sizes])
    chosen = np.lexsort((labels_N.numpy(), turn))[:count]
    return torch.from_numpy(np.isin(np.arange(len(by_class)), chosen))


def mix(numbers: np.ndarray | Sequence[int]) -> np.ndarray:
    """A bijective 64-bit hash (the finaliser of SplitMix64), ``uint64`` to ``uint64``."""
    z = np.asarray(numbers, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
