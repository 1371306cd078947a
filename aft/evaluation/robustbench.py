"""Cards as model entries in the form that RobustBench keeps (``model_info/DATA/THREAT/MODEL.json``): accuracies in %, as text.

``reported`` is the lowest accuracy that this project measured, ``autoattack_acc`` stands only where AutoAttack's own code ran under its
exact name, ``external`` is the lowest of attacks from outside. ``footnote`` has every protocol with n, standard error and verdict.
``unreliable`` is true unless every verdict is reliable; ``additional_data`` is true, since a CLIP is pre-trained on other data.
``link``, ``authors`` and ``venue`` are left empty, for whoever publishes.

Reference:
    Croce et al., arXiv 2010.09670 (RobustBench).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aft import cards
from aft.cards import Card
from aft.evaluation.published import printed
from aft.evaluation.report import Labelled, eps_text, percent, rows_of

THREATS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
AUTOATTACK = "autoattack_standard"


def entry(label: str, found: Sequence[Card]) -> dict[str, Any]:
    """One model on one data set at one radius, from the cards of all protocols."""
    first, lowest = found[0], min(found, key=lambda card: float(card["robust_accuracy"]))
    told: dict[str, Any] = {
        "link": "", "name": f"{first['model']['name']}, {first['model']['method']}", "authors": "", "additional_data": True,
        "number_forward_passes": (first["defense"] or {}).get("draws") or 1, "dataset": first["data"]["name"], "venue": "",
        "architecture": first["model"]["name"], "eps": eps_text(first), "clean_acc": _text(first["clean_accuracy"]),
        "reported": _text(lowest["robust_accuracy"]),
    }  # fmt: skip
    for card in found:
        if card["protocol"] == {"name": AUTOATTACK, "fidelity": "exact"}:
            told["autoattack_acc"] = _text(card["robust_accuracy"])
    if lowered := [card["external"] for card in found if card["external"]]:
        told["external"] = _text(min(one["robust_accuracy"] for one in lowered))
    figures = [f"{printed(card['protocol'])} {percent(card['robust_accuracy'], card['standard_error']['robust'])} % "
               f"({card['verdict']['status']})" for card in found]  # fmt: skip
    note = [f"{label}: n = {first['data']['n']}, {'; '.join(figures)}", f"weights {first['model']['sha256']}"]
    note += [f"external: {one['source']}" for one in lowered]
    return {**told, "footnote": "; ".join(note), "unreliable": any(card["verdict"]["status"] != "reliable" for card in found)}


def export(labelled: Sequence[Labelled], out: Path) -> list[Path]:
    """Writes one file a model, data set, label space and radius; clean figures have none.

    Returns:
        The files.
    """
    written = []
    for row in rows_of([one for one in labelled if one[1]["threat"] is not None]):
        label, first = row[0]
        parts = [label, first["data"]["label_space"], eps_text(first)]
        name = "-".join("".join(letter if letter.isalnum() or letter in "._=" else "_" for letter in part) for part in parts)
        path = out / first["data"]["name"] / THREATS[first["threat"]["norm"]] / f"{name}.json"
        cards.write_whole(path, (json.dumps(entry(label, [card for _, card in row]), indent=2) + "\n").encode())
        written.append(path)
    return written


def _text(share: float) -> str:
    return f"{100 * share:.2f}"
