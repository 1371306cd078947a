"""The table of the methods and what it says in words, from the cards and runs that ``bench.methods_table`` left.

Every sentence follows from the figures by rule: nothing that stands in the page or in ``docs/methods.md`` was written by hand.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aft import cards
from aft.errors import DataError
from aft.evaluation.report import VERDICT_ORDER

#: A protocol (clean, pgd, apgd) and a radius in grey levels (0 for clean), and what is measured there: accuracy in points.
Where = tuple[str, float]
Figures = dict[Where, float]

#: What all rows are compared with, and how many seeds of it must be there before anything is ranked.
BASELINE, FEWEST_SEEDS = "tecoa", 3
#: From here on, PGD above APGD is marked: the cheaper attack then says more of itself than of the model.
LARGEST_GAP = 3.0
NAMES = {"tiny_imagenet32": "Tiny-ImageNet, validation images", "cifar10": "CIFAR-10, zero-shot"}
#: Radius in grey levels that the short table shows beside clean accuracy: that of training.
TRAINED_AT = 2.0


@dataclass(frozen=True)
class Run:
    """One trained tower on one data set.

    Args:
        figures: accuracies in points.
        right: whether each image is right there, ``[n]`` (bool), in the cards' order.
        verdict: the worst of its cards.
        images: the sha256 of which images these are, in their order.
        texts: what class texts go through in the model.
        chance: accuracy of guessing, 0 to 1.
    """

    figures: Figures
    right: dict[Where, NDArray[np.bool_]]
    verdict: str
    images: str = ""
    texts: str = "identity"
    chance: float = 0.0


@dataclass(frozen=True)
class Row:
    """One method on one data set.

    Args:
        name: of the method.
        of: its seeds.
    """

    name: str
    of: tuple[Run, ...]

    @property
    def runs(self) -> tuple[Figures, ...]:
        """Figures of each seed."""
        return tuple(run.figures for run in self.of)

    @property
    def verdict(self) -> str:
        """The worst of all cards."""
        return min((run.verdict for run in self.of), key=VERDICT_ORDER.index)

    @cached_property
    def mean(self) -> Figures:
        """Over the seeds."""
        return {where: statistics.fmean(run[where] for run in self.runs) for where in self.runs[0]}

    def right(self, where: Where) -> NDArray[np.float64]:
        """In what share of the seeds each image is right, ``[n]``."""
        return np.mean([run.right[where] for run in self.of], axis=0)

    @property
    def label(self) -> str:
        """The name, with the number of seeds where they are several, and what class texts go through where that is something."""
        seeds = "" if len(self.runs) == 1 else f", mean of {len(self.runs)} seeds"
        texts = "" if self.of[0].texts == "identity" else f" (class texts: {self.of[0].texts})"
        return f"{self.name}{seeds}{texts}"

    @property
    def collapsed(self) -> bool:
        """Clean accuracy is within two standard errors of guessing: a model that says nothing can be withstood by no attack."""
        chance, n = self.of[0].chance, len(self.of[0].right["clean", 0.0])
        return self.mean["clean", 0.0] / 100 <= chance + 2 * cards.standard_error(chance, n)

    @property
    def gap(self) -> tuple[float, float]:
        """PGD minus APGD in points where it is largest, and that radius."""
        return max((value - self.mean["apgd", eps], eps) for (protocol, eps), value in self.mean.items() if protocol == "pgd")


@dataclass(frozen=True)
class Table:
    """All methods on one data set, compared with the baseline.

    Args:
        data: id of the data set.
        rows: the baseline first, then by name.
        n: images.
    """

    data: str
    rows: tuple[Row, ...]
    n: int

    @property
    def baseline(self) -> Row:
        """TeCoA."""
        return self.rows[0]

    @property
    def places(self) -> list[Where]:
        """Clean, and APGD at each radius, the smallest first."""
        return sorted((where for where in self.baseline.mean if where[0] != "pgd"), key=lambda where: where[1])

    @cached_property
    def noise(self) -> Figures | None:
        """The baseline's standard deviation over seeds; none where there are too few of them."""
        runs = self.baseline.runs
        return {where: statistics.stdev(run[where] for run in runs) for where in runs[0]} if len(runs) >= FEWEST_SEEDS else None

    def error(self, row: Row, where: Where) -> float:
        """Standard error, in points, of a row's difference to the baseline over the same images: ``sqrt(var(d) / n)``."""
        return float(100 * np.std(row.right(where) - self.baseline.right(where)) / np.sqrt(self.n))

    def beyond(self, row: Row, where: Where) -> float:
        """Points above (or, negative, below) the baseline; 0 where that may be chance.

        That is where the noise of training is unknown, or the difference is less than twice that noise, or than twice its own standard
        error over images. A collapsed row is not ranked.
        """
        difference = row.mean[where] - self.baseline.mean[where]
        if self.noise is None or row is self.baseline or row.collapsed:
            return 0.0
        return difference if abs(difference) >= 2 * max(self.noise[where], self.error(row, where)) else 0.0

    def cell(self, row: Row, where: Where) -> str:
        """Accuracy with its standard error over images, and an arrow where it is ranked."""
        beyond = self.beyond(row, where)
        arrow = " ↑" if beyond > 0 else " ↓" if beyond < 0 else ""
        return f"{row.mean[where]:.1f} ± {100 * cards.standard_error(row.mean[where] / 100, self.n):.1f}{arrow}"


