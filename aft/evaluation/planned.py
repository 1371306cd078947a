"""What a protocol may spend, one attack of it, and the pair of attacks that several protocols share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aft.attacks import APGD, APGDTargeted
from aft.attacks.base import Attack
from aft.attacks.objectives import CLASSES_NEEDED, LossName
from aft.attacks.threat_model import Norm


@dataclass(frozen=True)
class Budget:
    """What a protocol may spend, and where.

    Args:
        eps: radius in units of the pixel range.
        steps: of each attack.
        targets: classes that a targeted attack aims at, one after the other; clipped to ``classes - 1``.
        classes: K of the label space.
        norm: ``linf``, ``l2`` or ``l1``.
    """

    eps: float
    steps: int
    targets: int
    classes: int
    norm: Norm = "linf"


@dataclass(frozen=True)
class Planned:
    """One attack of a protocol.

    Args:
        name: such as ``pgd20`` or ``apgd_t``.
        loss: what it maximises.
        attack: the attack itself.
        targets: how many classes it aims at; none for an untargeted one.
        share: of the images, the first ones of their order, that it is shown.
    """

    name: str
    loss: LossName
    attack: Attack
    targets: int | None = None
    share: float = 1.0

    def limit(self, n: int) -> int:
        """How many of ``n`` images it is shown, at least one."""
        return max(1, round(self.share * n))

    def describe(self, n: int) -> dict[str, Any]:
        """The entry of a card's ``attacks``; of ``n`` images."""
        told = self.attack.describe()
        return {
            "name": self.name, "loss": self.loss, "steps": told.get("steps"), "step_size": told.get("step_size"),
            "restarts": told.get("restarts", 1), "keep": told.get("keep", "best"), "eot": told.get("eot", 1), "target": self.targets,
            "n": self.limit(n),
        }  # fmt: skip


def apgd(budget: Budget) -> tuple[Planned, ...]:
    """APGD on cross-entropy, then targeted APGD on the targeted DLR loss.

    Targeted DLR needs 4 classes: with 3, APGD on the margin (``apgd_margin``) takes its place; with 2, where there is one wrong class
    and cross-entropy is a function of the margin, nothing does.
    """
    untargeted = APGD(eps=budget.eps, norm=budget.norm, steps=budget.steps)
    plans = (Planned("apgd_ce", "ce", untargeted),)
    if budget.classes < 3:
        return plans
    if budget.classes < CLASSES_NEEDED["dlr_targeted"]:
        return (*plans, Planned("apgd_margin", "margin", untargeted))
    targets = min(budget.targets, budget.classes - 1)
    targeted = APGDTargeted(eps=budget.eps, norm=budget.norm, steps=budget.steps, targets=targets)
    return (*plans, Planned("apgd_t", "dlr_targeted", targeted, targets))
