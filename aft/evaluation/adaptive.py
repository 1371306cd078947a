"""The protocols for test-time defences: which attacks A to E they list, and which of those apply to a model's stages.

``oblivious`` is A alone, as most papers report: images made against the undefended model. ``adaptive`` lists all attacks that know the
defence; ``adaptive_small`` the same on fewer images, for tables of many defences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from aft.attacks import APGD, PGD, Square
from aft.attacks.objectives import LossName
from aft.attacks.sight import gated, opaque
from aft.clip.stages import Stages
from aft.errors import ConfigError
from aft.evaluation.planned import Budget, Planned, apgd

Way = Literal["transfer", "bpda", "through", "gate", "queries"]

#: What the gates weigh against the loss, swept; the attack that alternates between the two comes on top.
WEIGHTS: tuple[float | None, ...] = (0.0, 0.01, 0.1, 1.0, 10.0, None)
#: Longest steps of PGD, as a share of eps, and the shortest that makes sense.
STEP_SHARE, SHORTEST_STEP = 0.25, 1 / 1020
#: Of the attack on a random model by queries: windows, and draws that each is judged by.
RANDOM_QUERIES, QUERY_DRAWS = 1000, 20


@dataclass(frozen=True)
class Informed(Planned):
    """One attack of a protocol for defences.

    Args:
        way: ``transfer`` (A), ``bpda`` (B), ``through`` (C), ``gate`` (D) or ``queries`` (E).
        images: it is shown to so many at most, the first of those that it is meant for; none: all.
    """

    way: Way = "transfer"
    images: int | None = None

    def limit(self, n: int) -> int:
        """How many of ``n`` images it is shown."""
        return n if self.images is None else min(n, self.images)


@dataclass(frozen=True)
class Plan:
    """What a protocol for defences spends beside its attacks' steps.

    Args:
        left: B to E are shown the first so many of the images that A left; none: all of them.
        most_draws: cap on the draws of a gradient; the rule may ask for more.
        lengthen: factor on the steps where the cap cut the draws.
        sweep: all weights of the gate are tried on the first so many images, the best of them on the others; none: all on all.
        selection, scoring: draws that choose a candidate, and new ones that judge it, for a random defence.
        query_draws: draws that a query of E is judged by, for a random defence.
        queries_random: windows of E there.
        pilot: images on which the number of draws is found.
        headline: whether E is part of the union (it is not where it sees few images; then it checks the others).
    """

    left: int | None = None
    most_draws: int = 128
    lengthen: int = 2
    sweep: int | None = None
    selection: int = 10
    scoring: int = 20
    query_draws: int = QUERY_DRAWS
    queries_random: int = RANDOM_QUERIES
    pilot: int = 32
    headline: bool = True

    def describe(self) -> dict[str, Any]:
        """For the hash of a cell."""
        return asdict(self)


FULL = Plan()
SMALL = Plan(left=100, most_draws=9, lengthen=1, sweep=20, selection=5, scoring=5, query_draws=5, queries_random=500, headline=False)
PLANS: dict[str, Plan] = {"oblivious": SMALL, "adaptive_small": SMALL, "adaptive": FULL}


def transfer(budget: Budget) -> tuple[Informed, ...]:
    """A: APGD on cross-entropy, then targeted APGD, on the undefended model. They go on after success: surer images carry over better."""
    def going_on(one: Planned) -> Informed:
        """The same attack, which does not stop where it has broken an image."""
        return Informed(f"a_{one.name}", one.loss, replace(one.attack, drop_broken=False), one.targets)  # type: ignore[type-var]

    return tuple(going_on(one) for one in apgd(budget))


def pgd(budget: Budget) -> PGD:
    """One run of PGD with steps of a quarter of eps, 1/1020 at least."""
    step_size = max(STEP_SHARE * budget.eps, SHORTEST_STEP)
    return PGD(eps=budget.eps, norm=budget.norm, steps=budget.steps, step_size=step_size, keep="best")


def oblivious(budget: Budget) -> tuple[Informed, ...]:
    """A alone, 40 steps and three targets."""
    return transfer(replace(budget, steps=40, targets=3))


def adaptive_small(budget: Budget) -> tuple[Informed, ...]:
    """A on all images; B, C and D of 40 steps on the margin from one start, on 100 of what A left; E of 500 windows on 20."""
    small = replace(budget, steps=40, targets=3)
    ways: tuple[tuple[str, Way], ...] = (("b_pgd_margin", "bpda"), ("c_pgd_margin", "through"), ("d_gate", "gate"))
    informed = tuple(Informed(name, "margin", pgd(small), way=way) for name, way in ways)
    return (*transfer(small), *informed, *_square(budget, "e_square", steps=500, images=20))


def adaptive(budget: Budget) -> tuple[Informed, ...]:
    """A to E of 100 steps and nine targets, five starts, on cross-entropy and margin; E from the image and from the best point so far."""
    full, found = replace(budget, steps=100, targets=9), list[Informed]()
    five = APGD(eps=budget.eps, norm=budget.norm, steps=100, restarts=5)
    targeted = [one for one in transfer(full) if one.loss == "dlr_targeted"]
    ways: tuple[tuple[str, Way], ...] = (("b", "bpda"), ("c", "through"))
    for letter, way in ways:
        losses: tuple[LossName, ...] = ("ce", "margin")
        found += [Informed(f"{letter}_apgd_{loss}", loss, five, way=way) for loss in losses]
        found += [replace(one, name=f"{letter}_apgd_t", way=way) for one in targeted]
    gate = Informed("d_gate", "margin", pgd(full), way="gate")
    squares = [one for name in ("e_square", "e_square_on") for one in _square(budget, name, steps=5000, images=None)]
    return (*transfer(full), *found, gate, *squares)


def _square(budget: Budget, name: str, steps: int, images: int | None) -> tuple[Informed, ...]:
    """E, which is there for L-inf alone."""
    if budget.norm != "linf":
        return ()
    return (Informed(name, "margin", Square(eps=budget.eps, steps=steps), way="queries", images=images),)


DEFENDED: dict[str, Callable[[Budget], tuple[Informed, ...]]] = {
    "oblivious": oblivious, "adaptive_small": adaptive_small, "adaptive": adaptive,
}  # fmt: skip


def applying(attacks: tuple[Planned, ...], stages: Stages, plan: Plan) -> tuple[Informed, ...]:
    """Those of a protocol's attacks that apply to these stages.

    Without a gate there is no D; where nothing can be differentiated through, C would be B; E makes fewer queries of a random model, each
    judged by several draws.

    Raises:
        ConfigError: the model declares no stages: there is no defence that an attack could know.
    """
    if not stages.declared:
        raise ConfigError(
            "this model declares no stages, so there is no defence that an attack could know: give a defended model "
            "(aft.defenses.defend, or --defense), or a protocol such as apgd or strict."
        )
    meant = [one for one in attacks if isinstance(one, Informed)]
    if not gated(stages):
        meant = [one for one in meant if one.way != "gate"]
    if set(opaque(stages)) == set(stages.declared):
        meant = [one for one in meant if one.way != "through"]
    return tuple(_fewer_queries(one, plan) if stages.random and one.way == "queries" else one for one in meant)


def _fewer_queries(one: Informed, plan: Plan) -> Informed:
    assert isinstance(one.attack, Square)
    return replace(one, attack=replace(one.attack, steps=min(one.attack.steps, plan.queries_random)))
