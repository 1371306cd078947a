"""Images with captions, from a table of paths and texts, as a datamodule."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from aft.batch import Batch
from aft.errors import DataError, unknown_name
from datamodules.common import ImageData
from datamodules.images import load
from datamodules.order import Batches, TrainLoader, TrainOrder
from datamodules.sources import FilesBelow

ENDINGS = (".csv", ".tsv", ".json", ".jsonl")


class Captions(ImageData):
    """Image and text pairs from a ``.csv``, ``.tsv``, ``.json`` (a list of records) or ``.jsonl`` file; yields ``Batch.captions``.

    There are no classes: train with ``ContrastivePretraining``, and set ``checkpoint.monitor`` to null, as nothing is validated.

    Args:
        train: the table; the first line of a csv or tsv names its columns.
        images: folder that the paths in the table start from; none: the table's own.
        image_column: name of the column (or key) with the paths.
        caption_column: name of the column (or key) with the texts.
        name: id of the data set; none: the table's name without its ending.
        **kwargs: what every set of images takes, see ``datamodules.common.ImageData``.

    Raises:
        DataError: on first use, when the table, a caption or an image is missing.
    """

    class_phrases: tuple[tuple[str, ...], ...] = ()
    val_class_lists: tuple[str, ...] = ()

    def __init__(self, train: str, images: str | None = None, image_column: str = "image", caption_column: str = "caption",
                 name: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.train, self.images = train, images
        self.columns = (image_column, caption_column)
        self.name = name or Path(train).stem
        self.class_lists: dict[str, tuple[str, ...]] = {"train": ()}

    @cached_property
    def _batches(self) -> Batches:
        source = CaptionSource(self.train, self.images, *self.columns)
        store = load(source, image_size=self.image_size, cache_bytes=self.cache_bytes, max_bad_share=self.max_bad_share)
        self.check_padding(store.size)
        captions = [source.captions[position] for position in store.positions_N.tolist()]
        return Batches(store, torch.arange(len(store)), None, store.positions_N, captions=captions, augment=self.augment,
                       padding=self.padding, seed=self.seed)

    def setup(self, stage: str | None = None) -> None:
        """Reads the table and decodes the images, or their headers where they do not fit into ``cache_bytes``."""
        self.check_sampler()
        _ = self._batches

    def train_dataloader(self) -> TrainLoader:
        """Whole batches in the order of (seed, epoch); each process its share of every global batch."""
        order = TrainOrder(len(self._batches), self.batch_size, self.seed, *self.place())
        return TrainLoader(self._batches, order, self.num_workers)

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """None: captions have no accuracy."""
        return []


class CaptionSource(FilesBelow):
    """The images of a table, in its order; a position is the stable number of a sample. A ``datamodules.sources.Source``.

    Args:
        table: see ``read_table``.
        images: folder that the paths start from; none: the table's own.
        image_column, caption_column: names of the columns.

    Raises:
        DataError: the table is unusable, or images that it names do not exist.
    """

    def __init__(self, table: str | Path, images: str | Path | None = None, image_column: str = "image",
                 caption_column: str = "caption") -> None:
        pairs = read_table(table, image_column, caption_column)
        self.root = Path(table).parent if images is None else Path(images)
        self.members, self.captions = tuple(path for path, _ in pairs), tuple(text for _, text in pairs)
        absent = [member for member in self.members if not (self.root / member).is_file()]
        if absent:
            raise DataError(f"{len(absent)} of {len(self.members)} images of {str(table)!r} are not in {str(self.root)!r} "
                            f"({', '.join(absent[:5])}): give the folder that the paths start from (images), or take the rows out.")


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
