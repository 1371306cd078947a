"""Cards that nobody measured, for tests of what is made of cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aft import cards
from aft.cards import Card, Verdicts

HASH = "0123456789abcdef" * 4


def made_up(
    clean: float = 0.5, robust: float | None = 0.25, eps: float = 2 / 255, *, n: int = 100, data: str = "toy", protocol: str = "apgd",
    norm: str = "linf", sha256: str = HASH, task: str = "classification", method: str = "tecoa", steps: int = 100, **more: Any,
) -> Card:  # fmt: skip
    """A whole card; ``robust`` none makes it one of clean images. ``more`` replaces keys of the card."""
    attack = {"name": f"{protocol}_ce", "loss": "ce", "steps": steps, "step_size": "adaptive", "restarts": 1, "keep": "best", "eot": 1,
              "target": None, "n": n}  # fmt: skip
    attacked = robust is not None
    card: Card = {
        "schema": cards.SCHEMA, "status": "complete", "task": task,
        "model": {"name": "tiny", "method": method, "sha256": sha256, "base_sha256": None, "layout": "random", "resolution": 32,
                  "mean": [0.5] * 3, "std": [0.25] * 3, "activation": "gelu", "logit_scale": 20.0, "text_transform": "identity",
                  "eps_trained": 2 / 255},
        "data": {"name": data, "split": "test", "n": n, "index_sha256": HASH, "classes": 5, "classes_sha256": HASH, "label_space": "all",
                 "templates_sha256": HASH},
        "protocol": {"name": protocol if attacked else "clean", "fidelity": "exact"},
        "threat": {"norm": norm, "eps": eps, "space": "native", "resolution": 32} if attacked else None,
        "attacks": [attack] if attacked else [], "defense": None, "seeds": {"attack": 0, "selection": 0, "scoring": None},
        "precision": "fp32", "clean_accuracy": clean, "robust_accuracy": robust,
        "per_attack": {f"{protocol}_ce": robust} if attacked else {},
        "metrics": {}, "standard_error": {"clean": cards.standard_error(clean, n),
                                          "robust": cards.standard_error(robust, n) if attacked else None},
        "chance": 0.2, "largest_class_share": 0.3, "verdict": {"status": "reliable", "failed_checks": []},
        "cost": {"forwards": 1, "backwards": 1, "seconds": 1.0, "device": "cpu"}, "versions": {"python": "3"},
        "commit": "abc", "dirty": False,
        "command": "python eval.py --made up", "created": "2026-01-01T00:00:00+00:00", "external": None, **more,
    }  # fmt: skip
    identity = ("task", "model", "data", "protocol", "threat", "attacks", "seeds")
    return {"cell": cards.cell_of({name: card[name] for name in identity}), **card}


def verdicts(right: list[int], start: int = 0) -> Verdicts:
    """Verdicts on images that are all right when clean; ``right`` under attack."""
    count = np.arange(len(right))
    right_n1 = np.array(right, bool)[:, None]
    return {"row": count, "index": count + start, "clean": np.ones(len(right), bool), "right": right_n1, "label": count % 5,
            "clean_answer": count % 5, "answer": (count + 1) % 5}  # fmt: skip


def stored(folder: Path, label: str, card: Card, name: str | None = None, table: Verdicts | None = None) -> Path:
    """Writes a card where ``eval.py`` would, below ``folder/cards/label``."""
    path = folder / "cards" / label / f"{name or card['cell']}.json"
    cards.write(path, card, table)
    return path
