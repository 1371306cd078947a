"""The zero-shot suite: every set of the table that is on the disk, to be measured one after the other. It trains nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
from filelock import FileLock

from aft.batch import EvaluationSet
from aft.clip.prompts import warn_of_duplicates
from aft.errors import ConfigError, DataError, unknown_name
from datamodules.common import check_least
from datamodules.images import load
from datamodules.torchvision_sets import construct
from datamodules.zero_shot_layouts import Opened, bases, expected, open_set, usual
from datamodules.zero_shot_table import Templates, ZeroShotSet, table


@dataclass(frozen=True)
class Missing:
    """A set that is not measured, and why.

    Args:
        id: of the set.
        reason: with what to do.
        unreadable: something of it is there, but cannot be read as this set.
    """

    id: str
    reason: str
    unreadable: bool


class ZeroShotSuite(lightning.LightningDataModule):
    """Many test sets under one root; ``eval.py`` measures all of them. Satisfies ``aft.batch.SuiteData``.

    What is not there is said, with what to put where, and the others are measured; a set that is asked for by name must be there.
    Class names and templates are data (``datamodules/zero_shot_data``), see ``docs/zero_shot_suite.md``.

    Args:
        root: folder that holds the sets; each in its own layout, in class folders, or in shards.
        sets: ids of the sets to measure; none: all that are there.
        templates: ``single``: one template a set; ``ensemble``: the mean over the set's list, as CLIP's authors use it.
        image_size: side to which images of sets without a fixed size are resized and cropped, pixels; none: they must have one size.
        cache_bytes: a set is held decoded in memory up to this size, bytes; beyond it each access decodes.
        max_bad_share: largest share of damaged images of a set to leave out, 0 to 1; with more the set is not measured.
        download: fetch what is missing of ``sets`` into ``ROOT/torchvision``, where torchvision can.

    Raises:
        ConfigError: an unknown set (near matches are listed), an empty list, or a download of sets that are not named.
    """

    def __init__(self, root: str = "data", sets: list[str] | None = None, templates: Templates = "single", image_size: int | None = 224,
                 cache_bytes: int = 64 * 2**20, max_bad_share: float = 0.01, download: bool = False) -> None:
        super().__init__()
        check_least(image_size=(1 if image_size is None else image_size, 1), cache_bytes=(cache_bytes, 0), max_bad_share=(max_bad_share, 0))
        if templates not in ("single", "ensemble"):
            raise ConfigError(unknown_name("templates", templates, ("single", "ensemble")))
        for name in sets or ():
            if name not in table():
                raise ConfigError(unknown_name("set of the zero-shot suite", name, table()))
        if sets is not None and not sets:
            raise ConfigError("sets is empty: name one set or more, or give null for all that are there.")
        if download and sets is None:
            raise ConfigError("download: true fetches the sets that are named: give sets (all of them together are more than 100 GB).")
        self.root, self.named, self.kind, self.image_size = Path(root), sets, templates, image_size
        self.cache_bytes, self.max_bad_share, self.download = cache_bytes, max_bad_share, download
        self.missing: list[Missing] = []

    @property
    def families(self) -> dict[str, str]:
        """The family of each set of the table: who was trained on one of a family has seen something of the others."""
        return {record.id: record.family for record in table().values()} | {"sample": "cifar10"}

    @property
    def sizes(self) -> dict[str, int]:
        """Images of the evaluation split of each set of the table, whether it is there or not."""
        return {record.id: record.images for record in table().values()}

    def evaluation_sets(self, split: str) -> list[EvaluationSet]:
        """Every set that is there (or is named), in the order of the table.

        Args:
            split: ``test``; which images of a set that means is in the table, and on the cards.

        Raises:
            ConfigError: another split.
            DataError: a named set is not there or cannot be read, or there is none at all.
        """
        if split != "test":
            raise ConfigError(f"split = {split!r}: the zero-shot suite has test images alone; set split: test.")
        chosen = [record for record in table().values() if self.named is None or record.id in self.named]
        self.missing = []
        found = [one for record in chosen if (one := self._set(record)) is not None]
        if not found:
            raise DataError(f"no set of the zero-shot suite can be read below {str(self.root)!r}. {self._told()}")
        self._say(len(found), len(chosen))
        return found

    def _set(self, record: ZeroShotSet) -> EvaluationSet | None:
        """A set, or a note that it is missing."""
        try:
            if self.download:
                self._fetch(record)
            opened = open_set(record, self.root)
            if opened is not None:
                return self._load(record, opened)
        except DataError as error:
            if self.named is not None:
                raise
            self.missing.append(Missing(record.id, str(error), True))
            return None
        if self.named is not None:
            raise DataError(f"the set {record.id} is asked for, but is not below {str(self.root)!r}: put there {expected(record)} "
                            f"(from {record.url}).")
        self.missing.append(Missing(record.id, f"{record.layout} (from {record.url})", False))
        return None

    def _load(self, record: ZeroShotSet, opened: Opened) -> EvaluationSet:
        """Looks at every file, and leaves damaged ones out."""
        store = load(opened.source, image_size=None if record.side else self.image_size, cache_bytes=self.cache_bytes,
                     max_bad_share=self.max_bad_share)
        if record.side and store.size != (record.side, record.side):
            raise DataError(f"{record.id}: images of {opened.where} are {store.size[1]} x {store.size[0]} pixels where {record.title} has "
                            f"{record.side} x {record.side}: another set, or resized: give the originals.")
        warn_of_duplicates(opened.names)
        kept = store.positions_N
        index_M = torch.arange(len(opened.labels)) if opened.index is None else torch.tensor(opened.index)
        split = record.split if opened.whole or record.split != "all" else "test"
        print("; ".join([f"{record.id} ({split}): {len(kept):,} images, {len(opened.names)} classes, from {opened.where}",
                         *short_of(record, split, len(opened.labels)), *opened.remarks]))
        return EvaluationSet(record.id, split, store, torch.tensor(opened.labels)[kept], index_M[kept], opened.names,
                             record.templates(self.kind))

    def _say(self, found: int, of: int) -> None:
        """How many sets there are, and what is missing."""
        wrong = sum(one.unreadable for one in self.missing)
        print(f"zero-shot suite: {found} of {of} sets are measured, {of - found - wrong} are not there, {wrong} cannot be read."
              + (f" {self._told()}" if self.missing else ""))

    def _told(self) -> str:
        """What is missing, a line each."""
        lines = "".join(f"\n  {one.id}: {one.reason}" for one in self.missing)
        return f"To measure a set, put its files below {self.root} as its line says; any set also as {usual('ID')}.{lines}"

    def _fetch(self, record: ZeroShotSet) -> None:
        """Lets torchvision fetch a set that is not there; one process at a time.

        Raises:
            DataError: torchvision cannot.
        """
        place, known = bases(self.root)[1], record.torchvision
        if known is None:
            return
        os.makedirs(place, exist_ok=True)
        with FileLock(place / f".{record.id}.lock"):
            if open_set(record, self.root) is None:
                construct(known.kind, str(place), **known.settings, download=True)


def short_of(record: ZeroShotSet, split: str, count: int) -> list[str]:
    """A remark where a set has another number of images than the table says."""
    if count == record.images:
        return []
    what = f"the whole set has {record.images:,}" if split != record.split else f"not all, or others: {record.title} has {record.images:,}"
    return [what]
