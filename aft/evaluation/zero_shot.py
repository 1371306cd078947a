"""What a suite of test sets says in all: the mean over those that are zero-shot for a model, and what the others would take.

A set is not counted for a model that was trained on it or on one of its family: classes or images of it were seen then. What a model was
trained on is known of the embedded weights (by their sha256, also under a fine-tuning); for all else it must be said.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
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
        not_counted: ids of the measured sets that do not count.
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


def means(labelled: Sequence[Labelled], families: Mapping[str, str], trained_on: Mapping[str, Sequence[str]]) -> list[Mean]:
    """One mean for each model, label space and radius, in the order of the cards.

    Args:
        labelled: cards of one or more sets.
        families: of every set.
        trained_on: label -> ids of the sets that the model was trained on.
    """
    groups: dict[tuple[str, ...], list[Labelled]] = {}
    for label, card in labelled:
        key = (label, card["model"]["sha256"], card["data"]["label_space"], eps_text(card), str((card["threat"] or {}).get("space")))
        groups.setdefault(key, []).append((label, card))
    return [mean_of(label, [card for _, card in group], families, trained_on.get(label)) for (label, *_), group in groups.items()]


def mean_of(label: str, cards: Sequence[Card], families: Mapping[str, str], told: Sequence[str] | None) -> Mean:
    """The mean of one model's cards at one radius, over the sets that have a card of every protocol."""
    known, unknown = seen(cards[0], told, families)
    by_set: dict[str, dict[str, Card]] = {}
    for card in cards:
        by_set.setdefault(card["data"]["name"], {})[printed(card["protocol"])] = card
    protocols = list(dict.fromkeys(printed(card["protocol"]) for card in cards))
    counted = {name: of for name, of in by_set.items() if families.get(name, name) not in known and len(of) == len(protocols)}
    firsts = [of[protocols[0]] for of in counted.values()]
    attacked = [name for name in protocols if cards[0]["threat"] is not None]
    robust = {name: average([of[name] for of in counted.values()], "robust") for name in attacked if firsts}
    verdicts = [card["verdict"]["status"] for of in counted.values() for card in of.values()]
    return Mean(
        label, cards[0]["data"]["label_space"], eps_text(cards[0]), tuple(counted), sum(card["data"]["n"] for card in firsts),
        average(firsts, "clean") if firsts else None, robust, sum(card["chance"] for card in firsts) / len(firsts) if firsts else None,
        min(verdicts, key=VERDICT_ORDER.index, default="unchecked"), tuple(name for name in by_set if name not in counted), unknown,
    )  # fmt: skip


def average(cards: Sequence[Card], what: str) -> tuple[float, float]:
    """Mean accuracy (``clean`` or ``robust``) over cards, and its standard error."""
    errors = [card["standard_error"][what] for card in cards]
    return sum(card[f"{what}_accuracy"] for card in cards) / len(cards), math.sqrt(sum(error**2 for error in errors)) / len(cards)


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
    notes = ["Zero-shot mean: each set counts once. ± is of the images drawn, not of the choice of sets; the verdict is the worst of its "
             "cards."]
    for label in dict.fromkeys(mean.label for mean in found):
        own = [mean for mean in found if mean.label == label]
        sets = dict.fromkeys(name for mean in own for name in mean.sets)
        out = dict.fromkeys(name for mean in own for name in mean.not_counted)
        line = f"{label}: over {', '.join(sets) or 'no set'}"
        line += f"; not counted, since it or its family was trained on (or a card is missing): {', '.join(out)}" if out else ""
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
