"""Cards as rows of tables: one table a task and threat, one row a model, data set and protocol, one column a radius.

No number stands without n, standard error and verdict: a :class:`Number` carries all three.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from aft import cards
from aft.cards import Card, digest
from aft.evaluation.collect import Labelled
from aft.evaluation.defended_report import robust_n
from aft.evaluation.published import printed
from aft.evaluation.report import VERDICT_ORDER, data_text, eps_text, percent
from aft.evaluation.zero_shot import average, counted, seen

NORMS = {"linf": "L-inf", "l2": "L2", "l1": "L1"}
#: What stands behind a number: reliable, unchecked, suspect. Shapes differ, so that no colour is needed.
MARKS = {"reliable": "✓", "unchecked": "?", "suspect": "!"}
#: Parts of a card's ``metrics`` that say how it was measured, or (attack success) only what both accuracies say, of another n; everything
#: else in there is a further figure.
KNOWN_METRICS = {"per_class", "largest_class_shares", "attacked", "judged_otherwise", "checks", "spared", "defended", "attack_success"}
#: Numbers among further figures that are none, and how the name of a standard error ends.
SETTINGS, ERROR = {"n", "bins", "seed", "most_texts_of_an_image", "most_images_of_a_text"}, "standard_error"
#: The unit of L-inf radii.
GREY = "1/255"
#: A mean is taken over so many data sets or more.
FEWEST_SETS = 2


@dataclass(frozen=True)
class Number:
    """One accuracy as it is shown.

    Args:
        share, error: in [0, 1].
        n: images.
        verdict: reliable, unchecked or suspect.
        failed: checks that failed.
        card: where the page tells how it was measured; none for a mean of several.
        source: who lowered it from outside; none where nobody did.
    """

    share: float
    error: float
    n: int
    verdict: str
    failed: tuple[str, ...] = ()
    card: str | None = None
    source: str | None = None

    @property
    def text(self) -> str:
        """``13.2 ±1.5``, with an asterisk where it comes from outside."""
        return percent(self.share, self.error) + ("*" if self.source else "")

    @property
    def mark(self) -> str:
        """A sign for the verdict."""
        return MARKS[self.verdict]

    @property
    def words(self) -> str:
        """All that belongs to the number, in one line."""
        told = [f"{100 * self.share:.2f} ± {100 * self.error:.2f} %", f"n = {self.n:,}", " ".join([self.verdict, *self.failed])]
        return ", ".join([*told, f"from outside: {self.source}"] if self.source else told)


@dataclass
class Row:
    """One line: a model on a data set under a protocol.

    Args:
        robust: by column; several where cards differ in what no column shows.
        over: of a mean, its data sets.
        side: of the images as they are attacked, pixels; none where nothing is attacked.
        steps: of the attacks, each number once.
    """

    label: str
    method: str
    sha256: str
    data: str
    protocol: str
    n: int
    chance: float | None
    top: float | None
    clean: Number
    robust: dict[str, list[Number]] = field(default_factory=dict)
    over: tuple[str, ...] = ()
    side: int | None = None
    steps: str = ""

    @property
    def attacked_by(self) -> str:
        """The protocol with its steps, for keys of pictures."""
        return f"{self.protocol} ({self.steps} steps)" if self.steps else self.protocol

    @property
    def numbers(self) -> list[Number]:
        """All of the row's."""
        return [self.clean, *(one for several in self.robust.values() for one in several)]

    @property
    def verdict(self) -> str:
        """The worst of the row's."""
        return worst(one.verdict for one in self.numbers)

    @property
    def failed(self) -> list[str]:
        """Every check that failed for any of them."""
        return sorted({check for one in self.numbers for check in one.failed}, key=_check_order)


@dataclass
class Group:
    """One table: rows of one task and threat; ``columns`` are the radii, in order, each with its value in units of ``unit``."""

    title: str
    columns: dict[str, float]
    unit: str
    rows: list[Row]
    notes: list[str]

    @property
    def id(self) -> str:
        """For links."""
        return "table-" + digest(self.title)[:8]


@dataclass(frozen=True)
class Metric:
    """A further figure of a card, such as recall or calibration error; the standard error where the card has one."""

    label: str
    method: str
    data: str
    protocol: str
    name: str
    value: float
    error: float | None
    n: int
    verdict: str
    card: str


