"""Named lists of attacks, and what they become for a number of classes.

A name says exactly what runs: ``apgd`` is APGD-CE and then targeted APGD, and is never called AutoAttack; ``autoattack_*`` runs the
authors' own code, ``four`` the same four attacks as written here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from aft.attacks import PGD, FABTargeted, Square, StockAttack
from aft.attacks.autoattack import StockName
from aft.attacks.threat_model import Norm, pixel_fraction
from aft.errors import ConfigError, unknown_name
from aft.evaluation.adaptive import DEFENDED, PLANS, Plan
from aft.evaluation.corruptions import Corruptions
from aft.evaluation.planned import Budget, Planned, apgd
from aft.evaluation.published import PUBLISHED, Published, Space

#: Step size of the evaluation's PGD as a share of eps, times the number of steps: the walk can cross the ball (arXiv 1706.06083).
PGD_REACH = 2.5
#: AutoAttack's settings (arXiv 2003.01690), which ``strict`` shares.
STEPS, TARGETS, QUERIES, EOT = 100, 9, 5000, 20
#: ``strict`` shows so many windows of Square to this share of the images: it tells whether gradients hide something.
STRICT_QUERIES, STRICT_SHARE = 1000, 0.2


@dataclass(frozen=True)
class Protocol:
    """A list of attacks under one name; robust means right on the clean image and under every one of them.

    Args:
        name: the protocol's.
        attacks: in the order they run.
        norm, eps: the threat model; none without attacks.
        fidelity: ``exact``: it is what its name says everywhere; ``like``: it follows another's protocol but for some detail.
        space: where the ball lies: in ``native`` pixels, or in those of the ``model``'s input, after the resize.
        templates: of the class texts; none: the data set's.
        scale: factor on cosines in loss and verdict; none: the model's.
        corruptions: on which corrupted images accuracy is counted, too; none: on none.
        plan: of a protocol for test-time defences, what it spends; none for all others.
    """

    name: str
    attacks: tuple[Planned, ...] = ()
    norm: Norm | None = None
    eps: float | None = None
    fidelity: Literal["exact", "like"] = "exact"
    space: Space = "native"
    templates: tuple[str, ...] | None = None
    scale: float | None = None
    corruptions: Corruptions | None = None
    plan: Plan | None = None


def pgd(budget: Budget) -> tuple[Planned, ...]:
    """PGD on cross-entropy from a random start; the best iterate counts."""
    attack = PGD(eps=budget.eps, norm=budget.norm, steps=budget.steps, relative_step_size=PGD_REACH / budget.steps, keep="best")
    return (Planned(f"pgd{budget.steps}", "ce", attack),)


def strict(budget: Budget) -> tuple[Planned, ...]:
    """``apgd`` with 100 steps and 9 targets, whatever the command asks for; then Square with 1,000 windows on a fifth of the images."""
    square = Planned("square", "margin", Square(eps=budget.eps, steps=STRICT_QUERIES), share=STRICT_SHARE)
    return (*apgd(Budget(budget.eps, STEPS, TARGETS, budget.classes, budget.norm)), *([square] if budget.norm == "linf" else []))


def four(budget: Budget) -> tuple[Planned, ...]:
    """APGD-CE, APGD-T, FAB-T and Square as written here, with the settings of AutoAttack's standard version; L-inf."""
    targets = min(TARGETS, budget.classes - 1)
    fab = Planned("fab_t", "margin", FABTargeted(eps=budget.eps, norm=budget.norm, steps=STEPS, targets=targets), targets)
    square = Planned("square", "margin", Square(eps=budget.eps, norm=budget.norm, steps=QUERIES))
    return (*apgd(Budget(budget.eps, STEPS, TARGETS, budget.classes, budget.norm)), fab, square)


