"""Two reports beside each other, and two attacks on the same images: what of a difference is more than its error.

The rule: a difference counts where it is beyond ``BEYOND`` of its standard errors. Where verdicts of the same images lie beside both
cards the error is the paired one, ``sqrt(var(d) / n)`` over ``d`` in {-1, 0, 1}; else it is ``sqrt(se_1^2 + se_2^2)``, which is
too wide where images are shared (subsets of one data set nest). Shapes: n images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from aft.cards import Card, Verdicts, digest
from aft.evaluation.collect import Collection
from aft.evaluation.published import printed
from aft.evaluation.report import data_text, eps_text, percent

Outcome = Literal["better", "worse", "within the error", "the same"]
OUTCOMES: tuple[Outcome, ...] = ("better", "worse", "within the error", "the same")
#: Standard errors that a difference must be beyond to count.
BEYOND = 2.0
#: What a cell is, apart from the weights: cards that share this are compared.
SAME = ("name", "split", "label_space", "classes_sha256", "templates_sha256")
KINDS: tuple[Literal["clean", "robust"], ...] = ("clean", "robust")


@dataclass(frozen=True)
class Difference:
    """``after - before`` of one accuracy, as shares, with its standard error; ``paired`` where both were judged on the same images."""

    difference: float
    error: float
    paired: bool

    @property
    def outcome(self) -> Outcome:
        """Better or worse where the difference is beyond two of its standard errors."""
        if self.difference == 0 and self.error == 0:
            return "the same"
        if abs(self.difference) <= BEYOND * self.error:
            return "within the error"
        return "better" if self.difference > 0 else "worse"


@dataclass(frozen=True)
class Change:
    """One figure in two reports; ``old`` and ``new`` are the cards."""

    label: str
    kind: Literal["clean", "robust"]
    old: Card
    new: Card
    of: Difference

    @property
    def what(self) -> str:
        """Data set, protocol and radius."""
        radius = "" if self.kind == "clean" else f", {printed(self.new['protocol'])} {eps_text(self.new)}"
        return f"{data_text(self.new)}{radius}"


@dataclass(frozen=True)
class Comparison:
    """All figures that two reports share, and the cards that are in one of them alone, as (label, card)."""

    changes: list[Change]
    only_new: list[tuple[str, Card]]
    only_old: list[tuple[str, Card]]

    def count(self, outcome: Outcome) -> int:
        """Figures with this outcome."""
        return sum(change.of.outcome == outcome for change in self.changes)

    def lines(self) -> list[str]:
        """For a screen: the counts and the rule, then each figure, better and worse first."""
        counts = ", ".join(f"{self.count(outcome)} {outcome}" for outcome in OUTCOMES)
        told = [f"{counts}; {len(self.only_new)} cards here alone, {len(self.only_old)} there alone. "
                f"Better and worse: beyond {BEYOND:g} standard errors of the difference."]  # fmt: skip
        for change in sorted(self.changes, key=lambda one: OUTCOMES.index(one.of.outcome)):
            kind = change.kind
            before, after = (percent(card[f"{kind}_accuracy"], card["standard_error"][kind]) for card in (change.old, change.new))
            paired = "paired" if change.of.paired else "unpaired"
            told.append(f"  {change.of.outcome}: {change.label}, {change.what}, {kind} {before} -> {after} "
                        f"(difference {percent(change.of.difference, change.of.error)}, {paired}, n = {change.new['data']['n']:,}, "
                        f"{change.new['verdict']['status']})")  # fmt: skip
        return told


def compare(new: Collection, old: Collection) -> Comparison:
    """Each figure of ``new`` against the same one of ``old``: same label, task, data, texts, attacks, radius and defence.

    Weights and number of images may differ. The clean figure of one model and set of images is compared once, whatever the protocols.
    """
    before = {_key(label, card): place for place, (label, card) in enumerate(old.labelled)}
    changes, only_new, met, told = [], [], set(), set()
    for place, (label, card) in enumerate(new.labelled):
        key = _key(label, card)
        other = before.get(key)
        if other is None:
            only_new.append((label, card))
            continue
        met.add(key)
        for kind in KINDS:
            once = digest([label, card["data"], card["task"], card["defense"], kind])
            if card[f"{kind}_accuracy"] is None or old.labelled[other][1][f"{kind}_accuracy"] is None or once in told:
                continue
            told |= {once} if kind == "clean" else set()
            changes.append(Change(label, kind, old.labelled[other][1], card, difference(new, place, old, other, kind)))
    return Comparison(changes, only_new, [one for one in old.labelled if _key(*one) not in met])


def difference(new: Collection, place: int, old: Collection, other: int, kind: Literal["clean", "robust"]) -> Difference:
    """Of an accuracy as the two cards measured it (no number from outside), paired where the same images stand beside both."""
    after, before = new.labelled[place][1], old.labelled[other][1]
    by_image = _paired(new.verdicts(place), old.verdicts(other), kind)
    if by_image is not None:
        return Difference(float(by_image.mean()), float(by_image.std() / math.sqrt(len(by_image))), True)
    error = math.hypot(after["standard_error"][kind], before["standard_error"][kind])
    return Difference(after[f"{kind}_accuracy"] - before[f"{kind}_accuracy"], error, False)


def _paired(after: Verdicts | None, before: Verdicts | None, kind: str) -> NDArray[Any] | None:
    """``after - before`` for each image, ``[n]`` in {-1, 0, 1}; none where the images are not the same."""
    if after is None or before is None:
        return None
    right = [_right(table, kind) for table in (after, before)]
    if any(one is None for one in right):
        return None
    (index_a, right_a), (index_b, right_b) = ((table["index"], one) for table, one in zip((after, before), right, strict=True))
    order_a, order_b = np.argsort(index_a, kind="stable"), np.argsort(index_b, kind="stable")
    if not np.array_equal(index_a[order_a], index_b[order_b]):
        return None
    assert right_a is not None and right_b is not None
    return np.asarray(right_a, np.float64)[order_a] - np.asarray(right_b, np.float64)[order_b]


def _right(table: Verdicts, kind: str) -> NDArray[Any] | None:
    if "index" not in table or "clean" not in table:
        return None
    if kind == "clean":
        return table["clean"]
    return table["right"][:, -1] if table.get("right", np.empty((0, 0))).shape[1:] not in ((), (0,)) else None


def _key(label: str, card: Card) -> str:
    """Neither weights nor number of images: those may differ. The planned images of an attack follow from n."""
    attacks = [{name: value for name, value in attack.items() if name != "n"} for attack in card["attacks"]]
    data = {name: card["data"][name] for name in SAME}
    return digest([label, card["task"], data, card["protocol"], card["threat"], attacks, _defence(card), card["seeds"]["attack"]])


def _defence(card: Card) -> Any:
    defense = card["defense"]
    return None if defense is None else [defense["name"], defense["settings"]]


@dataclass(frozen=True)
class Gap:
    """PGD and APGD on the same images of one model at one radius; the difference is PGD minus APGD, 0 or more where APGD is stronger."""

    label: str
    pgd: Card
    apgd: Card
    of: Difference


def gaps(found: Collection) -> list[Gap]:
    """For each model, data set and radius that PGD and APGD were both measured at."""
    return list(_gaps(found))


def _gaps(found: Collection) -> Iterator[Gap]:
    by_place: dict[str, dict[str, int]] = {}
    for place, (label, card) in enumerate(found.labelled):
        if kind := _family(card["attacks"]):
            where = digest([label, card["model"]["sha256"], card["task"], card["data"], card["threat"], _defence(card)])
            by_place.setdefault(where, {}).setdefault(kind, place)
    for kinds in by_place.values():
        if {"pgd", "apgd"} <= kinds.keys():
            pgd, apgd = kinds["pgd"], kinds["apgd"]
            label = found.labelled[pgd][0]
            yield Gap(label, found.labelled[pgd][1], found.labelled[apgd][1], difference(found, pgd, found, apgd, "robust"))


def _family(attacks: Sequence[dict[str, Any]]) -> Literal["pgd", "apgd"] | None:
    """Whether a list of attacks is PGD alone, or APGD alone."""
    names = [str(attack["name"]) for attack in attacks]
    if names and all(name.startswith("pgd") for name in names):
        return "pgd"
    return "apgd" if names and all(name.startswith("apgd") for name in names) else None
