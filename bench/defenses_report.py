"""The tables of ``docs/defenses.md``, from the cards that ``configs/eval/defenses_table.yaml`` made: ``python -m bench.defenses_report``.

Copy ``runs/defenses_table/cards`` over ``results/cards/defenses`` first. No figure and no sentence of it was written by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from aft import cards
from aft.cards import Card
from aft.errors import DataError, ending_calmly
from aft.evaluation.defended_report import told
from bench.methods_report import markdown
from bench.page import fill

ROOT = Path(__file__).resolve().parents[1]
CARDS, PAGE = ROOT / "results" / "cards" / "defenses", ROOT / "docs" / "defenses.md"
TABLE = ROOT / "configs" / "eval" / "defenses_table.yaml"
MISSING = "not measured yet"
#: Cards by the names of their weights and of their defence.
Cells = Mapping[tuple[str, str], Card]


def cells_of(folder: Path, weights: Sequence[str], defenses: Sequence[str]) -> Cells:
    """The card of each pair that is measured: ``FOLDER/WEIGHTS_DEFENSE/*.json``.

    Raises:
        DataError: a pair has two cards, or one of no defence under adaptive attacks: which figure to show would be chance.
    """
    found = {(model, name): sorted((folder / f"{model}_{name}").glob("*.json")) for model in weights for name in defenses}
    read = {pair: [(path, cards.read(path)) for path in paths] for pair, paths in found.items()}
    for of_pair in read.values():
        for path, card in of_pair:
            if len(of_pair) > 1 or not (told(card) or {}).get("adaptive"):
                raise DataError(f"{path}: the table takes one card for each pair, of a defence under adaptive attacks: take this one out.")
    return {pair: card for pair, of_pair in read.items() for _, card in of_pair}


def figures_of(card: Card) -> dict[str, Any]:
    """What a card of :func:`cells_of` says of its defence."""
    figures = told(card)
    assert figures is not None
    return figures


def percent(figure: Mapping[str, Any]) -> str:
    """``11.2 ± 1.4``."""
    return f"{100 * figure['accuracy']:.1f} ± {100 * figure['standard_error']:.1f}"


def gain(card: Card) -> dict[str, Any]:
    """Of the defence: points, interval, whether it helps; and whether it harms."""
    figures = figures_of(card)
    return {**figures["gain"], "harms": figures["gain"]["high"] < 0}


def adaptive(card: Card) -> str:
    """The worst case over attacks that know the defence, and what that is to the undefended model where it is told apart."""
    figures, of = figures_of(card), gain(card)
    return percent(figures["adaptive"]) + (f", +{100 * of['mean']:.1f}" if of["helps"] else ", harms" if of["harms"] else "")


def undefended(cells: Cells, weights: str) -> Mapping[str, Any] | None:
    """What the cards of a model's defences say of the model without one."""
    return next((told(card) for (model, _), card in cells.items() if model == weights), None)


def first_table(cells: Cells, weights: Sequence[str], defenses: Sequence[str]) -> list[str]:
    """Robust accuracy by attacks that know the defence."""
    plain = [undefended(cells, model) for model in weights]
    rows = [["undefended", *(MISSING if one is None else percent(one["undefended"]) for one in plain)]]
    for name in defenses:
        rows.append([f"`{name}`", *(adaptive(cells[model, name]) if (model, name) in cells else MISSING for model in weights)])
    return markdown(["robust, adaptive", *weights], rows)


def second_table(cells: Cells, weights: Sequence[str], defenses: Sequence[str]) -> list[str]:
    """Clean accuracy, robust accuracy as the field reports it, and what a look costs."""
    plain = [undefended(cells, model) for model in weights]
    rows = [["undefended", *(MISSING if one is None else f"{100 * one['undefended_clean']['accuracy']:.1f}" for one in plain), "1"]]
    for name in defenses:
        own = [cells.get((model, name)) for model in weights]
        cost = next((f"{card['defense']['cost_multiplier']:.3g}" for card in own if card is not None), MISSING)
        rows.append([f"`{name}`", *(MISSING if card is None else beside(card) for card in own), cost])
    return markdown(["clean, oblivious", *weights, "operations of a look"], rows)


def beside(card: Card) -> str:
    """Clean and oblivious accuracy, and how often a gate opens."""
    figures, gates = figures_of(card), card["defense"]["gate_rates"]
    opens = "" if gates is None else f" (gate {100 * gates['clean']:.0f}, {100 * gates['adversarial']:.0f})"
    return f"{100 * figures['clean']['accuracy']:.1f}, {100 * figures['oblivious']['accuracy']:.1f}{opens}"


def sentences(cells: Cells) -> Iterator[str]:
    """What follows from the figures."""
    for key in ("helps", "harms"):
        those = [f"`{name}` on {model} ({100 * of['mean']:+.1f} points, {100 * of['low']:+.1f} to {100 * of['high']:+.1f})"
                 for (model, name), card in cells.items() if (of := gain(card))[key]]  # fmt: skip
        yield f"A defence {key}, by the 95 % interval of the difference over images, in {len(those)} of {len(cells)} cells" + \
            (f": {', '.join(those)}." if those else ".")
    flattered = {pair: 100 * (told(card)["oblivious"]["accuracy"] - told(card)["adaptive"]["accuracy"]) for pair, card in cells.items()}  # type: ignore[index]
    (model, name), most = max(flattered.items(), key=lambda one: one[1])
    yield f"Attacks that know the defence take at most {most:.1f} points from what attack A alone leaves (`{name}` on {model})."
    suspects = [card for card in cells.values() if card["verdict"]["status"] == "suspect"]
    if suspects:
        names = sorted({f"`{card['defense']['name']}` ({', '.join(card['verdict']['failed_checks'])})" for card in suspects})
        yield f"Suspect cells: {len(suspects)}, of {', '.join(names)}."


def text_of(folder: Path, table: Path = TABLE) -> str:
    """Both tables and the sentences."""
    recipe = yaml.safe_load(table.read_text(encoding="utf-8"))
    weights, defenses = list(recipe["models"]), list(recipe["defenses"])
    cells = cells_of(folder, weights, defenses)
    lines = [*first_table(cells, weights, defenses), "", *second_table(cells, weights, defenses)]
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in sentences(cells))] if cells else lines)


if __name__ == "__main__":
    with ending_calmly():
        fill(PAGE, "bench.defenses_report", text_of(CARDS))
