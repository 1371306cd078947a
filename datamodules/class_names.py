"""Class names, and phrases that are true of a class, from a text or JSON file or from the folders' names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aft.errors import DataError

Phrases = tuple[str, ...]
HYPERNYMS = 2  # parents whose names are true and telling; further up come foods under "garden truck" and all under "entity"


def from_folder(folder: str) -> Phrases:
    """A folder's name as a class name: ``_`` and ``-`` become spaces."""
    return (clean(folder.replace("_", " ").replace("-", " ")),)


def clean(name: str) -> str:
    """A name with single spaces and none around it."""
    return " ".join(name.split())


def read(path: str | Path, folders: Sequence[str]) -> tuple[Phrases, ...]:
    """The phrases of each folder from a classes file.

    Args:
        path: ``.json`` (a list of names in sorted folder order, or a mapping from folder to name, or to a record
            ``{names, gloss, hypernyms}``), or a text file (a name a line in sorted folder order, or ``folder<TAB>name``).
        folders: the class folders, sorted.

    Returns:
        For each folder its phrases, the class name first.

    Raises:
        DataError: the file is missing, cannot be read, or does not name every folder.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        given = json.loads(text) if str(path).lower().endswith(".json") else parse_lines(text)
    except (OSError, ValueError) as error:
        raise DataError(f"classes file {str(path)!r} cannot be read ({error}): give a text or JSON file, or set classes: auto.") from error
    if isinstance(given, Mapping):
        missing = [folder for folder in folders if folder not in given]
        if missing:
            raise DataError(f"classes file {str(path)!r} names no class for {len(missing)} folders ({', '.join(missing[:5])}): add them.")
        given = [given[folder] for folder in folders]
    if not isinstance(given, list) or len(given) != len(folders):
        count = len(given) if isinstance(given, list) else "no list of"
        raise DataError(f"classes file {str(path)!r} has {count} names for {len(folders)} class folders: one each, sorted by folder.")
    return tuple(to_phrases(entry, folder, path) for entry, folder in zip(given, folders, strict=True))


def parse_lines(text: str) -> list[str] | dict[str, str]:
    """Lines of a text file: names, or ``folder<TAB>name`` when every line has a tab; empty lines are left out."""
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and all("\t" in line for line in lines):
        return {folder.strip(): name for folder, name in (line.split("\t", 1) for line in lines)}
    return lines


def to_phrases(entry: Any, folder: str, path: str | Path) -> Phrases:
    """A name, or the phrases of a record: all its names, all names of its first two hypernyms, its gloss; each once.

    Raises:
        DataError: the entry is neither, or has no name.
    """
    if isinstance(entry, str):
        phrases = [entry]
    elif isinstance(entry, Mapping) and isinstance(entry.get("names"), list):
        parents = [name for names in entry.get("hypernyms", [])[:HYPERNYMS] for name in names]
        phrases = [*entry["names"], *parents, *([entry["gloss"]] if entry.get("gloss") else [])]
    else:
        raise DataError(f"classes file {str(path)!r}: the entry of {folder!r} is {entry!r}: give a name, or a record with 'names'.")
    phrases = [clean(str(phrase)) for phrase in phrases]
    if not phrases or not phrases[0]:
        raise DataError(f"classes file {str(path)!r}: {folder!r} has no name: give one.")
    return tuple(dict.fromkeys(phrase for phrase in phrases if phrase))
