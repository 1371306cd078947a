"""Result files: one card is one JSON file with one measured figure and all that one must know to believe it.

Beside ``NAME.json`` lies ``NAME.npz`` with a verdict a sample. Files appear whole or not at all.
Shapes: N samples, A attacks.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aft.errors import DataError, unknown_name

SCHEMA = "aft.card/1"

#: One figure and how it came about; keys as in ``KEYS`` and ``BLOCKS``.
Card = dict[str, Any]

#: One array a column, all of one length, with the columns ``row`` (place in the set) and ``index`` (stable number) among them.
Verdicts = dict[str, NDArray[Any]]

#: Every key of a card. ``clean_accuracy``, ``robust_accuracy``, ``chance`` and ``largest_class_share`` are shares in [0, 1];
#: ``per_attack`` is the accuracy left after each attack *in turn* (an image that one has broken is not shown to the next);
#: ``largest_class_share`` is the larger of the shares among clean and among attacked predictions.
KEYS = (
    "schema", "cell", "status", "task", "model", "data", "protocol", "threat", "attacks", "defense", "seeds", "precision",
    "clean_accuracy", "robust_accuracy", "per_attack", "metrics", "standard_error", "chance", "largest_class_share", "verdict", "cost",
    "versions", "commit", "dirty", "command", "created", "external",
)  # fmt: skip

#: The keys of each block that has fixed ones; ``data.classes`` is their number, ``attacks.n`` the images an attack is planned for.
BLOCKS: dict[str, tuple[str, ...]] = {
    "model": ("name", "method", "sha256", "base_sha256", "layout", "resolution", "mean", "std", "activation", "logit_scale",
              "text_transform", "eps_trained"),
    "data": ("name", "split", "n", "index_sha256", "classes", "classes_sha256", "label_space", "templates_sha256"),
    "protocol": ("name", "fidelity"),
    "threat": ("norm", "eps", "space", "resolution"),
    "attacks": ("name", "loss", "steps", "step_size", "restarts", "keep", "eot", "target", "n"),
    "defense": ("name", "settings", "gate_rates", "eot_cosine", "zero_gradient_fraction", "draws", "cost_multiplier"),
    "seeds": ("attack", "selection", "scoring"),
    "standard_error": ("clean", "robust"),
    "verdict": ("status", "failed_checks"),
    "cost": ("forwards", "backwards", "seconds", "device"),
    "external": ("robust_accuracy", "source"),
}  # fmt: skip

MAY_BE_NONE = {"threat", "defense", "external"}
STATUSES = ("complete", "partial")
VERDICTS = ("reliable", "suspect", "unchecked")


def digest(content: object) -> str:
    """sha256 of plain values as canonical JSON: keys sorted, no spaces, no NaN.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def cell_of(identity: Mapping[str, Any]) -> str:
    """The name of a cell: 16 hexadecimal digits over everything that identifies it, and nothing that only happened to it.

    Args:
        identity: task, model, data, protocol, threat, attacks, defense, seeds, precision, as plain values.
    """
    return digest(identity)[:16]


def standard_error(share: float, n: int) -> float:
    """``sqrt(p (1 - p) / n)`` of a share ``p`` among ``n`` samples.

    Example:
        >>> standard_error(0.5, 100)
        0.05
    """
    return math.sqrt(share * (1 - share) / n)


def attack_success(clean: float, robust: float | None, n: int) -> dict[str, dict[str, float | None]]:
    """A card's ``metrics.attack_success``, by both definitions in use; empty where nothing was attacked.

    ``drop``: clean minus robust accuracy, a share of all ``n`` samples. ``of_right``: of the samples that are right when clean, the share
    that is wrong after the attack, ``1 - robust / clean``; none where none is right. Each with its standard error.

    Args:
        clean, robust: accuracies, shares of the same ``n`` samples; robust means right when clean, too.

    Example:
        >>> attack_success(0.8, 0.6, 100)["attack_success"]["drop"], attack_success(0.8, 0.6, 100)["attack_success"]["of_right"]
        (0.2, 0.25)
    """
    if robust is None:
        return {}
    drop, right = round(clean - robust, 12), round(clean * n)
    of_right = round(1 - robust / clean, 12) if right else None
    return {"attack_success": {
        "drop": drop, "drop_standard_error": standard_error(drop, n), "of_right": of_right,
        "of_right_standard_error": None if of_right is None else standard_error(of_right, right),
    }}  # fmt: skip


def with_external(card: Card, robust_accuracy: float, source: str) -> Card:
    """The card with what somebody else's attack left of its images; tables show the lower of the two accuracies.

    Args:
        card: with a robust accuracy.
        robust_accuracy: share in [0, 1] of the card's own images, at its radius.
        source: who attacked, and how; where it can be read.

    Raises:
        DataError: no robust accuracy to lower, a number that does not lower it, or no source.
    """
    before = lowered(card)["robust_accuracy"]
    if before is None:
        raise DataError("this card has no robust accuracy: an attack from outside belongs to a card that was attacked.")
    if not 0 <= robust_accuracy < before:
        raise DataError(f"robust_accuracy = {robust_accuracy:g} does not lower {before:g}: give a share from 0 to below it (0.12, not 12).")
    if not source.strip():
        raise DataError("source is empty: say who attacked, and how, so that it can be checked.")
    return {**card, "external": {"robust_accuracy": robust_accuracy, "source": source}}


