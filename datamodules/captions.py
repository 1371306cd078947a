"""Images with captions, from a table of paths and texts, as a datamodule."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from aft.batch import Batch, CaptionedSet
from aft.errors import ConfigError, DataError, unknown_name
from datamodules.common import ImageData
from datamodules.images import load
from datamodules.order import Batches, TrainLoader, TrainOrder
from datamodules.sources import FilesBelow, ZipSource

ENDINGS = (".csv", ".tsv", ".json", ".jsonl")


class Captions(ImageData):
    """Image and text pairs from a ``.csv``, ``.tsv``, ``.json`` (a list of records) or ``.jsonl`` file; yields ``Batch.captions``.

    There are no classes: train with ``ContrastivePretraining``, and set ``checkpoint.monitor`` to null, as nothing is validated.
    For retrieval (``evaluation_set``) rows with the same path are one image with several captions, and equal texts are one text.

    Args:
        train: the table of training images; the first line of a csv or tsv names its columns. None: there are none.
        images: folder (or zip) that the paths in both tables start from; none: the table's own.
        image_column: name of the column (or key) with the paths.
        caption_column: name of the column (or key) with the texts.
        name: id of the data set; none: the (training) table's name without its ending.
        test: the table of test images; none: there are none.
        **kwargs: what every set of images takes, see ``datamodules.common.ImageData``.

    Raises:
        DataError: on first use, when the table, a caption or an image is missing.
    """

    class_phrases: tuple[tuple[str, ...], ...] = ()
    val_class_lists: tuple[str, ...] = ()

    def __init__(self, train: str | None = None, images: str | None = None, image_column: str = "image", caption_column: str = "caption",
                 name: str | None = None, test: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tables, self.images = {"train": train, "test": test}, images
        self.columns = (image_column, caption_column)
        self.name: str = name or Path(train or test or "captions").stem
        self.class_lists: dict[str, tuple[str, ...]] = {"train": ()}

    @cached_property
    def _batches(self) -> Batches:
        source = self._source("train")
        store = load(source, image_size=self.image_size, cache_bytes=self.cache_bytes, max_bad_share=self.max_bad_share)
        self.check_padding(store.size)
        captions = [source.captions[position] for position in store.positions_N.tolist()]
        return Batches(store, torch.arange(len(store)), None, store.positions_N, captions=captions, augment=self.augment,
                       padding=self.padding, seed=self.seed, as_bytes=True)

    def _source(self, split: str) -> CaptionSource:
        table = self.tables[split]
        if table is None:
            raise DataError(f"{self.name} has no {split} images: give their table as {split}.")
        return CaptionSource(table, self.images, *self.columns)

    def evaluation_set(self, split: Literal["test", "train"]) -> CaptionedSet:
        """A table to retrieve from, without augmentation.

        Args:
            split: ``test`` or ``train``.

        Raises:
            ConfigError: no such split.
            DataError: there is no such table, or it is unusable.
        """
        if split not in self.tables:
            raise ConfigError(unknown_name("split", split, self.tables))
        source, captions = self._source(split).once()
        store = load(source, image_size=self.image_size, cache_bytes=self.cache_bytes, max_bad_share=self.max_bad_share)
        kept = store.positions_N
        return CaptionedSet.of(self.name, split, store, kept, [captions[position] for position in kept.tolist()])

    def setup(self, stage: str | None = None) -> None:
        """Reads the table and decodes the images, or their headers where they do not fit into ``cache_bytes``."""
        self.check_sampler()
        _ = self._batches

    def train_dataloader(self) -> TrainLoader:
        """Whole batches in the order of (seed, epoch); each process its share of every global batch."""
        order = TrainOrder(len(self._batches), self.batch_size, self.seed, *self.place())
        return TrainLoader(self._batches, order, self.num_workers, self.replay, self.in_fit)

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """None: captions have no accuracy."""
        return []


class CaptionSource(FilesBelow):
    """The images of a table, in its order; a position is the stable number of a sample. A ``datamodules.sources.Source``.

    Args:
        table: see ``read_table``.
        images: folder or zip that the paths start from; none: the table's own folder.
        image_column, caption_column: names of the columns.

    Raises:
        DataError: the table is unusable, or images that it names do not exist.
    """

    def __init__(self, table: str | Path, images: str | Path | None = None, image_column: str = "image",
                 caption_column: str = "caption") -> None:
        pairs = read_table(table, image_column, caption_column)
        self.root = Path(table).parent if images is None else Path(images)
        self.members, self.captions = tuple(path for path, _ in pairs), tuple(text for _, text in pairs)
        self._zip = ZipSource(self.root) if self.root.suffix.lower() == ".zip" else None
        there = set(self._zip.members) if self._zip else {member for member in set(self.members) if (self.root / member).is_file()}
        absent = [member for member in self.members if member not in there]
        if absent:
            raise DataError(f"{len(absent)} of {len(self.members)} images of {str(table)!r} are not in {str(self.root)!r} "
                            f"({', '.join(absent[:5])}): give the folder that the paths start from (images), or take the rows out.")

    def read(self, position: int) -> bytes:
        """The encoded bytes of one image."""
        return self._zip.read_member(self.members[position]) if self._zip else super().read(position)

    def once(self) -> tuple[CaptionSource, list[list[str]]]:
        """The same with each image once, and all captions of each."""
        captions: dict[str, list[str]] = {}
        for member, text in zip(self.members, self.captions, strict=True):
            captions.setdefault(member, []).append(text)
        single = copy.copy(self)
        single.members, single.captions = tuple(captions), tuple(texts[0] for texts in captions.values())
        return single, list(captions.values())


def read_table(path: str | Path, image_column: str = "image", caption_column: str = "caption") -> list[tuple[str, str]]:
    """Pairs of image path and caption, in the order of the file.

    Args:
        path: ``.csv``, ``.tsv`` (the first line names the columns), ``.json`` (a list of records), ``.jsonl`` (a record a line).
        image_column, caption_column: names of the two columns.

    Raises:
        DataError: the file is missing or unreadable, lacks a column, is empty, or a row lacks path or caption.
    """
    try:
        rows = parse(Path(path))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"caption file {str(path)!r} cannot be read ({error}): give one of {', '.join(ENDINGS)} in UTF-8.") from error
    if not rows:
        raise DataError(f"caption file {str(path)!r} has no rows: give an image and a caption a row.")
    for column in (image_column, caption_column):
        if column not in rows[0]:
            raise DataError(f"caption file {str(path)!r}: {unknown_name('column', column, map(str, rows[0]))} "
                            "Set image_column and caption_column.")
    pairs = [(clean(row.get(image_column)), clean(row.get(caption_column))) for row in rows]
    empty = [number for number, pair in enumerate(pairs, 1) if not all(pair)]
    if empty:
        raise DataError(f"caption file {str(path)!r}: {len(empty)} of {len(rows)} rows lack an image or a caption (rows "
                        f"{', '.join(map(str, empty[:5]))}{' ...' if len(empty) > 5 else ''}): fill them or take them out.")
    return pairs


def parse(path: Path) -> Sequence[Mapping[str, Any]]:
    """The records of a table.

    Raises:
        OSError, ValueError, csv.Error: it cannot be read as what its ending says.
    """
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"its ending is {path.suffix!r}")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() in (".csv", ".tsv"):
        return list(csv.DictReader(text.splitlines(keepends=True), delimiter="," if path.suffix.lower() == ".csv" else "\t"))
    rows = json.loads(text) if path.suffix.lower() == ".json" else [json.loads(line) for line in text.splitlines() if line.strip()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of records")
    return rows


def clean(value: object) -> str:
    """A text with single spaces; anything that is no text is none."""
    return " ".join(value.split()) if isinstance(value, str) else ""
