"""The embedded sample: 2,000 training and 1,000 test photographs of CIFAR-10, in WebDataset shards beside this file. Needs no network."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import webdataset

from aft.errors import DataError
from datamodules.base import LabelledImages, Listing
from datamodules.zero_shot_table import table

DATA = Path(__file__).parent / "sample_data"


class ShardSource:
    """The members of a few small local shards, held in memory, in shard order.

    Args:
        shards: paths of the tars; each sample has ``.jpg`` and ``.cls`` (the label as text).

    Raises:
        DataError: there is no shard, or a sample lacks one of the two.
    """

    def __init__(self, shards: list[Path]) -> None:
        if not shards:
            raise DataError(f"{DATA} holds no shards: build them with python -m datamodules.build_sample --cifar10 data/cifar10.")
        # Whole on every process: the default splitters would raise under DDP, or give a loader worker a part.
        samples = list(webdataset.WebDataset([str(path) for path in shards], shardshuffle=False, nodesplitter=None, workersplitter=None))
        bad = [sample["__key__"] for sample in samples if "jpg" not in sample or "cls" not in sample]
        if bad:
            raise DataError(f"samples of {shards[0].parent} lack .jpg or .cls ({', '.join(bad[:5])}): build the shards again.")
        self.keys = tuple(sample["__key__"] for sample in samples)
        self.labels = tuple(int(sample["cls"]) for sample in samples)
        self._jpegs = tuple(sample["jpg"] for sample in samples)

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, position: int) -> str:
        """Key of the sample, ``CLASS/NNNN``."""
        return self.keys[position]

    def read(self, position: int) -> bytes:
        """The JPEG's bytes."""
        return self._jpegs[position]


class Sample(LabelledImages):
    """The embedded photographs (balanced, 10 classes, RGB 32 x 32), whole on every process.

    Args:
        **kwargs: what every labelled set takes, see ``LabelledImages``.

    Raises:
        DataError: on first use, when the shards are missing.
    """

    name = "sample"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sources: dict[str, ShardSource] = {}

    @property
    def terms(self) -> str | None:
        """Those of CIFAR-10, which the photographs are from."""
        return self.given_terms or table()["cifar10"].terms

    @cached_property
    def _classes(self) -> tuple[tuple[str, ...], ...]:
        return tuple((name,) for name in json.loads((DATA / "classes.json").read_text(encoding="utf-8"))["classes"])

    def all_classes(self) -> tuple[tuple[str, ...], ...]:
        """For each class its name."""
        return self._classes

    def listing(self, split: Literal["train", "test"]) -> Listing:
        """The photographs of a split and their labels."""
        if split not in self._sources:
            self._sources[split] = ShardSource(sorted(DATA.glob(f"{split}-*.tar")))
        source = self._sources[split]
        return Listing(source, torch.tensor(source.labels))
