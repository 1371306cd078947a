"""A card's verdict: what the automatic doubts say of the model, the images and the attack behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aft.attacks.sight import Sight
from aft.cards import Card, Verdicts
from aft.clip.model import ZeroShotModel
from aft.evaluation.case import Case
from aft.evaluation.doubts import CHEAP, Doubt, dear_of, doubted, each_loss
from aft.evaluation.judge import Cell, scoring
from aft.evaluation.protocols import EOT

#: Images that the cheap doubts look at, and the fewest that any do.
CHEAP_IMAGES, FEWEST_IMAGES = 16, 4
#: Doubts that need no radius: all that can be asked of a clean figure.
WITHOUT_ATTACK = ("E5", "E6", "E7", "E8", "E27", "E28")

#: The doubt that needs other models.
NEEDS_SIBLINGS = "E19"


def with_verdict(card: Card, cell: Cell, verdicts: Verdicts, images: int = 0, siblings: Sequence[ZeroShotModel] = ()) -> Card:
    """The card with its verdict: ``suspect`` with the checks that failed, ``reliable`` where all were made, else ``unchecked``.

    Args:
        card: of the cell; what its verdict already holds against it stays.
        cell: what was measured.
        verdicts: on its images.
        images: right ones, the first of their order, that the dear doubts look at; 0 makes the cheap ones alone.
        siblings: other models, from which images are carried over.
    """
    asked = doubts_of(cell, images, bool(siblings) or bool(cell.model.stages.declared))
    case = case_of(cell, verdicts, images or CHEAP_IMAGES, siblings if images else ())
    if case is None:
        return {**card, "metrics": {**card["metrics"], "checks": {"images": 0, "made": [], "failed": {}}}}
    with scoring(cell.model):
        found = doubted(case, asked)
        losses = {"losses": each_loss(case)} if cell.protocol.eps and images else {}
    made = list(asked)
    if cell.protocol.eps:
        made, found = [*made, "E32"], {**found, **wrong_plan(cell, found)}
        found |= unknown_defence(cell)
        made += ["E33"] if cell.model.stages.declared else []
    before = [name for name in card["verdict"]["failed_checks"] if name not in made]
    failed, whole = [*before, *found], not cell.protocol.eps or images > 0
    checks: dict[str, Any] = {"images": len(case.labels_n), "made": made, "failed": found, **losses}
    status = "suspect" if failed else "reliable" if whole else "unchecked"
    return {**card, "verdict": {"status": status, "failed_checks": failed}, "metrics": {**card["metrics"], "checks": checks}}


def wrong_plan(cell: Cell, found: Mapping[str, str]) -> dict[str, str]:
    """E32: a model whose forwards differ (E6) is attacked over the mean of 20 draws, else its attack aims at one draw alone."""
    most = max(planned.attack.describe().get("eot", 1) for planned in cell.protocol.attacks)
    if "E6" not in found or most >= EOT:
        return {}
    return {"E32": f"a random model was attacked by the mean of {most} of its draws: take {EOT}, as autoattack_rand does"}


def unknown_defence(cell: Cell) -> dict[str, str]:
    """E33: a model behind a defence is judged by attacks that know it, not by a protocol for plain models."""
    if not cell.model.stages.declared:
        return {}
    return {"E33": f"{cell.protocol.name} does not know the defence: measure it by adaptive_small or adaptive"}


def doubts_of(cell: Cell, images: int, siblings: bool = False) -> dict[str, Doubt]:
    """Those that are made for a cell; the one that carries images over only where there are other models."""
    if not cell.protocol.eps:
        return {name: CHEAP[name] for name in WITHOUT_ATTACK}
    dear = {name: doubt for name, doubt in dear_of(cell.protocol.norm or "linf").items() if siblings or name != NEEDS_SIBLINGS}
    return CHEAP | dear if images else CHEAP


def case_of(cell: Cell, verdicts: Verdicts, images: int, siblings: Sequence[ZeroShotModel] = ()) -> Case | None:
    """The first images that are right when clean; none where there are fewer than four, or the task is no classifier.

    An image is called right while the model answers what it answered when clean, which was right.
    """
    rows = verdicts["row"][verdicts["clean"]][:images]
    if len(rows) < FEWEST_IMAGES:
        return None
    model, task = cell.model, cell.task
    device = next(model.parameters()).device
    images_nCHW = cell.in_space(cell.data.batch([int(row) for row in rows]).images.to(device))
    logits = task.classifier(in_the_open(model), task.prepare(model, cell.data))
    if logits is None:
        return None
    answers_n = torch.from_numpy(verdicts["clean_answer"][np.isin(verdicts["row"], rows)]).to(device)
    robust = verdicts["right"][np.isin(verdicts["row"], rows), -1] if verdicts["right"].shape[1] else np.ones(len(rows), dtype=bool)

    def logits_of(one: ZeroShotModel) -> Callable[[Tensor], Tensor]:
        """Over the same answers."""
        found = task.classifier(in_the_open(one), task.prepare(one, cell.data))
        assert found is not None
        return found

    return Case(
        logits, images_nCHW, answers_n, cell.protocol.eps or 0.0, cell.protocol.norm or "linf", modules=[model], seed=cell.seed,
        siblings=[logits_of(other.to(device).eval()) for other in siblings],
        robust_n=torch.from_numpy(robust).to(device), undefended=logits_of(model.undefended) if model.stages.declared else None,
    )  # fmt: skip


def in_the_open(model: ZeroShotModel) -> ZeroShotModel:
    """A random model with new draws at every look; any other as it is."""
    return Sight(model) if model.stages.random else model  # type: ignore[return-value]