def anchor(label: str, card: Card) -> str:
    """Where the page tells how a card was measured."""
    return f"card-{digest([label, card['cell']])[:10]}"


def data_words(card: Card) -> str:
    """Data set, the split where it is not the test set, and the label space where it is not all classes."""
    return data_text(card).removesuffix(" all")


def worst(verdicts: Iterable[str]) -> str:
    """Suspect before unchecked before reliable."""
    return min(verdicts, key=VERDICT_ORDER.index)


def groups_of(labelled: Sequence[Labelled], trained_on: Sequence[str] = (), families: Mapping[str, str] | None = None) -> list[Group]:
    """All cards as tables, those without an attack last; rows by label, data set and protocol, means over zero-shot sets first.

    Args:
        labelled: cards.
        trained_on: data sets that models were trained on; what embedded weights have seen is known.
        families: of the data sets (:func:`aft.evaluation.zero_shot.counted`); none: each is its own.
    """
    families = families or {}
    known = set().union(*(seen(card, trained_on, families)[0] for _, card in labelled))
    by_group: dict[str, list[Labelled]] = {}
    for one in labelled:
        by_group.setdefault(group_title(one[1]), []).append(one)
    in_order = sorted(by_group.items(), key=lambda item: _group_order(item[1][0][1]))
    return [_group(title, found, known, families) for title, found in in_order]


def group_title(card: Card) -> str:
    """Task and threat, such as ``classification, L-inf on native pixels``; the size of the images stands beside the data set."""
    threat, task = card["threat"], str(card["task"]).replace("_", " ")
    if threat is None:
        return f"{task}, clean images"
    return f"{task}, {NORMS.get(threat['norm'], threat['norm'])} on {threat['space']} pixels"


def _group_order(card: Card) -> tuple[Any, ...]:
    threat = card["threat"]
    return card["task"] != "classification", card["task"], threat is None, *((threat["norm"] != "linf", threat["norm"]) if threat else ())


def _group(title: str, found: Sequence[Labelled], known: AbstractSet[str], families: Mapping[str, str]) -> Group:
    radii = sorted({(card["threat"]["eps"], eps_text(card)) for _, card in found if card["threat"] is not None})
    grey = all(card["threat"] is None or card["threat"]["norm"] == "linf" for _, card in found)
    columns = {text: eps * (255 if grey else 1) for eps, text in radii}
    rows: dict[str, Row] = {}
    for label, card in found:
        row = rows.setdefault(_row_key(label, card), _row(label, card))
        row.top = max(filter(lambda share: share is not None, (row.top, card["largest_class_share"])), default=None)
        if card["threat"] is not None and (number := number_of(label, card, "robust")):
            row.robust.setdefault(eps_text(card), []).append(number)
    ordered = sorted(rows.values(), key=lambda row: (row.label, row.sha256, row.data, row.protocol, row.steps, row.n))
    means, notes = _means([card for _, card in found], ordered, known, families)
    return Group(title, columns, GREY if grey else "pixel range", [*means, *ordered], notes)


def _row_key(label: str, card: Card) -> str:
    # A step size goes with its radius, so the radii of one attack are one row; other steps are another row.
    attacks = [{name: value for name, value in attack.items() if name not in ("n", "step_size")} for attack in card["attacks"]]
    side = card["threat"] and card["threat"]["resolution"]
    return digest([label, card["model"]["sha256"], method_of(card), card["data"], card["protocol"], attacks, side])


def method_of(card: Card) -> str:
    """The recipe that trained the weights, what class texts go through where that is something, and the defence around them."""
    model, defense = card["model"], card["defense"]
    texts = "" if model["text_transform"] == "identity" else f" (class texts: {model['text_transform']})"
    return f"{model['method']}{texts}" + (f" + {defense['name']}" if defense else "")


def _row(label: str, card: Card) -> Row:
    clean = number_of(label, card, "clean")
    assert clean is not None
    data, threat = card["data"], card["threat"]
    return Row(
        label, method_of(card), card["model"]["sha256"], data_words(card), printed(card["protocol"]), data["n"], card["chance"],
        card["largest_class_share"], clean, side=threat and threat["resolution"],
        steps=", ".join(dict.fromkeys(str(attack["steps"]) for attack in card["attacks"])),
    )  # fmt: skip


