"""What passes between the rooms: one batch of images, a data set to evaluate on, and what a datamodule promises.

Shapes: B batch, C channels, H height, W width, N images of a data set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from aft.errors import DataError, unknown_name


@dataclass
class Batch:
    """Images before any normalisation, and what is known of them.

    Args:
        images: ``float32 [B, 3, H, W]`` in [0, 1].
        index: ``int64 [B]``, the stable number of each sample: its place in the data set (for shards a hash of shard and key).
        labels: ``int64 [B]``, places in the data set's class list; none for caption data.
        captions: one text a sample; none for labelled data.
    """

    images: Tensor
    index: Tensor
    labels: Tensor | None = None
    captions: list[str] | None = None


class Images(Protocol):
    """A map-style store of images: ``images[i]`` is ``float32 [3, H, W]`` in [0, 1]."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, position: int) -> Tensor:
        """One image, ``float32 [3, H, W]`` in [0, 1]."""


@dataclass(frozen=True)
class EvaluationSet:
    """A labelled set that is scored sample by sample, without padding.

    Args:
        name: id of the data set, such as ``cifar10``.
        split: ``test``, ``val``, ``holdout`` ...
        images: the image store.
        labels_N: ``int64 [N]``, places in ``class_names``.
        index_N: ``int64 [N]``, the stable number of each sample; it does not change when classes are selected.
        class_names: what the labels mean.
        templates: prompts with one ``{}`` each.
        label_space: ``all``, or the name of a selection of classes.
        positions_N: where each sample lies in ``images``.
    """

    name: str
    split: str
    images: Images
    labels_N: Tensor
    index_N: Tensor
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    label_space: str = "all"
    positions_N: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels_N)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The samples at ``rows`` (places in this set, in the order given)."""
        rows_n = torch.as_tensor(rows, dtype=torch.long)
        positions = rows_n if self.positions_N is None else self.positions_N[rows_n]
        images = torch.stack([self.images[int(p)] for p in positions])
        return Batch(images, self.index_N[rows_n], self.labels_N[rows_n])

    def take(self, rows_n: Tensor) -> EvaluationSet:
        """The samples at these rows, in this order; class list and label space stay."""
        positions_N = torch.arange(len(self)) if self.positions_N is None else self.positions_N
        return replace(self, labels_N=self.labels_N[rows_n], index_N=self.index_N[rows_n], positions_N=positions_N[rows_n])

    def select(self, classes: Sequence[str], label_space: str) -> EvaluationSet:
        """The samples of some classes, classified among these names alone.

        Raises:
            DataError: a name is not in the class list (near matches are listed).
        """
        for name in classes:
            if name not in self.class_names:
                raise DataError(unknown_name("class", name, self.class_names))
        new_label = torch.full((len(self.class_names),), -1, dtype=torch.long)
        for place, name in enumerate(classes):
            new_label[self.class_names.index(name)] = place
        keep = (new_label[self.labels_N] >= 0).nonzero().flatten()
        positions = torch.arange(len(self)) if self.positions_N is None else self.positions_N
        return replace(
            self,
            labels_N=new_label[self.labels_N[keep]],
            index_N=self.index_N[keep],
            class_names=tuple(classes),
            label_space=label_space,
            positions_N=positions[keep],
        )


@dataclass(frozen=True, kw_only=True)
class CaptionedSet(EvaluationSet):
    """Images with captions instead of classes; :meth:`of` makes one.

    ``class_names`` is the gallery of texts, each once, in the order of their sha256 (so that the first images in the order of texts are
    no special ones); ``labels_N`` is the first text of each image.

    Args:
        true_texts: for each image the places of all texts that are true of it: its own captions, also where they are another image's too.
    """

    true_texts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, name: str, split: str, images: Images, index_N: Tensor, captions: Sequence[Sequence[str]], *,
           positions_N: Tensor | None = None, label_space: str = "all") -> CaptionedSet:  # fmt: skip
        """The gallery of these images' captions.

        Args:
            name, split, images, index_N, positions_N, label_space: as in :class:`EvaluationSet`.
            captions: for each image one text or more; equal texts are one.

        Raises:
            DataError: an image has no caption.
        """
        if bare := [int(index_N[row]) for row, texts in enumerate(captions) if not texts]:
            raise DataError(f"{len(bare)} images of {name}/{split} have no caption (numbers {bare[:5]}): caption them or take them out.")
        texts = sorted({text for of_image in captions for text in of_image}, key=lambda text: hashlib.sha256(text.encode()).digest())
        place = {text: number for number, text in enumerate(texts)}
        true_texts = tuple(tuple(dict.fromkeys(place[text] for text in of_image)) for of_image in captions)
        labels_N = torch.tensor([of_image[0] for of_image in true_texts])
        return cls(name, split, images, labels_N, index_N, tuple(texts), ("{}",), label_space, positions_N, true_texts=true_texts)

    def truth(self, rows: Sequence[int]) -> Tensor:
        """Which texts of the gallery are true of the images at ``rows``, bool ``[n, T]``."""
        truth_nT = torch.zeros((len(rows), len(self.class_names)), dtype=torch.bool)
        for place, row in enumerate(rows):
            truth_nT[place, list(self.true_texts[row])] = True
        return truth_nT

    def take(self, rows_n: Tensor) -> CaptionedSet:
        """The images at these rows, and the gallery of their captions alone."""
        positions_N = torch.arange(len(self)) if self.positions_N is None else self.positions_N
        captions = [[self.class_names[text] for text in self.true_texts[row]] for row in rows_n.tolist()]
        return self.of(self.name, self.split, self.images, self.index_N[rows_n], captions, positions_N=positions_N[rows_n],
                       label_space=self.label_space)

    def select(self, classes: Sequence[str], label_space: str) -> EvaluationSet:
        """There are no classes to select.

        Raises:
            DataError: always.
        """
        raise DataError(f"label space {label_space!r} selects classes, but {self.name}/{self.split} has captions: leave label_spaces out.")


@runtime_checkable
class ClassData(Protocol):
    """What a method asks of ``trainer.datamodule``.

    ``class_lists`` maps the name of a class list to its names; ``"train"`` is what the training labels mean.
    ``val_class_lists`` names, for each validation loader in turn, the list that its labels mean.
    ``class_phrases`` gives, per training class, every phrase that is true of it (name first): what pre-training makes captions of.
    """

    class_lists: dict[str, tuple[str, ...]]
    val_class_lists: tuple[str, ...]
    templates: tuple[str, ...]
    class_phrases: tuple[tuple[str, ...], ...]


@runtime_checkable
class SuiteData(Protocol):
    """What an evaluation asks of a datamodule of many test sets.

    ``families`` maps the id of each set to its family: who was trained on one of a family has seen classes or images of the others.
    ``sizes`` are the images of each set's evaluation split, also of sets that are not there.
    """

    families: dict[str, str]
    sizes: dict[str, int]

    def evaluation_sets(self, split: str) -> list[EvaluationSet]:
        """Every set that is there."""
