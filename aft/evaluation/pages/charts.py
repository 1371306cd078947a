"""Pictures as lines and points in the units of an SVG; the template draws them, and the page's style sheet colours them.

Colours and marks go by model and are the same in every panel. No point without its standard error: bars are one, and each point's
words (:attr:`aft.evaluation.pages.tables.Number.words`) have n and verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from aft.evaluation.pages.tables import Group, Number, Row

#: Size of a panel and its margins (left, right, top, bottom), in units of the SVG.
WIDTH, HEIGHT = 380.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 16.0, 12.0, 44.0
#: How many colours the style sheet has, each with a mark of its own; line styles go by protocol.
COLOURS = 7
MARKS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z", "M-3.6,-3.6h7.2v7.2h-7.2z", "M0,-4.6L4.4,3.2H-4.4z", "M0,-5L4.4,0L0,5L-4.4,0z",
    "M0,4.6L4.4,-3.2H-4.4z", "M-1.5,-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "M-4,-2.4L-2.4,-4L0,-1.6L2.4,-4L4,-2.4L1.6,0L4,2.4L2.4,4L0,1.6L-2.4,4L-4,2.4L-1.6,0z",
)  # fmt: skip
#: Points of a panel that are named beside it (more are told apart by colour and mark), and the room that a name takes.
MOST_NAMES, NAME_WIDTH, NAME_HEIGHT = 8, 110.0, 13.0
DASHES = ("", "6 4", "2 3", "8 3 2 3")
TICKS = 5


@dataclass(frozen=True)
class Point:
    """A mark with its bars (none of no length), and what it says."""

    x: float
    y: float
    bars: list[tuple[float, float, float, float]]
    words: str


@dataclass(frozen=True)
class Line:
    """The points of one model under one protocol; ``colour`` is its number, ``mark`` an SVG path around (0, 0)."""

    name: str
    colour: int
    mark: str
    dash: str
    points: list[Point]

    @property
    def path(self) -> str:
        """Through all points."""
        return "M" + "L".join(f"{point.x:.1f},{point.y:.1f}" for point in self.points)


@dataclass
class Panel:
    """One set of axes; ticks are (place, text), ``chance`` is a height and its text, ``names`` are (x, y, anchor, text)."""

    title: str
    x_name: str
    y_name: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line] = field(default_factory=list)
    names: list[tuple[float, float, str, str]] = field(default_factory=list)
    chance: tuple[float, str] | None = None

    @property
    def words(self) -> str:
        """The panel for those who do not see it."""
        return f"{self.title}: {self.y_name} over {self.x_name}, {len(self.lines)} lines; their figures are in the table."


def curves(group: Group, models: Sequence[str]) -> list[Panel]:
    """Accuracy over eps, one panel a data set, the clean accuracy at eps = 0; none without radii.

    Args:
        group: a table.
        models: keys of all models of the page, whose order gives them their colours.
    """
    panels = []
    for data, rows in _by_data(group).items():
        top = _nice(max(100 * (one.share + one.error) for row in rows for one in row.numbers))
        x, y = _scale(0, max(group.columns.values()), LEFT, WIDTH - RIGHT), _scale(0, top, HEIGHT - BOTTOM, TOP)
        places = {0.0: "0", **{value: f"{value:.3g}" for value in group.columns.values()}}
        panel = Panel(data, f"eps, {group.unit}", "accuracy, %", [(x(v), t) for v, t in places.items()], _y_ticks(top, y))
        for row in rows:
            values: list[tuple[float, Number]] = [(0.0, row.clean)]
            values += [(group.columns[eps], one) for eps in group.columns for one in row.robust.get(eps, ())]
            points = [Point(x(v), y(100 * one.share), [_bar_y(x(v), one, y)], f"{'clean' if not v else f'eps {v:.3g}'}: {_said(one)}")
                      for v, one in values]  # fmt: skip
            panel.lines.append(_line(row, group, models, points))
        chances = {row.chance for row in rows if row.chance is not None}
        if len(chances) == 1 and 100 * min(chances) <= top:
            panel.chance = (y(100 * min(chances)), f"chance {100 * min(chances):.3g} %")
        panels.append(panel)
    return panels


def clean_and_robust(group: Group, models: Sequence[str]) -> list[Panel]:
    """Robust over clean accuracy, one panel a data set and radius, one point a model; none without radii."""
    return [_plane(f"{data}, eps {eps}", eps, [row for row in rows if eps in row.robust], group, models)
            for data, rows in _by_data(group).items() for eps in group.columns if any(eps in row.robust for row in rows)]  # fmt: skip


def _plane(title: str, eps: str, rows: Sequence[Row], group: Group, models: Sequence[str]) -> Panel:
    low = min(100 * (row.clean.share - row.clean.error) for row in rows)
    high = max(100 * (row.clean.share + row.clean.error) for row in rows)
    step = _step(max(high - low, 1))
    low, high = max(0, step * math.floor(low / step - 0.5)), min(100.0, step * math.ceil(high / step + 0.5))
    top = _nice(max(100 * (one.share + one.error) for row in rows for one in row.robust[eps]))
    x, y = _scale(low, high, LEFT, WIDTH - RIGHT), _scale(0, top, HEIGHT - BOTTOM, TOP)
    panel = Panel(title, "clean accuracy, %", "robust accuracy, %", [(x(v), f"{v:.3g}") for v in _steps(low, high, step)], _y_ticks(top, y))
    for row in rows:
        at, clean, points = x(100 * row.clean.share), row.clean, []
        for one in row.robust[eps]:
            height = y(100 * one.share)
            across = (x(100 * max(0, clean.share - clean.error)), height, x(100 * min(1, clean.share + clean.error)), height)
            points.append(Point(at, height, [_bar_y(at, one, y), across], f"robust {_said(one)}; clean {_said(clean)}"))
        panel.lines.append(_line(row, group, models, points))
    if sum(len(line.points) for line in panel.lines) <= MOST_NAMES:
        panel.names = _names(panel.lines, [row.label for row in rows])
    return panel


def _names(lines: Sequence[Line], labels: Sequence[str]) -> list[tuple[float, float, str, str]]:
    """(x, y, anchor, text) of each point's name, beside it and moved down where names would lie on each other."""
    placed: list[tuple[float, float, str, str]] = []
    named = [(point, label) for line, label in zip(lines, labels, strict=True) for point in line.points]
    for point, label in sorted(named, key=lambda one: one[0].y):
        side, away = ("end", -8) if point.x > (WIDTH + LEFT) / 2 else ("start", 8)
        near = [y for x, y, other, _ in placed if other == side and abs(x - point.x - away) < NAME_WIDTH]
        placed.append((point.x + away, max([point.y - 5, *(y + NAME_HEIGHT for y in near)]), side, label))
    return placed