def number_of(label: str, card: Card, kind: str) -> Number | None:
    """The clean or robust accuracy of a card, the lower of its own and of an external one."""
    shown = cards.lowered(card)
    share, error = shown[f"{kind}_accuracy"], shown["standard_error"][kind]
    if share is None or error is None:
        return None
    outside = shown["external"]["source"] if kind == "robust" and share != card["robust_accuracy"] else None
    verdict = card["verdict"]
    n = robust_n(card) if kind == "robust" else card["data"]["n"]
    return Number(share, error, n, verdict["status"], tuple(verdict["failed_checks"]), anchor(label, card), outside)


def _means(
    found: Sequence[Card], rows: Sequence[Row], known: AbstractSet[str], families: Mapping[str, str]
) -> tuple[list[Row], list[str]]:
    """For each model and protocol the mean over the sets that count, where every one was measured; and what must be known of it."""
    names = {data_words(card): card["data"]["name"] for card in found if card["data"]["label_space"] == "all"}
    counting = counted(names.values(), known, families)
    sets = {text for text, name in names.items() if name in counting}
    absent = sorted({name for name in names.values() if name not in counting})
    if len(sets) < FEWEST_SETS:
        return [], []
    models: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        by_set = models.setdefault((row.label, row.sha256, row.method, row.attacked_by), {})
        if row.data in sets and (row.data not in by_set or row.n > by_set[row.data].n):
            by_set[row.data] = row
    whole = [list(by_set.values()) for by_set in models.values() if by_set.keys() == sets]
    notes = [f"Mean: over the {len(sets)} data sets {', '.join(sorted(sets))}, each with the same weight"
             + (f"; {', '.join(absent)} left out, since a model of this page was trained on it or its family" if absent else "")
             + ". Its standard error is sqrt(sum of squares) / sets. Models that lack a set have no mean."]  # fmt: skip
    return [_mean_row(of_model) for of_model in whole], notes


def _mean_row(rows: Sequence[Row]) -> Row:
    shared = [eps for eps in rows[0].robust if all(len(row.robust.get(eps, ())) == 1 for row in rows)]
    first, n = rows[0], sum(row.n for row in rows)
    robust = {eps: [_mean([row.robust[eps][0] for row in rows])] for eps in shared}
    clean, over = _mean([row.clean for row in rows]), tuple(sorted(row.data for row in rows))
    name = f"mean of {len(rows)} sets"
    return Row(first.label, first.method, first.sha256, name, first.protocol, n, None, None, clean, robust, over, steps=first.steps)


def _mean(numbers: Sequence[Number]) -> Number:
    failed = sorted({check for one in numbers for check in one.failed}, key=_check_order)
    share, error = average([(one.share, one.error) for one in numbers])
    sources = list(dict.fromkeys(one.source for one in numbers if one.source))
    return Number(share, error, sum(one.n for one in numbers), worst(one.verdict for one in numbers), tuple(failed), None,
                  "; ".join(sources) or None)  # fmt: skip


def metrics_of(labelled: Sequence[Labelled]) -> list[Metric]:
    """All further figures of the cards, whatever their names: each number in ``metrics`` that does not say how it was measured.

    Beside a number ``NAME``, ``NAME_standard_error`` is its error, and ``n`` is of what all numbers of its dictionary are shares.
    """
    told = []
    for label, card in labelled:
        extra = {name: value for name, value in card["metrics"].items() if name not in KNOWN_METRICS}
        protocol = printed(card["protocol"]) + (f" {eps_text(card)}" if card["threat"] else "")
        where, verdict = (label, method_of(card), data_words(card), protocol), card["verdict"]["status"]
        for name, value, error, n in _leaves(extra, card["data"]["n"]):
            told.append(Metric(*where, name, value, error, n, verdict, anchor(label, card)))
    return told


def _leaves(part: Mapping[str, Any], n: int, before: str = "") -> Iterable[tuple[str, float, float | None, int]]:
    """Name, value, standard error and n of every number in nested dictionaries."""
    n = part.get("n", n)
    for name, value in part.items():
        whole = f"{before} {name}".strip().replace("_", " ")
        if isinstance(value, Mapping):
            yield from _leaves(value, n, whole)
        elif isinstance(value, int | float) and not isinstance(value, bool) and name not in SETTINGS and not name.endswith(ERROR):
            yield whole, float(value), part.get(f"{name}_{ERROR}"), n


def _check_order(name: str) -> tuple[int, str]:
    digits = "".join(letter for letter in name if letter.isdigit())
    return int(digits or 0), name
