"""What a suite of test sets says in all: the mean over those that are zero-shot, and what the others would take.

One rule for every mean, here and on the report's page (:func:`counted`): a set counts where no model of the table was trained on it or on
one of its family, since classes or images of it were seen then; a model that lacks a set that counts has no mean. So all means of a table
are over the same sets. What a model was trained on is known of the embedded weights (by their sha256, also under a fine-tuning); for all
else it must be said.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from aft.batch import SuiteData
from aft.cards import Card, write_whole
from aft.clip.training_data import TRAINED_ON
from aft.errors import ConfigError, unknown_name
from aft.evaluation import effort
from aft.evaluation.published import printed
from aft.evaluation.report import VERDICT_ORDER, Labelled, eps_text, percent

#: What weights that come with this project were pre-trained on, by their sha256: MiniCLIP-32.
PRETRAINED_ON = {sha256: tuple(str(use["name"]) for use in data) for sha256, data in TRAINED_ON.items()}


@dataclass(frozen=True)
class Mean:
    """The unweighted mean over the zero-shot sets of one model at one radius.

    Args:
        label: the model's, in tables.
        label_space: of all cards.
        eps: as tables write it.
        sets: ids of the sets that count.
        n: images of all of them together.
        clean: mean of clean accuracies, and its standard error: ``sqrt(sum of squares) / sets``, of the images drawn, not of the choice
            of sets.
        robust: the same for each protocol.
        chance: mean of chance.
        verdict: the worst of all cards.
        not_counted: ids of the sets that do not count: a model of the table was trained on them or on their family.
        lacking: ids of sets that count and have no card of every protocol for this model, which therefore has no mean.
        unknown: nobody said what the model was fine-tuned on.
    """

    label: str
    label_space: str
    eps: str
    sets: tuple[str, ...]
    n: int
    clean: tuple[float, float] | None
    robust: dict[str, tuple[float, float]]
    chance: float | None
    verdict: str
    not_counted: tuple[str, ...]
    lacking: tuple[str, ...]
    unknown: bool


def check_trained(trained_on: Mapping[str, Sequence[str]], families: Mapping[str, str]) -> None:
    """Refuses to be told of sets that do not exist.

    Raises:
        ConfigError: an unknown id (near matches are listed).
    """
    for label, ids in trained_on.items():
        for name in ids:
            if name not in families:
                raise ConfigError(unknown_name(f"set in trained_on of {label}", name, families))


def seen(card: Card, told: Sequence[str] | None, families: Mapping[str, str]) -> tuple[set[str], bool]:
    """The families that a card's model has seen, and whether its fine-tuning is unknown.

    Args:
        card: of the model.
        told: ids of the sets that its user says it was trained on; none: nothing was said.
        families: of every set.
    """
    model = card["model"]
    known = [name for weights in (model["sha256"], model["base_sha256"]) for name in PRETRAINED_ON.get(weights, ())]
    return {families.get(name, name) for name in [*known, *(told or ())]}, told is None and model["method"] != "none"


def counted(names: Iterable[str], seen_families: AbstractSet[str], families: Mapping[str, str]) -> tuple[str, ...]:
    """The sets that a mean is over: those of which nothing was trained on.

    Args:
        names: ids of the sets that any model of the table was measured on.
        seen_families: the families that any model of the table has seen (:func:`seen`).
        families: of every set; a set that is not in it is a family of its own.
    """
    return tuple(name for name in dict.fromkeys(names) if families.get(name, name) not in seen_families)


def average(figures: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The unweighted mean of accuracies, each with its standard error, and its own: ``sqrt(sum of squares) / count``."""
    return sum(share for share, _ in figures) / len(figures), math.sqrt(sum(error**2 for _, error in figures)) / len(figures)


def means(labelled: Sequence[Labelled], families: Mapping[str, str], trained_on: Mapping[str, Sequence[str]]) -> list[Mean]:
    """One mean for each model, label space and radius, in the order of the cards.

    Args:
        labelled: cards of one or more sets.
        families: of every set.
        trained_on: label -> ids of the sets that the model was trained on.
    """
    known = set().union(*(seen(card, trained_on.get(label), families)[0] for label, card in labelled))
    names: dict[str, list[str]] = {}
    groups: dict[tuple[str, ...], list[Card]] = {}
    for label, card in labelled:
        space = card["data"]["label_space"]
        names.setdefault(space, []).append(card["data"]["name"])
        key = (label, card["model"]["sha256"], space, eps_text(card), str((card["threat"] or {}).get("space")))
        groups.setdefault(key, []).append(card)
    sets = {space: counted(of, known, families) for space, of in names.items()}
    left = {space: tuple(name for name in dict.fromkeys(of) if name not in sets[space]) for space, of in names.items()}
    return [
        mean_of(label, group, sets[space], left[space], seen(group[0], trained_on.get(label), families)[1])
        for (label, _, space, *_), group in groups.items()
    ]


