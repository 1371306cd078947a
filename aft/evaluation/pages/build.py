"""Writes a report: ``report.html`` (one file that needs nothing else), ``report.md``, ``table.csv`` and ``accuracy.png``.

What a page says follows from the cards alone, so that the same cards give the same page; the clock is not asked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from aft import __version__, cards
from aft.cards import Card, lowered
from aft.errors import RunError
from aft.evaluation import defended_report, report
from aft.evaluation.collect import Collection, Labelled
from aft.evaluation.compare import BEYOND, Comparison, gaps
from aft.evaluation.pages import charts, markdown
from aft.evaluation.pages.examples import Examples
from aft.evaluation.pages.tables import GREY, MARKS, NORMS, Group, Row, anchor, data_words, groups_of, metrics_of, number_of
from aft.evaluation.picture import draw
from aft.evaluation.published import printed
from aft.evaluation.report import eps_text, percent

HERE = Path(__file__).resolve().parent
#: Above this a page is written without its example images, bytes.
LARGEST_PAGE = 2 * 1024**2
#: Panels of a table that are open at first, and how many there are at most: the others are one click away, or left out.
OPEN_PANELS, MOST_PANELS = 6, 18
#: Lists that are longer are closed at first; tables that are longer scroll in a box of their own, and cards are put together by label.
MANY, TALL = 12, 40
#: Rows of ours that are shown beside published figures.
MOST_OURS = 12
#: The radii of published figures.
RADII = ("1/255", "2/255", "4/255")


@dataclass(frozen=True)
class Content:
    """All that a report is made of.

    Args:
        found: the cards.
        trained_on: data sets that models were trained on, beside what is known of embedded weights: left out of means.
        comparison: with another report; none where none was asked for.
        against: what the other report is called.
        examples: images with attacks; may be empty.
        families: of data sets: who was trained on one has seen the others.
    """

    found: Collection
    trained_on: Sequence[str] = ()
    comparison: Comparison | None = None
    against: str = ""
    examples: Sequence[Examples] = field(default_factory=tuple)
    families: Mapping[str, str] = field(default_factory=dict)


def write_report(content: Content, out: Path) -> dict[str, Path]:
    """Writes the page, the Markdown, the CSV, and the picture where matplotlib is there.

    Raises:
        RunError: jinja2 is not installed.
    """
    shown = as_shown(content.found.labelled)
    written = {"table": report.write_csv(shown, out / "table.csv")}
    if drawn := picture(shown, out / "accuracy.png", draw):
        written["picture"] = drawn
    text = markdown.text_of(facts_of(content), "accuracy.png" if drawn else None)
    cards.write_whole(out / "report.md", text.encode())
    cards.write_whole(out / "report.html", page_of(content).encode())
    return {"page": out / "report.html", "markdown": out / "report.md", **written}


def again(content: Content, out: Path) -> None:
    """Shows found cards: the table, what could not be shown, and the comparison on screen, then all files, and how large the page is."""
    report.show(as_shown(content.found.labelled))
    for one in content.found.unread:
        print(f"not shown: {one.path}: {one.why}")
    if content.comparison is not None:
        print("\n".join([f"against {content.against}:", *content.comparison.lines()]))
    for kind, path in write_report(content, out).items():
        print(f"{kind}: {path} ({path.stat().st_size / 1000:,.0f} kB)")
    if (out / "report.html").stat().st_size > LARGEST_PAGE:
        print(f"the page is larger than {LARGEST_PAGE // 1024**2} MB: give fewer folders at once.")


def publish(labelled: list[Labelled], out: Path) -> None:
    """The table on screen, then ``table.csv`` and ``accuracy.png``."""
    labelled = as_shown(labelled)
    report.show(labelled)
    print(f"table: {report.write_csv(labelled, out / 'table.csv')}")
    if drawn := picture(labelled, out / "accuracy.png", draw):
        print(f"picture: {drawn}")


def as_shown(labelled: Sequence[Labelled]) -> list[Labelled]:
    """Each card with the lower of its own robust accuracy and of an external attack's."""
    return [(label, lowered(card)) for label, card in labelled]