def runs_of(results: Path) -> dict[str, Any]:
    """What is kept of each run, by its label."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((results / "rows").glob("*.json"))}


def measured(results: Path, label: str, data: str, n: int) -> Run:
    """What the cards of one run say of ``n`` images of one data set.

    Raises:
        DataError: a card is of another number of images, of other images than another card of the run, or of what that is of.
    """
    found: Figures = {}
    right: dict[Where, NDArray[np.bool_]] = {}
    verdicts, images, texts, chance = [], "", "identity", 0.0
    for path in sorted((results / "cards" / label).glob("*.json")):
        card = cards.read(path)
        if card["data"]["name"] == data:
            if card["data"]["n"] != n:
                raise DataError(f"{path}: n = {card['data']['n']} images, and the table is of {n}: take the card out, or measure it again.")
            if images not in ("", card["data"]["index_sha256"]):
                raise DataError(f"{path}: other images than another card of {label} on {data}: take it out, or measure it again.")
            images, texts, chance = card["data"]["index_sha256"], card["model"]["text_transform"], card["chance"]
            threat, robust = card["threat"], card["robust_accuracy"]
            where = ("clean", 0.0) if threat is None else (card["protocol"]["name"], round(255 * threat["eps"], 2))
            if where in found:
                raise DataError(f"{path}: another card of {label} is of {place_text(where)} on {data}, too: take one of them out.")
            found[where] = 100 * (card["clean_accuracy"] if threat is None else robust)
            told = cards.read_arrays(path.with_suffix(".npz"), ["clean", "right"])
            right[where] = told["clean"] & told["right"].all(axis=1)
            verdicts.append(card["verdict"]["status"])
    return Run(found, right, min(verdicts, key=VERDICT_ORDER.index, default="unchecked"), images, texts, chance)


def tables(recipe: Mapping[str, Any], results: Path) -> list[Table]:
    """One for each data set on which the baseline is measured. A run without all the baseline's figures is not in it.

    Raises:
        DataError: two runs are of other images: differences would not be over the same ones.
    """
    made = []
    for data in NAMES:
        by_method: dict[str, list[Run]] = {}
        for label, told in runs_of(results).items():
            if "operations" not in told:  # those were trained another way: see `pretraining`
                by_method.setdefault(label.rpartition("_seed")[0], []).append(measured(results, label, data, recipe["evaluate"]["n"]))
        if BASELINE not in by_method:
            continue
        whole = by_method[BASELINE][0].figures.keys()
        names = [BASELINE, *(name for name in by_method if name != BASELINE)]
        found = {name: [one for one in by_method[name] if whole and one.figures.keys() == whole] for name in names}
        rows = [Row(name, tuple(of)) for name, of in found.items() if of]
        if len({run.images for row in rows for run in row.of}) > 1:
            raise DataError(f"cards of {data} in {results} are of different images: measure those rows again that are not as {BASELINE}'s.")
        if rows:
            made.append(Table(data, tuple(rows), recipe["evaluate"]["n"]))
    return made


def place_text(where: Where) -> str:
    """``clean`` or ``2/255``."""
    return "clean" if where[0] == "clean" else f"{where[1]:g}/255"


def points(parts: Mapping[Where, float]) -> str:
    """``2.1 points (clean), 1.4 (2/255)``."""
    first, *others = [(f"{abs(value):.1f}", f"({place_text(where)})") for where, value in parts.items()]
    return ", ".join([" points ".join(first), *map(" ".join, others)])


def against(table: Table, row: Row) -> str:
    """One sentence: where a method lies above the baseline, where it does not help, or that it collapsed; empty where neither is seen."""
    if row.collapsed:
        return f"`{row.name}` has collapsed: its clean accuracy is within two standard errors of guessing, and nothing of it is ranked."
    ranked = {where: table.beyond(row, where) for where in table.places}
    above = {where: value for where, value in ranked.items() if value > 0}
    below = {where: value for where, value in ranked.items() if value < 0}
    if above and below:
        lost = " and ".join(map(place_text, below))
        return f"`{row.name}` is above TeCoA by {points(above)}; for {lost} it does not help here: below by {points(below)}."
    if above:
        return f"`{row.name}` is above TeCoA by {points(above)}, and nowhere told apart below."
    return f"`{row.name}` does not help here: below TeCoA by {points(below)}, and nowhere told apart above." if below else ""


def sentences(table: Table) -> list[str]:
    """What a table says, by rule: nothing of differences that may be chance."""
    others = table.rows[1:]
    gaps = [f"`{row.name}` ({row.gap[0]:.1f} at {row.gap[1]:g}/255)" for row in table.rows if row.gap[0] > LARGEST_GAP]
    told = [f"PGD is more than {LARGEST_GAP:g} points above APGD, so that PGD alone would flatter: {', '.join(gaps)}."] if gaps else []
    if table.noise is None:
        seeds = len(table.baseline.runs)
        return [f"TeCoA has {seeds} of {FEWEST_SEEDS} seeds: the noise of training is not known yet, and nothing is ranked.", *told]
    spread = ", ".join(f"{table.noise[where]:.1f} ({place_text(where)})" for where in table.places)
    alike = [f"`{row.name}`" for row in others if not against(table, row)]
    return [
        f"Standard deviation of TeCoA over {len(table.baseline.runs)} seeds, in points: {spread}.",
        *filter(None, (against(table, row) for row in others)),
        *([f"Not told apart from TeCoA: {', '.join(alike)}."] if alike else []),
        *told,
    ]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table's lines."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(cells)} |" for cells in rows)]


def full(table: Table, runs: Mapping[str, Any], costs: Mapping[str, Sequence[float]]) -> list[str]:
    """One data set in ``results/methods_table/README.md``."""
    head = ["method", *map(place_text, table.places), "largest PGD-to-APGD gap", "rate", "time of a step", "verdict"]
    rows = []
    for row in table.rows:
        gap = f"{row.gap[0]:.1f}" + (" (!)" if row.gap[0] > LARGEST_GAP else "")
        rate = next(f"{told['rate']:g}" for label, told in runs.items() if label.rpartition("_seed")[0] == row.name)
        cost = of_rounds(costs[row.name]) if row.name in costs else "-"
        rows.append([row.label, *(table.cell(row, where) for where in table.places), gap, rate, cost, row.verdict])
    return [f"## {NAMES[table.data]}", "", *markdown(head, rows), "", *(f"- {sentence}" for sentence in sentences(table)), ""]


def pretraining(results: Path, runs: Mapping[str, Any], n: int) -> list[str]:
    """Adversarial pre-training beside clean pre-training and TeCoA; nothing where neither is measured."""
    labels = [label for label, told in runs.items() if "operations" in told]
    lines = []
    for data in NAMES:
        found = {label: measured(results, label, data, n) for label in labels}
        places = sorted({where for run in found.values() for where in run.figures if where[0] != "pgd"}, key=lambda where: where[1])
        rows = []
        for label, run in found.items():
            shown = [f"{run.figures[where]:.1f} ± {100 * cards.standard_error(run.figures[where] / 100, n):.1f}" for where in places]
            rows.append([label.rpartition("_seed")[0], *shown, f"{runs[label]['operations']:.3g}", run.verdict])
        if rows and places:
            lines += [f"### {NAMES[data]}", "", *markdown(["way", *map(place_text, places), "operations of training", "verdict"], rows), ""]
    told = ["Both from random weights, by `python -m bench.pretraining` at equal compute; one seed each, so nothing is ranked.", ""]
    return ["## Adversarial pre-training", "", *told, *lines] if lines else []


def of_rounds(ratios: Sequence[float]) -> str:
    """Median and range.

    Example:
        >>> of_rounds([1.5, 1.3, 1.42])
        '1.42 (1.30 to 1.50)'
    """
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def page(recipe: Mapping[str, Any], results: Path) -> str:
    """All of ``results/methods_table/README.md``."""
    runs = runs_of(results)
    costs = json.loads(path.read_text())["ratios"] if (path := results / "cost.json").exists() else {}
    given = recipe["evaluate"]
    lines = [
        "# Every method by one recipe",
        "",
        "Written by `python -m bench.methods_table` (recipe: `bench/methods_table.yaml`). `rows/` has the rates tried, the sha256",
        "of the weights and the command of each row, `cards/` every figure.",
        "",
        f"Accuracy in % ± one standard error over images, n = {given['n']} of each data set. Robust: APGD-CE and APGD-T,",
        f"{given['steps']} steps, {given['targets']} targets, L-inf on native pixels. Largest radius first: an image that survives it is",
        "not attacked again at a smaller one, so smaller radii can only come out higher. ↑ and ↓: further from TeCoA than twice TeCoA's",
        "standard deviation over seeds and than twice the standard error of the difference over the same images; what has no arrow is",
        "not ranked. A row of one seed passes twice that deviation by chance of training in about one cell of five: it is the",
        "error over images that holds it back.",
        f"Gap: PGD ({given['steps']} steps, same images) minus APGD, in points, at the radius where it",
        f"is largest; (!) above {LARGEST_GAP:g}. Time of a step: over TeCoA's, median and range of rounds. Verdict: the worst",
        "of the row's cards (docs/checks.md).",
        "",
    ]
    for table in tables(recipe, results):
        lines += full(table, runs, costs)
    return "\n".join([*lines, *pretraining(results, runs, given["n"])])


def in_short(recipe: Mapping[str, Any], results: Path) -> str:
    """What stands between the marks in ``docs/methods.md``: one table of both data sets, and every sentence."""
    found = tables(recipe, results)
    if not found:
        return "No row is measured yet."
    head = ["method", *(f"{table.data}, {place}" for table in found for place in ("clean", f"{TRAINED_AT:g}/255")), "verdict"]
    rows = []
    for name in dict.fromkeys(row.name for table in found for row in table.rows):
        own = {table.data: row for table in found for row in table.rows if row.name == name}
        cells = [table.cell(own[table.data], where) if table.data in own else "-"
                 for table in found for where in (("clean", 0.0), ("apgd", TRAINED_AT))]  # fmt: skip
        rows.append([next(iter(own.values())).label, *cells, min((row.verdict for row in own.values()), key=VERDICT_ORDER.index)])
    done = sum(name in recipe["methods"] for name in {row.name for table in found for row in table.rows})
    lines = [
        f"{done} of {len(recipe['methods'])} methods are measured, on n = {recipe['evaluate']['n']} images of each data set; every radius,",
        "and how: [results/methods_table/README.md](../results/methods_table/README.md). Accuracy in % ± one standard error over images;",
        "robust: APGD-CE and APGD-T. ↑ and ↓: further from TeCoA than twice its standard deviation over seeds, and than twice the",
        "standard error of the difference over the same images.", "", *markdown(head, rows),
    ]  # fmt: skip
    for table in found:
        lines += ["", f"{NAMES[table.data]}:", "", *(f"- {sentence}" for sentence in sentences(table))]
    return "\n".join(lines)
