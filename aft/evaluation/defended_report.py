"""Models behind a defence as a table: undefended, oblivious and adaptive side by side, and in words what the difference means.

No figure of a defence stands alone: a row always has the same weights without it, on the same images.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from aft.cards import Card

#: A card and the label of its model.
Labelled = tuple[str, Card]

#: Columns of ``table.csv`` that cards of defended models fill.
CSV_COLUMNS = (
    "defense", "undefended_clean_accuracy", "undefended_accuracy", "oblivious_accuracy", "oblivious_n", "adaptive_accuracy", "adaptive_n",
    "adaptive_majority", "adaptive_strict", "undefended_there_accuracy", "gain", "gain_low", "gain_high", "helps", "gate_clean",
    "gate_adversarial", "zero_gradient_fraction", "eot_draws", "eot_cosine", "cost_multiplier",
)  # fmt: skip
HEADS = ("clean %", "undef. %", "obliv. %", "adapt. %", "how, verdict")


def told(card: Card) -> dict[str, Any] | None:
    """What a card says of a defence; none for any other card."""
    found = card["metrics"].get("defended")
    assert found is None or isinstance(found, dict)
    return found


def robust_n(card: Card) -> int:
    """The images behind a card's robust accuracy: of a defence those that saw every attack, else all."""
    figures = told(card)
    return int(card["data"]["n"] if figures is None else (figures.get("adaptive") or figures["oblivious"])["n"])


def split(labelled: Sequence[Labelled]) -> tuple[list[Labelled], list[Labelled]]:
    """Cards of plain models, and those of protocols for defences."""
    return [one for one in labelled if told(one[1]) is None], [one for one in labelled if told(one[1]) is not None]


def rows_of(labelled: Sequence[Labelled]) -> list[Labelled]:
    """One card a row: of the same model, defence, images and radius the one that knows most (adaptive, adaptive_small, oblivious)."""
    order = ("oblivious", "adaptive_small", "adaptive")
    best: dict[tuple[Any, ...], Labelled] = {}
    for label, card in labelled:
        key = (label, card["model"]["sha256"], str(card["defense"]["name"]), str(card["defense"]["settings"]), card["data"]["index_sha256"],
               card["data"]["label_space"], str(card["threat"]))  # fmt: skip
        rank = order.index(card["protocol"]["name"])
        if key not in best or rank > order.index(best[key][1]["protocol"]["name"]):
            best[key] = (label, card)
    return list(best.values())


def table(labelled: Sequence[Labelled]) -> Table:
    """One row for each model, defence, data set and radius; under each figure its n, and last the verdict."""
    sheet = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    sheet.add_column("model", overflow="fold")
    for name in ("eps", *HEADS):
        sheet.add_column(name, justify="right", no_wrap=True)
    for label, card in rows_of(labelled):
        *figures, verdict = cells(card)
        sheet.add_row(folded(label), *figures[:-1], f"{figures[-1]}\n{verdict}")
    return sheet