def picture(labelled: list[Labelled], path: Path, drawer: Callable[[list[Labelled], Path], Path | None]) -> Path | None:
    """The picture's path; none where there is nothing to draw, or matplotlib is missing (which is said)."""
    try:
        return drawer(labelled, path)
    except RunError as error:
        print(error)
        return None


def page_of(content: Content) -> str:
    """The page as one HTML text, without the example images where it would be too large with them."""
    page = _rendered(facts_of(content))
    if len(page.encode()) > LARGEST_PAGE and content.examples:
        page = _rendered({**facts_of(replace(content, examples=())), "examples_left_out": True})
    return page.replace("@SIZE@", f"{len(page.encode()) / 1000:,.0f} kB", 1)


def _rendered(facts: dict[str, Any]) -> str:
    text: str = _template().render(facts)
    return text


@cache
def _template() -> Any:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise RunError("no page without jinja2: install it with pip install 'aft[eval]'.") from error
    loader = FileSystemLoader(HERE)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": lambda share: f"{100 * share:.1f}", "outcome": lambda one: one.of.outcome.replace(" ", "-")}
    return environment.get_template("page.html.jinja")


def facts_of(content: Content) -> dict[str, Any]:
    """What page and Markdown are filled with."""
    found = content.found
    plain, defended = defended_report.split(as_shown(found.labelled))
    undefended = [one for one in found.labelled if defended_report.told(one[1]) is None]
    groups = groups_of(undefended, content.trained_on, content.families)
    models = list(dict.fromkeys(charts.model_key(row) for group in groups for row in group.rows))
    panels = {group.id: _panels(group, models) for group in groups}
    told = [_card(label, card, path) for (label, card), path in zip(found.labelled, found.paths, strict=True)]
    return {
        "summary": _summary(found), "collection": found, "groups": groups, "notes": report.footnotes(plain) if plain else [],
        "defended": [[label, *defended_report.cells(card)] for label, card in defended_report.rows_of(defended)],
        "defended_heads": ["model", "eps", *defended_report.HEADS, "verdict"],
        "defended_notes": defended_report.footnotes(defended) if defended else [],
        "panels": panels, "has_panels": any(one["curves"] for one in panels.values()), "open_panels": OPEN_PANELS,
        "most_panels": MOST_PANELS, "many": MANY, "tall": TALL,
        "legends": {name: _legend(one["curves"]) for name, one in panels.items()}, "marks_of_charts": charts,
        "choices": _choices(groups), "order": report.VERDICT_ORDER, "marks": MARKS, "failed": _failed(found),
        "externals": [one for one in found.labelled if one[1]["external"]], "metrics": metrics_of(found.labelled),
        "gaps": gaps(found), "cards": told,
        "turns": [one for one in told if len(one["left"]) > 1 and defended_report.told(one["card"]) is None],
        "examples": content.examples, "attention": any("attention before" in one.columns for one in content.examples),
        "examples_left_out": False, "comparison": content.comparison, "against": content.against, "beyond": BEYOND,
        "literature": literature(), "ours": _ours(groups), "radii": RADII, "version": __version__,
        "percent": percent, "printed": printed, "eps_text": eps_text, "data_words": data_words,
    }  # fmt: skip


@cache
def literature() -> dict[str, Any]:
    """Published figures with their protocols and sources, as data."""
    told: dict[str, Any] = json.loads((HERE / "literature.json").read_text(encoding="utf-8"))
    return told


def _summary(found: Collection) -> dict[str, Any]:
    every = [card for _, card in found.labelled]
    created = sorted(str(card["created"])[:10] for card in every)
    commits = Counter((str(card["commit"] or "no checkout")[:12], bool(card["dirty"])) for card in every)
    return {
        "cards": len(every), "models": len({(label, card["model"]["sha256"]) for label, card in found.labelled}),
        "data": list(dict.fromkeys(card["data"]["name"] for card in every)),
        "verdicts": Counter(card["verdict"]["status"] for card in every), "created": (created[0], created[-1]),
        "commits": [(commit, dirty, count) for (commit, dirty), count in commits.most_common()],
    }


