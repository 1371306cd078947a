"""The image sets of torchvision by name, as a datamodule."""

from __future__ import annotations

import inspect
import io
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision.datasets
from PIL import Image
from torchvision.datasets import VisionDataset

from aft.errors import DataError, unknown_name
from datamodules.base import LabelledImages, Listing
from datamodules.class_names import Phrases, clean
from datamodules.images import DAMAGED

LABELS = ("targets", "labels", "_labels")  # where the sets keep their labels; others are read item by item
PATHS = ("_image_files", "_images", "_samples", "samples")  # where sets of files keep their paths; others give pictures alone
MAGIC = (b"\xff\xd8", b"\x89P", b"BM", b"RI")  # JPEG, PNG, BMP, WebP: files that are handed on as they are
BASES = ("VisionDataset", "DatasetFolder", "ImageFolder")  # no sets; for a folder of one's own there is datamodules.ImageFolder


class Torchvision(LabelledImages):
    """A set of ``torchvision.datasets`` whose items are (image, class number): CIFAR10, CIFAR100, EuroSAT, Flowers102, Food101, DTD ...

    Sets of boxes, masks, pairs or videos are refused. Some sets (such as CIFAR10) come as pickles, which torchvision compares with its
    own md5 sums before it opens them.

    Args:
        name: of the class in ``torchvision.datasets``, such as ``CIFAR10``; in small letters it is the id in result files.
        root: folder that holds the set, in torchvision's layout.
        download: fetch the set into ``root`` first, on one process; false: it must be there.
        train_split: name of the training split (``trainval`` for some sets); of no meaning to sets with a ``train`` switch.
        test_split: the same of the test split; none: there is no test set.
        class_names: names in label order; none: the set's own ``classes``.
        **kwargs: what every labelled set takes, see ``LabelledImages``.

    Raises:
        DataError: on first use, when the set is unknown (near matches are listed), missing, or of another kind.
    """

    def __init__(self, name: str, root: str, download: bool = False, train_split: str = "train", test_split: str | None = "test",
                 class_names: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dataset, self.root, self.download, self.given_names = name, root, download, class_names
        self.splits: dict[str, str | None] = {"train": train_split, "test": test_split}
        self.name = name.lower()
        self._sources: dict[str, TorchvisionSource] = {}

    def prepare_data(self) -> None:
        """Fetches the set where ``download`` is true; Lightning calls this on one process a node."""
        if self.download:
            for split in self.splits:
                if self.splits[split] is not None and (split == "train" or has_test(find(self.dataset))):
                    self._open(split, download=True)

    def all_classes(self) -> tuple[Phrases, ...]:
        """For each class every phrase that is true of it, its name first.

        Raises:
            DataError: the set has no names and none are given, or their number is wrong.
        """
        return self._phrases

    @cached_property
    def _phrases(self) -> tuple[Phrases, ...]:
        given = self.given_names if self.given_names is not None else getattr(self._source("train").images, "classes", None)
        if not given:
            raise DataError(f"torchvision's {self.dataset} has no class names: give class_names, in label order.")
        lowest, highest = min(self._source("train").labels), max(self._source("train").labels)
        if lowest < 0 or highest >= len(given):
            raise DataError(f"{self.dataset} has {len(given)} class names, but labels from {lowest} to {highest}: give class_names with "
                            "one for each label from 0 on, or another split.")
        return tuple(tuple(clean(str(part).replace("_", " ")) for part in (entry if isinstance(entry, (tuple, list)) else (entry,)))
                     for entry in given)

    def listing(self, split: Literal["train", "test"]) -> Listing:
        """The images of a split and their labels."""
        source = self._source(split)
        return Listing(source, torch.tensor(source.labels))

    def _source(self, split: Literal["train", "test"]) -> TorchvisionSource:
        if split not in self._sources:
            self._sources[split] = TorchvisionSource(self._open(split, download=False), f"{self.dataset} {split}")
        return self._sources[split]

    def _open(self, split: str, download: bool) -> VisionDataset:
        kind = find(self.dataset)
        if self.splits[split] is None or (split == "test" and not has_test(kind)):
            raise DataError(f"torchvision's {self.dataset} has no {split} images here: give {split}_split, or evaluate another split.")
        if download:
            Path(self.root).mkdir(parents=True, exist_ok=True)
        known = inspect.signature(kind.__init__).parameters
        settings: dict[str, Any] = {"download": download} if "download" in known else {}
        if "train" in known:
            settings["train"] = split == "train"
        elif "split" in known:
            settings["split"] = self.splits[split]
        return construct(self.dataset, self.root, **settings)


class TorchvisionSource:
    """A torchvision set as encoded images: its files as they are, else BMP (lossless). A ``datamodules.sources.Source``.

    Files come in the order of their paths: torchvision lists some sets (SUN397) in whatever order the disk has them.

    Args:
        images: the set; its items are (PIL image, class number).
        title: what a message calls it.

    Raises:
        DataError: its items are something else.
    """

    def __init__(self, images: VisionDataset, title: str) -> None:
        labels, paths = labels_of(images, title), paths_of(images)
        self.images, self.title, self.paths = images, title, paths
        self.order = list(range(len(labels))) if paths is None else sorted(range(len(labels)), key=lambda place: paths[place].as_posix())
        self.labels = [labels[place] for place in self.order]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, position: int) -> str:
        """Path of the file, or name of the set and place in it."""
        return f"{self.title} #{position}" if self.paths is None else str(self.paths[self.order[position]])

    def read(self, position: int) -> bytes:
        """The file's bytes, or the image as BMP."""
        if self.paths is not None and (raw := self.paths[self.order[position]].read_bytes()).startswith(MAGIC):
            return raw
        data = io.BytesIO()
        self.images[self.order[position]][0].convert("RGB").save(data, "BMP")
        return data.getvalue()


