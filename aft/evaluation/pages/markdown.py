"""The report as Markdown, for a pull request or a wiki: the page's tables and words, without its pictures and commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aft.evaluation.compare import OUTCOMES, Comparison, Difference
from aft.evaluation.pages.tables import MARKS, Group, Number, Row, data_words
from aft.evaluation.report import eps_text, percent


def text_of(facts: Mapping[str, Any], picture: str | None = None) -> str:
    """The whole report.

    Args:
        facts: as the page is filled with them.
        picture: file of the curves, beside the report; none for none.
    """
    summary = facts["summary"]
    verdicts = ", ".join(f"{count} {name}" for name, count in summary["verdicts"].items())
    lines = ["# Robustness report", "", f"{summary['cards']} cards, {summary['models']} models, data: {', '.join(summary['data'])}. "
             f"Verdicts: {verdicts}. Measured {' to '.join(dict.fromkeys(summary['created']))}.", ""]  # fmt: skip
    legend = ", ".join(f"`{mark}` {name}" for name, mark in MARKS.items())
    lines += [f"Accuracy in %, ± one standard error; the sign after it is the figure's verdict: {legend}.", ""]
    for group in facts["groups"]:
        lines += [f"## {group.title[0].upper()}{group.title[1:]}", "", *_group(group), ""]
        lines += [f"- {note}" for note in group.notes]
    lines += ["", *(f"- {note}" for note in facts["notes"]), ""]
    if facts["defended"]:
        rows = [[cell.replace("\n", "; ") for cell in row] for row in facts["defended"]]
        lines += ["## Behind a defence", "", *_table(facts["defended_heads"], rows, 2), ""]
        lines += [*(f"- {note}" for note in facts["defended_notes"]), ""]
    lines += [f"![Accuracy against eps]({picture})", ""] if picture else []
    for heading, found in (("Checks that failed", _failed(facts)), ("PGD and APGD on the same images", _gaps(facts)),
                           ("Further figures", _metrics(facts)), ("Not shown", _unread(facts))):  # fmt: skip
        lines += [f"## {heading}", "", *found, ""] if found else []
    if facts["comparison"]:
        lines += [f"## Against {_plain(facts['against'])}", "", *_comparison(facts["comparison"], facts["beyond"]), ""]
    lines += ["## Published figures, which cannot be compared with the above", "", *_literature(facts["literature"])]
    return "\n".join(lines).rstrip() + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers_from: int) -> list[str]:
    rule = ["---" if place < numbers_from else "---:" for place in range(len(head))]
    return ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in (head, rule, *rows)]


def _plain(cell: object) -> str:
    return " ".join(str(cell).replace("|", "\\|").split())


def _number(number: Number) -> str:
    return f"{number.text} {number.mark}"


def _group(group: Group) -> list[str]:
    head = ["model", "method", "data", "protocol", "verdict", "n", "clean %", *(f"{eps} %" for eps in group.columns), "chance %", "top %"]
    return _table(head, (_row(row, group) for row in group.rows), 5)


def _row(row: Row, group: Group) -> list[str]:
    robust = ["<br>".join(map(_number, row.robust[eps])) if eps in row.robust else "-" for eps in group.columns]
    shares = ["-" if share is None else f"{100 * share:.1f}" for share in (row.chance, row.top)]
    verdict = " ".join([row.verdict, *row.failed])
    return [row.label, row.method, row.data, row.protocol, verdict, f"{row.n:,}", _number(row.clean), *robust, *shares]


def _failed(facts: Mapping[str, Any]) -> list[str]:
    return [f"- {_plain(label)}, {what}: {check}, {_plain(words)}" for label, what, check, words in facts["failed"]]


def _gaps(facts: Mapping[str, Any]) -> list[str]:
    rows = [[gap.label, f"{data_words(gap.pgd)}, eps {eps_text(gap.pgd)}", *(_own(card) for card in (gap.pgd, gap.apgd)),
             _difference(gap.of), f"{gap.pgd['data']['n']:,}"]
            for gap in facts["gaps"]]  # fmt: skip
    return _table(["model", "data", "PGD %", "APGD %", "PGD - APGD", "n"], rows, 2) if rows else []


def _own(card: Mapping[str, Any], kind: str = "robust") -> str:
    return f"{percent(card[f'{kind}_accuracy'], card['standard_error'][kind])} {MARKS[card['verdict']['status']]}"


def _beside(card: Mapping[str, Any], kind: str) -> str:
    return f"{_own(card, kind)}, n = {card['data']['n']:,}"


def _difference(of: Difference) -> str:
    return f"{percent(of.difference, of.error)} ({'paired' if of.paired else 'unpaired'})"


def _metrics(facts: Mapping[str, Any]) -> list[str]:
    rows = [[one.label, one.data, one.protocol, one.name, one.verdict, f"{one.n:,}", f"{one.value:.4g}",
             "none on the card" if one.error is None else f"{one.error:.2g}"] for one in facts["metrics"]]  # fmt: skip
    return _table(["model", "data", "protocol", "figure", "verdict", "n", "value", "standard error"], rows, 5) if rows else []


def _unread(facts: Mapping[str, Any]) -> list[str]:
    unread = facts["collection"].unread
    told = [f"- `{one.path.name}`: {_plain(one.why)}" for one in unread]
    return [f"{len(unread)} cards could not be shown:", "", *told] if unread else []


def _comparison(comparison: Comparison, beyond: float) -> list[str]:
    counts = ", ".join(f"{comparison.count(o)} {o}" for o in OUTCOMES)
    rows = [[one.label, one.what, one.kind, one.of.outcome, *(_beside(card, one.kind) for card in (one.old, one.new)), _difference(one.of)]
            for one in comparison.changes]  # fmt: skip
    told = [f"{counts}; in this report alone: {len(comparison.only_new)} cards, in the other alone: {len(comparison.only_old)}. "
            f"Better and worse: the difference is beyond {beyond:g} of its standard errors.", ""]  # fmt: skip
    return told + _table(["model", "what", "accuracy", "outcome", "before %", "after %", "difference"], rows, 4)


def _literature(told: Mapping[str, Any]) -> list[str]:
    lines = [told["about"], "", *(f"- **{name}.** {words}" for name, words in told["reasons"]), "", told["example"], ""]
    rows = []
    for table in told["tables"]:
        protocol = f"{table['tower']}; {table['attack']}; {table['pixels']}; {table['sets']}"
        source = f"[{table['source']}]({table['url']})"
        for one in table["figures"]:
            robust = ", ".join(f"{value:.1f} at {eps}" for eps, value in one["robust"].items())
            clean = "not read" if one["clean"] is None else f"{one['clean']:.1f}"
            rows.append([one["method"], one["trained_on"], protocol, source, clean, robust])
    return lines + _table(["method", "trained on", "tower, attack, pixels, images", "source", "clean %", "robust %"], rows, 4)
