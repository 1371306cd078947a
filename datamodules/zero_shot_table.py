"""The table of zero-shot sets: one record a set, and the class names and templates that the records name. Data, not code.

The files lie in ``zero_shot_data``; ``sha256.json`` beside them has their hashes, since a changed name or template changes a figure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from aft.errors import DataError

DATA = Path(__file__).parent / "zero_shot_data"
Templates = Literal["single", "ensemble"]


@dataclass(frozen=True)
class InTorchvision:
    """How torchvision knows a set.

    Args:
        kind: name of its class in ``torchvision.datasets``.
        marker: folder below the root that is there when the set is.
        settings: arguments beside the root that choose the test images.
        read: read it by that class; false: the class serves to fetch it, and its class folders are read as they are.
    """

    kind: str
    marker: str
    settings: dict[str, Any]
    read: bool


@dataclass(frozen=True)
class ZeroShotSet:
    """One record of the table.

    Args:
        id: in result files.
        title: for people.
        classes: how many there are.
        images: how many its evaluation split has.
        split: which one that is: ``test``, ``val``, or ``all`` where the set has no official test split.
        side: of every image, pixels; none: images differ, and are resized and cropped.
        single: the one template.
        ensemble: name of the list of templates in ``templates.json``.
        names: name of the list of class names in ``names.json`` (in label order, or by folder); none: the set's own.
        folders: paths below the root where class folders may lie, besides ``ID/test`` and ``ID/test.zip``.
        exclude: class folders, and class names of shards, that are no classes.
        rename: pattern to take out of a folder's name to make it a class name.
        torchvision: how torchvision knows it; none: it does not.
        wds: names that CLIP_benchmark gives it.
        family: sets of one family share classes or images: who was trained on one has seen something of the others.
        layout: what lies where below the root, for messages.
        url: where it comes from.
        licence: what is known of its terms; ``(m)`` at the end: from memory.
    """

    id: str
    title: str
    classes: int
    images: int
    split: str
    side: int | None
    single: str
    ensemble: str
    names: str | None
    folders: tuple[str, ...]
    exclude: tuple[str, ...]
    rename: str | None
    torchvision: InTorchvision | None
    wds: tuple[str, ...]
    family: str
    layout: str
    url: str
    licence: str

    def templates(self, kind: Templates) -> tuple[str, ...]:
        """The one template, or the set's list of them."""
        return (self.single,) if kind == "single" else tuple(content("templates.json")[self.ensemble])

    @property
    def terms(self) -> str:
        """The licence, as a sentence for people who do not know the table."""
        known = self.licence.removesuffix(" (m)")
        return known if known == self.licence else f"{known} (from memory: ask the source)"

    @property
    def given_names(self) -> Mapping[str, str] | tuple[str, ...] | None:
        """Class names by folder, or in label order; none: the set's own."""
        given = None if self.names is None else content("names.json")[self.names]
        return tuple(given) if isinstance(given, list) else given


@cache
def table() -> dict[str, ZeroShotSet]:
    """All sets by id, in the order in which they are measured."""
    return {record["id"]: to_set(record) for record in content("sets.json")}


def to_set(record: Mapping[str, Any]) -> ZeroShotSet:
    """A record from its JSON."""
    known = record["torchvision"] and InTorchvision(**record["torchvision"])
    lists = {key: tuple(record[key]) for key in ("folders", "exclude", "wds")}
    return ZeroShotSet(**{**record, **lists, "torchvision": known})


@cache
def content(name: str) -> Any:
    """What a file of the table holds.

    Raises:
        DataError: it is missing, or is not the file that was shipped.
    """
    return verified(DATA, name)


def verified(folder: Path, name: str) -> Any:
    """The content of a JSON file whose sha256 is in ``sha256.json`` beside it.

    Raises:
        DataError: one of them is missing, or the hash is another.
    """
    try:
        raw, sums = (folder / name).read_bytes(), json.loads((folder / "sha256.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / name} cannot be read ({error}): take it from the repository again.") from error
    if hashlib.sha256(raw).hexdigest() != sums.get(name):
        raise DataError(f"{folder / name} is not the file that sha256.json names: class names or templates were changed. Take it from the "
                        "repository again, or write its new sha256 there if the change is meant.")
    return json.loads(raw)