def folded(label: str, width: int = 16) -> str:
    """A long name in several lines, broken after underscores.

    Example:
        >>> folded("tga_zsr_clipure_cos_closed")
        'tga_zsr_clipure_\\ncos_closed'
    """
    lines = [""]
    for piece in re.findall("[^_]*_|[^_]+$", label):
        if lines[-1] and len(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def cells(card: Card) -> list[str]:
    """A row's cells after the model: eps, those of ``HEADS``, verdict."""
    figures, threat = told(card), card["threat"]
    assert figures is not None
    outside = card["external"]
    adaptive = figure(figures.get("adaptive")) + (f"\n{100 * outside['robust_accuracy']:.1f} from outside" if outside else "")
    verdict = "\n".join([card["verdict"]["status"], *card["verdict"]["failed_checks"]])
    return [
        f"{threat['eps'] * 255:.4g}/255" if threat["norm"] == "linf" else f"{threat['eps']:.4g} {threat['norm']}",
        f"{figure(figures['clean'])}\n{100 * figures['undefended_clean']['accuracy']:.1f} und.", figure(figures["undefended"]),
        figure(figures["oblivious"]), adaptive, how(card), verdict,
    ]  # fmt: skip


def how(card: Card) -> str:
    """Cost, draws of a gradient and their cosine, zero gradients, and how often gates open on clean and on attacked images."""
    defense, draws = card["defense"], eot_draws(card)
    gates, zero, cosine = defense["gate_rates"], defense["zero_gradient_fraction"], defense["eot_cosine"]
    agree = "" if cosine is None else f" cos {cosine:.2f}"
    return "\n".join([
        f"cost x{defense['cost_multiplier']:g}", *([] if draws is None else [f"EOT {draws}{agree}"]),
        *([] if zero is None else [f"zero {100 * zero:.1f} %"]),
        *([] if gates is None else [f"gate {100 * gates['clean']:.0f}>{100 * gates['adversarial']:.0f} %"]),
    ])  # fmt: skip


def figure(told: dict[str, Any] | None) -> str:
    """A figure with its standard error, and under it its n; a dash for none.

    Example:
        >>> figure({"accuracy": 0.5, "n": 100, "standard_error": 0.05})
        '50.0 ±5.0\\nn = 100'
    """
    if told is None or told["accuracy"] is None:
        return "-"
    return f"{100 * told['accuracy']:.1f} ±{100 * told['standard_error']:.1f}\nn = {told['n']:,}"


def eot_draws(card: Card) -> int | None:
    """Draws of the gradients of C (of B where there is no C); none where no attack knew the defence."""
    for letter in ("c_", "b_"):
        for attack in card["attacks"]:
            if attack["name"].startswith(letter):
                return int(attack["eot"])
    return None


def footnotes(labelled: Sequence[Labelled]) -> list[str]:
    """What must be known of the figures, and for each row what its attacks broke and whether the defence helps."""
    notes = [
        "Clean: behind the defence, and undefended. Undef.: the same weights and images without the defence, attacked by A. Obliv.: A's "
        "images, made against the undefended model, shown to the defended one. Adapt.: each image's worst case over attacks that know the "
        "defence. A random defence: mean over new draws. ± is one standard error over images. How: operations of a defended forward over "
        "those of an undefended one; draws of a gradient, and the cosine of two such means; gradients that were zero; how often gates open "
        "on clean > on attacked images."
    ]  # fmt: skip
    for label, card in rows_of(labelled):
        figures = told(card)
        assert figures is not None
        shown = {attack["name"]: attack["n"] for attack in card["attacks"]}
        broke = ", ".join(f"{name} {figures['broke'][name]} of {n} (worst for {figures['worst'][name]})" for name, n in shown.items())
        notes.append(f"{label}, {card['defense']['name']}, {card['protocol']['name']}: {figures['words']}. Broken by {broke}.")
    return notes


def csv_row(card: Card) -> dict[str, Any]:
    """The values of ``CSV_COLUMNS``; empty for a card of a plain model."""
    figures, defense = told(card), card["defense"]
    if figures is None or defense is None:
        return dict.fromkeys(CSV_COLUMNS)
    adaptive, gain, gates = figures.get("adaptive") or {}, figures.get("gain") or {}, defense["gate_rates"] or {}
    return {
        "defense": defense["name"], "undefended_clean_accuracy": figures["undefended_clean"]["accuracy"],
        "undefended_accuracy": figures["undefended"]["accuracy"], "oblivious_accuracy": figures["oblivious"]["accuracy"],
        "oblivious_n": figures["oblivious"]["n"], "adaptive_accuracy": adaptive.get("accuracy"), "adaptive_n": adaptive.get("n"),
        "adaptive_majority": adaptive.get("majority"), "adaptive_strict": adaptive.get("strict"),
        "undefended_there_accuracy": figures.get("undefended_there", {}).get("accuracy"), "gain": gain.get("mean"),
        "gain_low": gain.get("low"), "gain_high": gain.get("high"), "helps": gain.get("helps"), "gate_clean": gates.get("clean"),
        "gate_adversarial": gates.get("adversarial"), "zero_gradient_fraction": defense["zero_gradient_fraction"],
        "eot_draws": eot_draws(card), "eot_cosine": defense["eot_cosine"], "cost_multiplier": defense["cost_multiplier"],
    }  # fmt: skip
