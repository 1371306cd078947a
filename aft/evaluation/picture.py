"""Accuracy against eps, and robust against clean accuracy, as pictures: one panel a label space, no point without its standard error."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aft import cards
from aft.attacks.threat_model import radius_text
from aft.cards import Card
from aft.errors import RunError
from aft.evaluation import defended_report
from aft.evaluation.published import printed
from aft.evaluation.report import Labelled, data_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Okabe and Ito's colours, which colour-blind eyes tell apart; markers differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = ("-", "--", ":", "-.")
PANEL_INCHES = (4.6, 4.2)


def draw(labelled: Sequence[Labelled], path: Path) -> Path | None:
    """Draws all cards with a threat model; the clean accuracy is the point at eps = 0. Bars are one standard error.

    Returns:
        ``path``; none where no card has an attack, so that there is nothing to draw.

    Raises:
        RunError: matplotlib is not installed.
    """
    panels = _panels(_alone(labelled))
    return _save(panels, _draw_panel, "accuracy, %", path) if panels else None


def draw_curve(labelled: Sequence[Labelled], path: Path) -> Path | None:
    """Robust against clean accuracy, one line a radius and protocol, one point a model, in the order given. Bars are one standard error.

    Returns:
        ``path``; none where no card has an attack, so that there is nothing to draw.

    Raises:
        RunError: matplotlib is not installed.
    """
    panels = _panels(_alone(labelled))
    return _save(panels, _draw_curve_panel, "robust accuracy, %", path) if panels else None


def _alone(labelled: Sequence[Labelled]) -> list[Labelled]:
    """Cards with an attack; without those of a defence, whose figures never stand without the undefended ones."""
    return [one for one in labelled if one[1]["threat"] is not None and defended_report.told(one[1]) is None]


def _save(panels: dict[str, list[Labelled]], draw_panel: Callable[[Axes, str, Sequence[Labelled]], None], y: str, path: Path) -> Path:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RunError("no picture without matplotlib: install it with pip install 'aft[eval]'; table and CSV are there.") from error
    figure = Figure(figsize=(PANEL_INCHES[0] * len(panels), PANEL_INCHES[1]), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (title, of_panel) in zip(axes, panels.items(), strict=True):
        draw_panel(panel, title, of_panel)
    axes[0].set_ylabel(y)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png")
    cards.write_whole(path, buffer.getvalue())
    return path


def _panels(labelled: Sequence[Labelled]) -> dict[str, list[Labelled]]:
    panels: dict[str, list[Labelled]] = {}
    for label, card in labelled:
        threat = card["threat"]
        panels.setdefault(f"{data_text(card)}, {threat['norm']}, {threat['space']} {threat['resolution']} px", []).append((label, card))
    return panels


def _draw_panel(axes: Axes, title: str, labelled: Sequence[Labelled]) -> None:
    models = list(dict.fromkeys((label, card["model"]["sha256"]) for label, card in labelled))
    protocols = list(dict.fromkeys(printed(card["protocol"]) for _, card in labelled))
    lines: dict[tuple[int, int, int], list[Card]] = {}
    for label, card in labelled:
        place = (models.index((label, card["model"]["sha256"])), protocols.index(printed(card["protocol"])), card["data"]["n"])
        lines.setdefault(place, []).append(card)
    for (model, protocol, n), of_line in sorted(lines.items()):
        name = f"{models[model][0]}, {protocols[protocol]}, n = {n:,} ({_verdict(of_line)})"
        _draw_line(axes, of_line, label=name, color=COLOURS[model % len(COLOURS)], marker=MARKERS[model % len(MARKERS)],
                   linestyle=STYLES[protocol % len(STYLES)], markerfacecolor="white" if protocol % 2 else COLOURS[model % len(COLOURS)])
    for chance in sorted({card["chance"] for _, card in labelled}):
        axes.axhline(100 * chance, color="0.4", linewidth=1, linestyle=(0, (2, 2)))
        axes.annotate(f"chance {100 * chance:.1f} %", (0.01, 100 * chance), xycoords=("axes fraction", "data"), ha="left", va="bottom",
                      fontsize=8, color="0.3")
    radii = sorted({0.0, *(_radius(card) for _, card in labelled)})
    axes.set_xticks(radii, [f"{radius:.3g}" for radius in radii])
    axes.set(title=title, xlabel=f"eps, {_unit(labelled[0][1])}", ylim=(0, 100))
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, framealpha=0.85, handlelength=3.5)


def _draw_curve_panel(axes: Axes, title: str, labelled: Sequence[Labelled]) -> None:
    lines: dict[tuple[str, float], list[Labelled]] = {}
    for label, card in labelled:
        lines.setdefault((printed(card["protocol"]), card["threat"]["eps"]), []).append((label, card))
    for place, ((protocol, eps), of_line) in enumerate(lines.items()):
        cards_of_line = [card for _, card in of_line]
        x, y = ([100 * card[f"{kind}_accuracy"] for card in cards_of_line] for kind in ("clean", "robust"))
        x_error, y_error = ([100 * card["standard_error"][kind] for card in cards_of_line] for kind in ("clean", "robust"))
        radius = radius_text(cards_of_line[0]["threat"]["norm"], eps)
        name = f"{protocol} {radius}, n = {cards_of_line[0]['data']['n']:,} ({_verdict(cards_of_line)})"
        axes.errorbar(x, y, xerr=x_error, yerr=y_error, capsize=2, linewidth=1.4, markersize=5, label=name,
                      color=COLOURS[place % len(COLOURS)], marker=MARKERS[place % len(MARKERS)])  # fmt: skip
        for (label, _), clean, robust in zip(of_line, x, y, strict=True):
            axes.annotate(label, (clean, robust), textcoords="offset points", xytext=(4, 5), fontsize=7, color="0.3")
    axes.set(title=title, xlabel="clean accuracy, %")
    axes.set_ylim(bottom=0)
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, framealpha=0.85)


def _unit(card: Card) -> str:
    return "1/255 of the pixel range" if card["threat"]["norm"] == "linf" else "in units of the pixel range"


def _radius(card: Card) -> float:
    """In that unit."""
    return float(card["threat"]["eps"]) * (255 if card["threat"]["norm"] == "linf" else 1)


def _verdict(of_line: Sequence[Card]) -> str:
    """Each verdict of the line's cards once, with the checks that failed."""
    return ", ".join(sorted({" ".join([card["verdict"]["status"], *card["verdict"]["failed_checks"]]) for card in of_line}))


def _draw_line(axes: Axes, of_line: Sequence[Card], **style: Any) -> None:
    ladder = sorted(of_line, key=lambda card: float(card["threat"]["eps"]))
    clean = ladder[0]
    points = [(0.0, clean["clean_accuracy"], clean["standard_error"]["clean"])]
    points += [(_radius(card), card["robust_accuracy"], card["standard_error"]["robust"]) for card in ladder]
    x, share, error = zip(*points, strict=True)
    axes.errorbar(x, [100 * s for s in share], yerr=[100 * e for e in error], capsize=3, linewidth=1.6, markersize=5, **style)
