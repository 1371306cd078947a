"""What weights were trained on, and on what terms: it travels with checkpoints and weights files, and ends on model cards.

Each training adds its data set to those of the weights that it started from; what nobody said is there as :data:`UNSAID`, so that a
fine-tuning of unknown weights does not look like a whole history.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

#: One data set: ``name`` (its id) and ``terms`` (of use, such as a licence); none where it is not known.
DataUse = dict[str, str | None]
UNSAID: DataUse = {"name": None, "terms": None}
#: Of weights that come with this project, by their sha256: MiniCLIP-32.
TRAINED_ON: dict[str, tuple[DataUse, ...]] = {
    "25f19f9a1fe265a863f9f8c859b602228a907b514c46c1cada63fc694f240df0": ({"name": "tiny_imagenet32", "terms": "research use"},),
}


def data_use(data: object) -> DataUse:
    """What a datamodule says of itself: its ``name``, else that of its class, and its ``terms``, if it has any."""
    name, terms = (getattr(data, key, None) for key in ("name", "terms"))
    return {"name": str(name or type(data).__name__), "terms": None if terms is None else str(terms)}


def joined(*histories: Iterable[Mapping[str, str | None]]) -> tuple[DataUse, ...]:
    """All of them in order, each data set once."""
    found: list[DataUse] = []
    for use in (dict(use) for history in histories for use in history):
        if use not in found:
            found.append(use)
    return tuple(found)


def data_in(recipe: Mapping[str, str], before: tuple[DataUse, ...]) -> tuple[DataUse, ...]:
    """What a weights file's metadata say; of a fine-tuning that does not say it readably, what is known of the weights before it.

    Args:
        recipe: :func:`aft.clip.files.recipe_in`.
        before: of the weights that it was fine-tuned from.
    """
    if "data" in recipe:
        told = _history(recipe["data"])
        return joined(before, (UNSAID,)) if told is None else joined(told)
    return joined(before, (UNSAID,)) if before and recipe.get("method", "none") != "none" else ()


def _history(words: str) -> list[DataUse] | None:
    """The list that the words say; none where they say something else."""
    try:
        told: Any = json.loads(words)
    except ValueError:
        return None
    whole = isinstance(told, list) and all(
        isinstance(use, dict) and use.keys() == UNSAID.keys() and all(text is None or isinstance(text, str) for text in use.values())
        for use in told
    )
    return told if whole else None
