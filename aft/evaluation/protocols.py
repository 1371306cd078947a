"""Named lists of attacks, and what they become for a number of classes.

A name says exactly what runs: ``apgd`` is APGD-CE and then targeted APGD, and is never called AutoAttack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from aft.attacks import APGD, PGD, APGDTargeted
from aft.attacks.base import Attack
from aft.attacks.objectives import CLASSES_NEEDED, LossName
from aft.attacks.threat_model import Norm, pixel_fraction
from aft.errors import ConfigError, unknown_name

#: Step size of the evaluation's PGD as a share of eps, times the number of steps: the walk can cross the ball (arXiv 1706.06083).
PGD_REACH = 2.5
STRICT_STEPS, STRICT_TARGETS = 100, 9


@dataclass(frozen=True)
class Budget:
    """What a protocol may spend, and where.

    Args:
        eps: radius in units of the pixel range.
        steps: of each attack.
        targets: classes that a targeted attack aims at, one after the other; clipped to ``classes - 1``.
        classes: K of the label space.
        norm: ``linf`` or ``l2``.
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
    """

    name: str
    loss: LossName
    attack: Attack
    targets: int | None = None

    def describe(self, n: int) -> dict[str, Any]:
        """The entry of a card's ``attacks``; ``n`` is the number of images it is planned for."""
        told = self.attack.describe()
        return {
            "name": self.name, "loss": self.loss, "steps": told.get("steps"), "step_size": told.get("step_size"),
            "restarts": told.get("restarts", 1), "keep": told.get("keep", "best"), "eot": told.get("eot", 1), "target": self.targets,
            "n": n,
        }  # fmt: skip


@dataclass(frozen=True)
class Protocol:
    """A list of attacks under one name; robust means right on the clean image and under every one of them.

    Args:
        name: the protocol's.
        attacks: in the order they run.
        norm, eps: the threat model; none without attacks.
        fidelity: ``exact``: it is what its name says everywhere; ``like``: it follows another's protocol but for some detail.
    """

    name: str
    attacks: tuple[Planned, ...] = ()
    norm: Norm | None = None
    eps: float | None = None
    fidelity: Literal["exact", "like"] = "exact"


def pgd(budget: Budget) -> tuple[Planned, ...]:
    """PGD on cross-entropy from a random start; the best iterate counts."""
    attack = PGD(eps=budget.eps, norm=budget.norm, steps=budget.steps, relative_step_size=PGD_REACH / budget.steps, keep="best")
    return (Planned(f"pgd{budget.steps}", "ce", attack),)


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


def strict(budget: Budget) -> tuple[Planned, ...]:
    """``apgd`` with 100 steps and 9 targets, whatever the command asks for."""
    return apgd(Budget(budget.eps, STRICT_STEPS, STRICT_TARGETS, budget.classes, budget.norm))


PROTOCOLS: dict[str, Callable[[Budget], tuple[Planned, ...]]] = {"clean": lambda _: (), "pgd": pgd, "apgd": apgd, "strict": strict}


def plan(name: str, *, eps: float | str, steps: int, targets: int, classes: int, norm: Norm = "linf") -> Protocol:
    """The attacks that a protocol means for this radius and this number of classes.

    Args:
        name: one of ``PROTOCOLS``.
        eps: radius in units of the pixel range, a number or a text such as ``"2/255"``; not read by ``clean``.
        steps: of each attack.
        targets: of a targeted attack, clipped to ``classes - 1``.
        classes: K of the label space, 2 or more.
        norm: ``linf`` or ``l2``.

    Raises:
        ConfigError: unknown name, a radius of 0 or outside the pixel range, no steps, no targets, or fewer than 2 classes.
    """
    if name not in PROTOCOLS:
        raise ConfigError(unknown_name("protocol", name, PROTOCOLS))
    if classes < 2:
        raise ConfigError(f"a label space of {classes} class cannot be got wrong: give two classes or more.")
    if name == "clean":
        return Protocol("clean")
    radius = pixel_fraction(eps)
    if radius == 0:
        raise ConfigError("eps = 0 leaves an attack nothing to change: use the protocol clean.")
    for setting, value in (("steps", steps), ("targets", targets)):
        if value < 1:
            raise ConfigError(f"{setting} = {value} is too small: give 1 or more, or use the protocol clean.")
    return Protocol(name, PROTOCOLS[name](Budget(radius, steps, targets, classes, norm)), norm, radius)