def autoattack_standard(budget: Budget) -> tuple[Planned, ...]:
    """AutoAttack's standard version by the authors' code. With fewer than 10 classes it aims at all wrong ones, and with fewer than 4,
    where the targeted loss is not defined, APGD on DLR (3 classes) or nothing (2) takes its place."""
    targets = min(TARGETS, budget.classes - 1)
    second: list[StockName] = ["apgd-t"] if budget.classes >= 4 else ["apgd-dlr"] if budget.classes == 3 else []
    return tuple(_stock(name, budget, targets) for name in ("apgd-ce", *second, "fab-t", "square"))


def autoattack_rand(budget: Budget) -> tuple[Planned, ...]:
    """AutoAttack's version for random models by the authors' code: gradients are means over 20 forward passes."""
    names: list[StockName] = ["apgd-ce", "apgd-dlr"] if budget.classes >= 3 else ["apgd-ce"]
    return tuple(_stock(name, budget, 1, EOT) for name in names)


def _stock(name: StockName, budget: Budget, targets: int, eot: int = 1) -> Planned:
    steps = QUERIES if name == "square" else STEPS
    attack = StockAttack(eps=budget.eps, attack=name, norm=budget.norm, steps=steps, targets=targets, eot=eot)
    return Planned(f"aa_{name.replace('-', '_')}", "ce", attack, targets if name.endswith("-t") else None)


PROTOCOLS: dict[str, Callable[[Budget], tuple[Planned, ...]]] = {
    "clean": lambda _: (), "corruptions": lambda _: (), "pgd": pgd, "apgd": apgd, "strict": strict, "four": four,
    "autoattack_standard": autoattack_standard, "autoattack_rand": autoattack_rand, **DEFENDED,
}  # fmt: skip

#: These attack nothing and have no radius.
WITHOUT_ATTACK = ("clean", "corruptions")


def of_the_literature(told: Published, classes: int) -> Protocol:
    """A published protocol, at its own radius and with its own steps."""
    attacks = tuple(Planned(*one) for one in told.attacks(classes))
    return Protocol(told.name, attacks, "linf", told.eps, told.fidelity, told.space, told.templates, told.scale)


def plan(name: str, *, eps: float | str, steps: int, targets: int, classes: int, norm: Norm = "linf",
         corruptions: Corruptions | None = None) -> Protocol:  # fmt: skip
    """The attacks that a protocol means for this radius and this number of classes.

    Args:
        name: one of ``PROTOCOLS``, or of ``PUBLISHED``, which bring their own radius and steps.
        eps: radius in units of the pixel range, a number or a text such as ``"2/255"``; not read by ``clean`` and ``corruptions``. At 0
            every attack leaves the images as they are, and the robust accuracy is the clean one (L1 has no radius of 0).
        steps: of each attack.
        targets: of a targeted attack, clipped to ``classes - 1``.
        classes: K of the label space, 2 or more.
        norm: ``linf``, ``l2`` or ``l1``.
        corruptions: what the protocol of that name looks at; none: all kinds at all severities.

    Raises:
        ConfigError: unknown name, a radius outside the pixel range, no steps, no targets, or fewer than 2 classes.
    """
    if name not in PROTOCOLS and name not in PUBLISHED:
        raise ConfigError(unknown_name("protocol", name, [*PROTOCOLS, *PUBLISHED]))
    if classes < 2:
        raise ConfigError(f"a label space of {classes} class cannot be got wrong: give two classes or more.")
    if name in WITHOUT_ATTACK:
        return Protocol(name, corruptions=(corruptions or Corruptions()) if name == "corruptions" else None)
    if name in PUBLISHED:
        return of_the_literature(PUBLISHED[name], classes)
    radius = pixel_fraction(eps)
    for setting, value in (("steps", steps), ("targets", targets)):
        if value < 1:
            raise ConfigError(f"{setting} = {value} is too small: give 1 or more, or use the protocol clean.")
    few = name == "autoattack_standard" and classes <= TARGETS  # AutoAttack would aim at classes that are not there
    attacks = PROTOCOLS[name](Budget(radius, steps, targets, classes, norm))
    return Protocol(name, attacks, norm, radius, "like" if few else "exact", plan=PLANS.get(name))