def construct(name: str, root: str, **settings: Any) -> VisionDataset:
    """A set of torchvision from what lies below a root.

    Raises:
        DataError: it is unknown, not there, or not as torchvision expects it; or a package that it needs is missing.
    """
    try:
        return find(name)(root, **settings)
    except (RuntimeError, OSError, ValueError, TypeError, LookupError, ImportError) as error:
        raise DataError(f"torchvision's {name} cannot be opened in {root!r} ({error}): set download: true to fetch it, "
                        "or give the root that holds it.") from error


def find(name: str) -> type[VisionDataset]:
    """The class of a set.

    Raises:
        DataError: there is none of this name; near matches are listed.
    """
    kinds = {key: getattr(torchvision.datasets, key) for key in torchvision.datasets.__all__ if key not in BASES}
    known = {key: kind for key, kind in kinds.items() if inspect.isclass(kind) and issubclass(kind, VisionDataset)
             and "root" in inspect.signature(kind.__init__).parameters}
    if name not in known:
        raise DataError(unknown_name("torchvision set", name, known))
    return known[name]


def has_test(kind: type[VisionDataset]) -> bool:
    """Whether the set knows splits at all."""
    return bool({"train", "split"} & set(inspect.signature(kind.__init__).parameters))


def labels_of(images: VisionDataset, title: str) -> list[int]:
    """The class number of every image.

    Raises:
        DataError: the first item is not (image, class number).
    """
    first = first_readable(images)
    if not (isinstance(first, tuple) and len(first) == 2 and isinstance(first[0], Image.Image) and is_number(first[1])):
        shown = [type(part).__name__ for part in first] if isinstance(first, tuple) else type(first).__name__
        raise DataError(f"torchvision's {title}: an item is {shown}, expected (image, class number): choose a set for classification.")
    for key in LABELS:
        kept = getattr(images, key, None)
        if kept is not None and len(kept) == len(images):
            return [int(label) for label in kept]
    return [int(images[position][1]) for position in range(len(images))]


def first_readable(images: VisionDataset) -> object:
    """The first item whose file can be opened; none: there is none."""
    for position in range(len(images)):
        try:
            return images[position]
        except DAMAGED:
            continue
    return None


def paths_of(images: VisionDataset) -> list[Path] | None:
    """The file of every image; none: the set does not say."""
    for key in PATHS:
        kept = getattr(images, key, None)
        if isinstance(kept, list) and len(kept) == len(images):
            paths = [entry[0] if isinstance(entry, tuple) else entry for entry in kept]
            return [Path(path) for path in paths] if all(isinstance(path, (str, Path)) for path in paths) else None
    return None


def is_number(label: object) -> bool:
    """Whether a label is a whole number, also numpy's or a tensor's."""
    return isinstance(label, int) or getattr(label, "shape", None) == ()