def lowered(card: Card) -> Card:
    """The card as tables show it: its robust accuracy is the lower of its own and of an external attack's."""
    told = card["external"]
    if told is None or card["robust_accuracy"] is None or told["robust_accuracy"] >= card["robust_accuracy"]:
        return card
    error = standard_error(told["robust_accuracy"], card["data"]["n"])
    return {**card, "robust_accuracy": told["robust_accuracy"], "standard_error": {**card["standard_error"], "robust": error}}


def validate(card: Mapping[str, Any], origin: str = "card") -> Card:
    """Checks that a card has this schema's keys: all of them and no other.

    Raises:
        DataError: another schema, a key missing or unknown (near matches are listed), or a status that does not exist.
    """
    if card.get("schema") != SCHEMA:
        raise DataError(f"{origin}: schema {card.get('schema')!r} is not {SCHEMA!r}: read it with the version of aft that wrote it.")
    _check_keys(card, KEYS, origin)
    for block, keys in BLOCKS.items():
        for part in card[block] if block == "attacks" else [card[block]]:
            if part is not None or block not in MAY_BE_NONE:
                _check_keys(part, keys, f"{origin}: {block}")
    for name, given, allowed in (("status", card["status"], STATUSES), ("verdict", card["verdict"]["status"], VERDICTS)):
        if given not in allowed:
            raise DataError(f"{origin}: {unknown_name(name, str(given), allowed)}")
    return dict(card)


def _check_keys(part: object, keys: tuple[str, ...], origin: str) -> None:
    if not isinstance(part, Mapping):
        raise DataError(f"{origin} is {part!r}: it should be an object with the keys {', '.join(keys)}.")
    for key in part:
        if key not in keys:
            raise DataError(f"{origin}: {unknown_name('key', str(key), keys)}")
    if missing := [key for key in keys if key not in part]:
        raise DataError(f"{origin} lacks {', '.join(missing)}: measure it again, or add what is missing (null where it is not known).")


def write(path: Path, card: Card, verdicts: Verdicts | None = None) -> None:
    """Writes a card, and its samples' verdicts beside it; the card last, so that where it stands all of it stands.

    Raises:
        DataError: the card does not follow the schema.
    """
    text = json.dumps(validate(card, str(path)), indent=2, allow_nan=False) + "\n"
    if verdicts is not None:
        write_arrays(path.with_suffix(".npz"), verdicts)
    write_whole(path, text.encode())


def read(path: Path) -> Card:
    """Reads a card.

    Raises:
        DataError: no such file, no JSON, or not this schema.
    """
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a card ({error}): give a JSON file that eval.py wrote.") from error
    if not isinstance(card, dict):
        raise DataError(f"{path} holds a {type(card).__name__}, not a card: give a JSON file that eval.py wrote.")
    return validate(card, str(path))


def read_complete(path: Path) -> Card | None:
    """A complete card; none where the file is JSON of another kind.

    Raises:
        DataError: half written, damaged, or of another schema.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is half written or no JSON ({error}): run the command that wrote it again.") from error
    if not isinstance(content, dict) or str(content.get("schema")).partition("/")[0] != SCHEMA.partition("/")[0]:
        return None
    card = validate(content, str(path))
    if card["status"] != "complete":
        raise DataError(f"{path}: status {card['status']}: not all of its images are measured; run its command again to go on.")
    needed = ("clean", "robust") if card["threat"] is not None else ("clean",)
    for kind in needed:
        share, width = card[f"{kind}_accuracy"], card["standard_error"][kind]
        if not isinstance(share, int | float) or not isinstance(width, int | float):
            raise DataError(f"{path}: {kind}_accuracy {share!r} with standard error {width!r}: no number; measure it again.")
    return card


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Writes arrays as one ``.npz``, whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_whole(path, buffer.getvalue())


def read_arrays(path: Path, only: Collection[str] | None = None) -> Verdicts:
    """Reads a ``.npz`` of plain arrays, or those of some names; never runs code.

    Raises:
        DataError: the file is damaged.
        FileNotFoundError: there is none.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files if only is None or name in only}
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise DataError(f"{path} is damaged ({error}): delete it and run the same command again.") from error


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all, also after a power cut: beside the target, to the disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def join(parts: Iterable[Verdicts]) -> Verdicts:
    """One table of many: every row once (the first that comes), in the order of rows.

    Rows come twice where two processes did the same work; they are equal then, since a verdict depends on its sample alone.

    Raises:
        DataError: no parts, or parts with other columns.
    """
    tables = list(parts)
    if not tables or any(table.keys() != tables[0].keys() for table in tables):
        raise DataError("verdicts to join must be one table or more with the same columns: these are of other runs; use one folder a run.")
    whole = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    _, first = np.unique(whole["row"], return_index=True)
    return {name: column[first] for name, column in whole.items()}
