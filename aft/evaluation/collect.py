"""Finds cards below folders. What cannot be read is named and counted, and the rest is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aft import cards
from aft.cards import Card
from aft.errors import DataError

#: A card and the label of its model, which is the name of the card's folder.
Labelled = tuple[str, Card]


@dataclass(frozen=True)
class Unread:
    """A file that should be a card and is not shown, and why."""

    path: Path
    why: str


@dataclass
class Collection:
    """Cards found below some folders.

    Args:
        labelled: each with the label of its model, in the order of their paths.
        paths: the file of each.
        unread: cards that are half written, damaged, or of another schema.
        repeated: how many cards lie there more than once under one label; they are shown once.
    """

    labelled: list[Labelled] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)
    repeated: int = 0

    def verdicts(self, place: int) -> cards.Verdicts | None:
        """The verdict on each sample that lies beside a card; none where there is none, or a damaged one."""
        try:
            return cards.read_arrays(self.paths[place].with_suffix(".npz"))
        except (FileNotFoundError, DataError):
            return None


def collect(folders: Sequence[Path]) -> Collection:
    """All cards below some folders, each labelled by the folder it lies in, and by its weights where one folder has several.

    Args:
        folders: or single files; a file that is no JSON is passed over, so that ``runs/*`` may be given.

    Raises:
        DataError: a folder is not there, no card can be shown, or two cards say different things of one cell.
    """
    found = Collection()
    for path in _files(folders):
        try:
            card = cards.read_complete(path)
        except DataError as error:
            found.unread.append(Unread(path, str(error).removeprefix(f"{path} ").removeprefix(f"{path}: ")))
            continue
        if card is not None:
            found.labelled.append((path.parent.name, card))
            found.paths.append(path)
    if not found.labelled:
        raise DataError(_nothing(folders, found.unread))
    _agree(found)
    return _told_apart(_once(found))


def _files(folders: Sequence[Path]) -> list[Path]:
    for folder in folders:
        if not folder.exists():
            raise DataError(f"{folder} does not exist: give folders that eval.py evaluate wrote cards to, such as runs/eval/cards.")
    inside = [sorted(folder.rglob("*.json")) if folder.is_dir() else [folder] for folder in folders]
    unique = {path.resolve(): path for paths in inside for path in paths if path.suffix == ".json"}
    return list(unique.values())


def _nothing(folders: Sequence[Path], unread: Sequence[Unread]) -> str:
    text = f"no cards below {', '.join(map(str, folders))}: give folders that eval.py evaluate wrote cards to."
    if unread:
        text += f" {len(unread)} could not be read; the first, {unread[0].path}: {unread[0].why}"
    return text


def _agree(found: Collection) -> None:
    first: dict[str, tuple[Path, Card]] = {}
    for path, (_, card) in zip(found.paths, found.labelled, strict=True):
        other, before = first.setdefault(card["cell"], (path, card))
        if any(before[key] != card[key] for key in ("clean_accuracy", "robust_accuracy")):
            raise DataError(f"{other} and {path} measured the same and differ: keep the one that you trust, or measure again.")


def _once(found: Collection) -> Collection:
    """One card a label and cell: of several copies that with an external number, else the newest."""
    kept: dict[tuple[str, str], int] = {}
    for place, (label, card) in enumerate(found.labelled):
        before = kept.setdefault((label, card["cell"]), place)
        if _weight(card) > _weight(found.labelled[before][1]):
            kept[label, card["cell"]] = place
    order = sorted(kept.values())
    return Collection([found.labelled[i] for i in order], [found.paths[i] for i in order], found.unread, len(found.labelled) - len(order))


def _weight(card: Card) -> tuple[bool, int, str]:
    told = card["metrics"].get("checks") or {}
    return card["external"] is not None, len(told.get("made", ())), str(card["created"])


def _told_apart(found: Collection) -> Collection:
    weights: dict[str, set[str]] = {}
    for label, card in found.labelled:
        weights.setdefault(label, set()).add(card["model"]["sha256"])
    found.labelled = [
        (f"{label}@{card['model']['sha256'][:6]}" if len(weights[label]) > 1 else label, card) for label, card in found.labelled
    ]
    return found
