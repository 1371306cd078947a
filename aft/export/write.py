"""One export: checked, written beside its place, read back and compared, given its model card, and then put in its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from aft.cards import Card, write
from aft.clip.model import ZeroShotModel
from aft.errors import ConfigError, unknown_name
from aft.export.check import check_written
from aft.export.folder import FACTS, facts_of, hashes_of, whole_folder, write_json
from aft.export.formats import FORMATS, Head
from aft.export.model_card import Provenance, defense_of, model_card


def export(
    model: ZeroShotModel,
    kind: str,
    out: Path,
    *,
    head: Head | None = None,
    half: bool = False,
    cards: Sequence[Card] = (),
    told: Provenance | None = None,
) -> dict[str, str]:
    """Writes a model for another library; the folder is there whole or not at all.

    Args:
        model: in eval mode, plain or behind a defence. It is not changed.
        kind: a name of ``FORMATS``.
        out: a folder that is not there yet, or is empty.
        head: classes to bake into a graph's logits; none: no logits.
        half: store weights in fp16.
        cards: of these weights (:func:`aft.export.cards_below`); they are shown in README.md and copied to ``cards/``.
        told: title, licence and training data for README.md; none: README.md says what the weights say, or that they are missing.

    Returns:
        sha256 of every file but README.md.

    Raises:
        ConfigError: an unknown format, one that has no place for what the model does, a missing extra, or a folder that is not empty.
        WeightsError: what was written does not say what the model says.
    """
    head, told = head or Head(), told or Provenance()
    refuse_request(kind, head, half)
    made = FORMATS[kind]
    made.check(model, head)
    with whole_folder(out) as folder:
        templates = list(head.templates) if head.classes else []
        facts = facts_of(model, kind, defense=defense_of(model), classes=list(head.classes), templates=templates)
        with torch.no_grad():
            made.write(model, folder, head, half, facts)
        difference = check_written(model, kind, folder, head, half)
        for number, card in enumerate(cards):
            write(folder / "cards" / f"{number:03d}-{card['cell']}.json", card)
        weights = hashes_of(folder)
        write_json(folder / FACTS, {**facts, "half": half, "largest_difference": difference, "files": weights})
        files = hashes_of(folder)
        text = model_card(model, kind, made, head, half, cards, told, {name: sha for name, sha in files.items() if "/" not in name})
        (folder / "README.md").write_text(text, encoding="utf-8")
    return files


def refuse_request(kind: str, head: Head, half: bool) -> None:
    """Raises ConfigError for what no model could be exported with: it can be said before a large one is read."""
    if kind not in FORMATS:
        raise ConfigError(unknown_name("format", kind, FORMATS))
    made = FORMATS[kind]
    if not made.graph and head.classes:
        raise ConfigError(f"--classes: {kind} has no class head, its text tower makes one; classes are for {_graphs()}.")
    if made.graph and half:
        raise ConfigError(f"--half: {kind} is a graph in fp32; half is for the formats of weights.")


def _graphs() -> str:
    return " and ".join(name for name, made in FORMATS.items() if made.graph)