def model_key(row: Row) -> str:
    """What gets one colour: a label and its weights."""
    return f"{row.label} {row.sha256}"


def _said(number: Number) -> str:
    return f"{number.text} %, n = {number.n:,}, {' '.join([number.verdict, *number.failed])}"


def _by_data(group: Group) -> dict[str, list[Row]]:
    """Rows with a robust figure by data set, the mean over sets first."""
    by_data: dict[str, list[Row]] = {}
    for row in sorted(group.rows, key=lambda row: not row.over):
        if row.robust:
            by_data.setdefault(row.data, []).append(row)
    return by_data


def _line(row: Row, group: Group, models: Sequence[str], points: list[Point]) -> Line:
    protocols = list(dict.fromkeys(one.attacked_by for one in group.rows if one.robust))
    place = models.index(model_key(row))
    dash = DASHES[protocols.index(row.attacked_by) % len(DASHES)]
    mark = MARKS[(place + place // COLOURS) % len(MARKS)]  # after all colours are used once, they come with other marks
    return Line(f"{row.label}, {row.attacked_by}", place % COLOURS, mark, dash, points)


def _bar_y(at: float, number: Number, y: Callable[[float], float]) -> tuple[float, float, float, float]:
    return at, y(100 * max(0, number.share - number.error)), at, y(100 * min(1, number.share + number.error))


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (end - start) * (value - low) / ((high - low) or 1)


def _nice(value: float) -> float:
    """The end of an axis: the next whole number of steps, at most 100."""
    value = max(value, 1)
    step = _step(value)
    return min(100.0, step * math.ceil(value / step))


def _step(span: float) -> float:
    """1, 2 or 5 times a power of ten, so that an axis has about five steps."""
    rough = span / TICKS
    power: float = 10 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)


def _steps(low: float, high: float, step: float) -> list[float]:
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _y_ticks(top: float, y: Callable[[float], float]) -> list[tuple[float, str]]:
    return [(y(value), f"{value:.3g}") for value in _steps(0, top, _step(top))]
