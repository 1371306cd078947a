"""Any folder of class folders, or a zip of one, as a datamodule."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch

from aft.errors import DataError
from datamodules.base import LabelledImages, Listing
from datamodules.class_names import Phrases, from_folder, read
from datamodules.sources import FolderSource, ZipSource, open_source


class ImageFolder(LabelledImages):
    """Images in ``CLASS/anything.jpg`` (also png, webp, bmp), in a folder or in a zip that is read in place.

    Args:
        train: folder or ``.zip`` with the training images.
        test: the same with the test images; none: there is no test set.
        classes: file with the class names (``datamodules.class_names.read``); ``auto``: ``classes.json`` beside ``train`` if it is
            there, else the folders' names; none: the folders' names.
        name: id of the data set in result files; none: the name of the folder that holds ``train``.
        **kwargs: what every labelled set takes, see ``LabelledImages``.

    Raises:
        DataError: on first use, when files are missing, there is one class only, or train and test differ in their classes.
    """

    def __init__(self, train: str, test: str | None = None, classes: str | None = "auto", name: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.paths: dict[str, str | None] = {"train": train, "test": test}
        self.classes = classes
        self.name = name or Path(train).absolute().parent.name
        self._sources: dict[str, FolderSource | ZipSource] = {}

    @cached_property
    def folders(self) -> tuple[str, ...]:
        """The class folders, sorted: their places are the labels.

        Raises:
            DataError: fewer than two, or other ones in the test set.
        """
        folders = folders_of(self._source("train"))
        if len(folders) < 2:
            raise DataError(f"{self.paths['train']!r} has one class folder only ({folders[0]!r}): a classifier needs two or more; "
                            "if the classes lie one level further down, point there.")
        if self.paths["test"] is not None and (other := set(folders_of(self._source("test")))) != set(folders):
            raise DataError(f"train and test have different class folders: only in train: {some(set(folders) - other)}; only in test: "
                            f"{some(other - set(folders))}. Give folders with the same classes.")
        return folders

    @cached_property
    def _phrases(self) -> tuple[Phrases, ...]:
        path = self.classes
        if path == "auto":
            beside = Path(str(self.paths["train"])).parent / "classes.json"
            path = str(beside) if beside.is_file() else None
        return tuple(map(from_folder, self.folders)) if path is None else read(path, self.folders)

    def all_classes(self) -> tuple[Phrases, ...]:
        """For each class every phrase that is true of it, its name first."""
        return self._phrases

    def listing(self, split: Literal["train", "test"]) -> Listing:
        """The files of a split and their labels.

        Raises:
            DataError: the split has no path, or the data is unusable (see the class).
        """
        place = {folder: label for label, folder in enumerate(self.folders)}
        source = self._source(split)
        return Listing(source, torch.tensor([place[class_folder(member)] for member in source.members]))

    def _source(self, split: Literal["train", "test"]) -> FolderSource | ZipSource:
        path = self.paths[split]
        if path is None:
            raise DataError(f"{self.name} has no {split} images: give the path as {split}.")
        if split not in self._sources:
            self._sources[split] = open_source(path)
        return self._sources[split]


def class_folder(member: str) -> str:
    """The class folder of a member path: its first part."""
    return PurePosixPath(member).parts[0]


def folders_of(source: FolderSource | ZipSource) -> tuple[str, ...]:
    """The class folders of a source, sorted."""
    return tuple(sorted(set(map(class_folder, source.members))))


def some(names: set[str]) -> str:
    """A few names for a message, and how many more there are."""
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"