def _panels(group: Group, models: Sequence[str]) -> dict[str, list[charts.Panel]]:
    if not group.columns:
        return {"curves": [], "clean and robust": []}
    return {"curves": charts.curves(group, models), "clean and robust": charts.clean_and_robust(group, models)}


def _legend(panels: Sequence[charts.Panel]) -> list[charts.Line]:
    """Each line of any panel once."""
    return list({line.name: line for panel in panels for line in panel.lines}.values())


def _choices(groups: Sequence[Group]) -> dict[str, list[str]]:
    """What the page's tables can be narrowed to."""
    rows = [row for group in groups for row in group.rows]
    return {name: list(dict.fromkeys(str(getattr(row, name)) for row in rows)) for name in ("data", "method", "verdict")}


def _failed(found: Collection) -> list[tuple[str, str, str, str]]:
    """Label, figure, check, and what the check says, for every check that failed."""
    told = []
    for label, card in found.labelled:
        words = (card["metrics"].get("checks") or {}).get("failed") or {}
        what = f"{data_words(card)}, {printed(card['protocol'])} {eps_text(card)}"
        told += [(label, what, check, str(words.get(check, "see docs/checks.md"))) for check in card["verdict"]["failed_checks"]]
    return told


def _card(label: str, card: Card, path: Path) -> dict[str, Any]:
    """One card as the page tells it: the figures, and how each came about."""
    threat, model, data, cost = card["threat"], card["model"], card["data"], card["cost"]
    attacks = " + ".join(_attack(attack) for attack in card["attacks"]) or "no attack"
    seen = {attack["name"]: attack["n"] for attack in card["attacks"]} if defended_report.told(card) else {}
    left = [(name, percent(share, None if share is None else cards.standard_error(share, seen.get(name, data["n"]))))
            for name, share in card["per_attack"].items()]  # fmt: skip
    where, checks = "", card["metrics"].get("checks") or {}
    if threat:
        norm = NORMS.get(threat["norm"], threat["norm"])
        where = f", {norm} {eps_text(card).split()[0]} on {threat['space']} pixels at {threat['resolution']} px"
    return {
        "id": anchor(label, card), "label": label, "card": card, "verdict": card["verdict"]["status"],
        "title": f"{data_words(card)}, {printed(card['protocol'])}{where}",
        "clean": number_of(label, card, "clean"), "robust": number_of(label, card, "robust"),
        "own": (card["robust_accuracy"], card["standard_error"]["robust"]), "attacks": attacks, "left": left,
        "file": "/".join(path.parts[-3:]), "sha": model["sha256"], "eps": eps_text(card),
        "cost": f"{cost['forwards']:,} forwards, {cost['backwards']:,} backwards, {cost['seconds']:,.0f} s on {cost['device']}",
        "versions": ", ".join(f"{name} {version}" for name, version in card["versions"].items() if version),
        "told_checks": checks.get("failed") or {}, "made": ", ".join(checks.get("made") or []),
    }  # fmt: skip


def _attack(attack: dict[str, Any]) -> str:
    targets = f", {attack['target']} targets" if attack["target"] is not None else ""
    restarts = f", {attack['restarts']} restarts" if (attack["restarts"] or 1) > 1 else ""
    return f"{attack['name']} ({attack['loss']}, {attack['steps']} steps{targets}{restarts}, {attack['n']:,} images)"


def _ours(groups: Sequence[Group]) -> list[tuple[Group, Row]]:
    """Our L-inf rows, to stand above the published figures: the means over sets where there are any, else each data set."""
    every = [(group, row) for group in groups for row in group.rows if row.robust and group.unit == GREY]
    means = [(group, row) for group, row in every if row.over]
    return (means or every)[:MOST_OURS]