def mean_of(label: str, cards: Sequence[Card], sets: Sequence[str], not_counted: tuple[str, ...], unknown: bool) -> Mean:
    """The mean of one model's cards at one radius, over these sets, where each has a card of every protocol."""
    by_set: dict[str, dict[str, Card]] = {}
    for card in cards:
        by_set.setdefault(card["data"]["name"], {})[printed(card["protocol"])] = card
    protocols = list(dict.fromkeys(printed(card["protocol"]) for card in cards))
    lacking = tuple(name for name in sets if len(by_set.get(name, {})) < len(protocols))
    whole = [] if lacking else [by_set[name] for name in sets]
    firsts = [of[protocols[0]] for of in whole]
    attacked = [name for name in protocols if cards[0]["threat"] is not None]
    verdicts = [card["verdict"]["status"] for of in whole for card in of.values()]
    return Mean(
        label, cards[0]["data"]["label_space"], eps_text(cards[0]), () if lacking else tuple(sets),
        sum(card["data"]["n"] for card in firsts),
        average([_figure(card, "clean") for card in firsts]) if firsts else None,
        {name: average([_figure(of[name], "robust") for of in whole]) for name in attacked if whole},
        sum(card["chance"] for card in firsts) / len(firsts) if firsts else None,
        min(verdicts, key=VERDICT_ORDER.index, default="unchecked"), not_counted, lacking, unknown,
    )  # fmt: skip


def _figure(card: Card, what: str) -> tuple[float, float]:
    return card[f"{what}_accuracy"], card["standard_error"][what]


def table(found: Sequence[Mean]) -> Table:
    """One row a mean."""
    protocols = list(dict.fromkeys(name for mean in found for name in mean.robust))
    sheet = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    sheet.add_column("model", overflow="fold")
    for name in ("zero-shot sets", "eps", "clean %", *(f"{name} %" for name in protocols), "chance"):
        sheet.add_column(name, justify="right", no_wrap=True)
    sheet.add_column("verdict", no_wrap=True)
    for mean in found:
        robusts = [percent(*mean.robust.get(name, (None, None))) for name in protocols]
        chance = "-" if mean.chance is None else f"{100 * mean.chance:.1f}"
        space = "" if mean.label_space == "all" else f" {mean.label_space}"
        clean = percent(*(mean.clean or (None, None)))
        sheet.add_row(mean.label, f"{len(mean.sets)}{space}", mean.eps, clean, *robusts, chance, mean.verdict)
    return sheet


def footnotes(found: Sequence[Mean]) -> list[str]:
    """Which sets each mean is over, which not, and what is not known."""
    notes = ["Zero-shot mean: each set counts once, and all means of this table are over the same sets: those that no model of it was "
             "trained on. ± is of the images drawn, not of the choice of sets; the verdict is the worst of its cards."]
    for label in dict.fromkeys(mean.label for mean in found):
        own = [mean for mean in found if mean.label == label]
        sets = dict.fromkeys(name for mean in own for name in mean.sets)
        out = dict.fromkeys(name for mean in own for name in mean.not_counted)
        line = f"{label}: over {', '.join(sets) or 'no set'}"
        lacking = dict.fromkeys(name for mean in own for name in mean.lacking)
        line += f" (no mean without cards of {', '.join(lacking)})" if lacking else ""
        line += f"; not counted, since a model of this table was trained on it or its family: {', '.join(out)}" if out else ""
        if any(mean.unknown for mean in own):
            line += f". What it was fine-tuned on is not known: say it by --trained_on '{{{label}: [ID, ...]}}' (or [] for none of these)"
        notes.append(f"{line}.")
    return notes


def conclude(
    labelled: Sequence[Labelled], suite: SuiteData, trained_on: Mapping[str, Sequence[str]], label_spaces: Mapping[str, Any],
    n: int | None, out: Path, stream: TextIO | None = None,
) -> list[Mean]:  # fmt: skip
    """Prints the means and what the other sets would take, and writes the means to ``OUT/zero_shot.json``.

    Args:
        labelled: the cards of a suite.
        suite: knows families and sizes.
        trained_on: label -> ids of the sets that the model was trained on.
        label_spaces: name -> classes; none: all, of every set.
        n: images of each set; none: all.
        out: folder.
        stream: to print to; none: the screen.
    """
    found = means(labelled, suite.families, trained_on)
    console = Console(file=stream, highlight=False, markup=False)
    console.print()
    console.print(table(found))
    strangers = sorted(set(trained_on) - {label for label, _ in labelled})
    for note in [*footnotes(found), *(f"trained_on names {label}, which is no model of this table." for label in strangers)]:
        console.print(note, style="dim")
    everywhere = [space for space, classes in label_spaces.items() if classes is None]
    for line in effort.lines(labelled, everywhere, suite.sizes, n):
        console.print(line, style="dim")
    write_whole(out / "zero_shot.json", (json.dumps([asdict(mean) for mean in found], indent=1) + "\n").encode())
    return found
