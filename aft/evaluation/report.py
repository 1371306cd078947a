"""Cards as a table on screen, as CSV and as a picture. No figure stands without its n, standard error and verdict."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from aft import cards
from aft.attacks.threat_model import radius_text
from aft.cards import Card, attack_success
from aft.evaluation import defended_report
from aft.evaluation.collect import Labelled as Labelled
from aft.evaluation.collect import collect
from aft.evaluation.published import printed

CSV_COLUMNS = (
    "label", "model", "method", "text_transform", "sha256", "data", "split", "label_space", "classes", "n", "protocol", "fidelity", "norm",
    "eps", "space", "resolution", "attacks", "steps", "targets", "precision", "clean_accuracy", "clean_standard_error", "robust_accuracy",
    "robust_standard_error", "attack_success_drop", "attack_success_of_right", "calibration_error_clean", "calibration_error_attacked",
    "mean_corruption_accuracy", "mean_corruption_standard_error",
    "chance", "largest_class_share", "verdict", "failed_checks", "external", "cell", "created",
    *defended_report.CSV_COLUMNS,
)  # fmt: skip
#: Protocols that fit beside each other in a terminal of 80 columns.
MOST_COLUMNS = 3
VERDICT_ORDER = ("suspect", "unchecked", "reliable")


def load(folders: Iterable[Path]) -> list[Labelled]:
    """All cards below some folders that can be shown, as :func:`aft.evaluation.collect.collect` finds them.

    Raises:
        DataError: a folder is not there, there are no cards, or two say different things of one cell.
    """
    return collect(list(folders)).labelled


def eps_text(card: Card) -> str:
    """The radius as it is written in configurations (``2/255``), with the norm where it is not L-inf; a dash without attacks."""
    return "-" if card["threat"] is None else radius_text(card["threat"]["norm"], card["threat"]["eps"])


def percent(share: float | None, error: float | None) -> str:
    """A share and its standard error in per cent; a dash for none.

    Example:
        >>> percent(0.5, 0.05)
        '50.0 ±5.0'
    """
    return "-" if share is None or error is None else f"{100 * share:.1f} ±{100 * error:.1f}"


def data_text(card: Card) -> str:
    """Data set and label space, and the split where it is not the test set."""
    data = card["data"]
    return " ".join([data["name"] if data["split"] == "test" else f"{data['name']}/{data['split']}", data["label_space"]])


def _row_key(labelled: Labelled) -> tuple[Any, ...]:
    """What one row of the table shares: all but the protocol."""
    label, card = labelled
    model, data = card["model"], card["data"]
    return label, model["sha256"], data_text(card), data["n"], data["index_sha256"], str(card["threat"])


def rows_of(labelled: Sequence[Labelled]) -> list[list[Labelled]]:
    """The cards of each row, in the order in which the rows first appear."""
    rows: dict[tuple[Any, ...], list[Labelled]] = {}
    for one in labelled:
        rows.setdefault(_row_key(one), []).append(one)
    return list(rows.values())


def table(labelled: Sequence[Labelled]) -> Table:
    """One row for each model, data set, label space and radius; one column of robust accuracy for each protocol, or, for the protocol
    ``corruptions``, of mean corruption accuracy. More protocols than fit beside each other have rows of their own.

    There is a column of n where rows differ in it; else it stands beneath.
    """
    protocols = list(dict.fromkeys(printed(card["protocol"]) for _, card in labelled if card["protocol"]["name"] != "clean"))
    down = len(protocols) > MOST_COLUMNS
    columns = ["robust"] if down else protocols
    sheet = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for name in ("model", "data", *(["protocol"] if down else [])):
        sheet.add_column(name, overflow="fold")
    for name in ("eps", *_n_column(labelled), "clean %", *(f"{name} %" for name in columns), "top"):
        sheet.add_column(name, justify="right", no_wrap=True)
    sheet.add_column("verdict", no_wrap=True)
    for row in [[one] for one in labelled] if down else rows_of(labelled):
        sheet.add_row(*_table_cells(row, None if down else protocols, bool(_n_column(labelled))))
    return sheet


def _n_column(labelled: Sequence[Labelled]) -> list[str]:
    return ["n"] if len({card["data"]["n"] for _, card in labelled}) > 1 else []


def _table_cells(row: list[Labelled], protocols: Sequence[str] | None, with_n: bool) -> list[str]:
    """Of a row with a column for each protocol; without any, of a row that is one protocol's."""
    label, card = row[0]
    robust = {printed(one["protocol"]): _robust_text(one) for _, one in row}
    clean = percent(card["clean_accuracy"], card["standard_error"]["clean"])
    share = f"{100 * max(one['largest_class_share'] for _, one in row):.0f}"
    failed = sorted({check for _, one in row for check in one["verdict"]["failed_checks"]})
    verdict = min((one["verdict"]["status"] for _, one in row), key=VERDICT_ORDER.index)
    verdict += f"\n{' '.join(failed)}" if failed else ""
    own = printed(card["protocol"])
    robusts = [robust.get(name, "-") for name in ([own] if protocols is None else protocols)]
    n = [str(card["data"]["n"])] if with_n else []
    return [label, data_text(card), *([own] if protocols is None else []), eps_text(card), *n, clean, *robusts, share, verdict]


def _robust_text(card: Card) -> str:
    """With an asterisk where an attack from outside lowered it; of a card of corruptions the mean accuracy on them."""
    if (told := card["metrics"].get("corruptions")) is not None:
        return percent(told["mean_accuracy"], told["mean_accuracy_standard_error"])
    return percent(card["robust_accuracy"], card["standard_error"]["robust"]) + ("*" if card["external"] else "")


def footnotes(labelled: Sequence[Labelled]) -> list[str]:
    """What must be known of a table's figures: attacks with their steps and targets, radius, precision, chance."""
    n = "" if _n_column(labelled) else f"n = {labelled[0][1]['data']['n']:,} images in each row. "
    notes = [f"{n}Robust: right on the clean image and under every attack of the protocol. ± is one standard error, sqrt(p(1-p)/n)."]
    attacks: dict[str, list[str]] = {}
    for _, card in labelled:
        if card["attacks"]:
            line = f"{printed(card['protocol'])}: {' + '.join(map(_attack_text, card['attacks']))}"
            attacks.setdefault(line, []).append(card["data"]["label_space"])
    for line, spaces in attacks.items():
        notes.append(f"{line} ({', '.join(dict.fromkeys(spaces))}).")
    places = {(c["threat"]["space"], c["threat"]["resolution"], c["threat"]["norm"]) for _, c in labelled if c["threat"] is not None}
    for space, side, norm in sorted(places):
        notes.append(f"eps: {norm} in units of the pixel range, on {space} pixels at {side} px.")
    for source in dict.fromkeys(card["external"]["source"] for _, card in labelled if card["external"]):
        notes.append(f"* lowered by an attack from outside: {source}")
    if any("spared" in card["metrics"] for _, card in labelled):
        notes.append("Largest radius first: images that it did not break count as robust at the smaller ones and were not attacked again.")
    if any(card["robust_accuracy"] is not None for _, card in labelled):
        notes.append("table.csv has attack success by both definitions (drop: clean minus robust accuracy; of right: wrong after the "
                     "attack among those right before) and calibration errors.")
    notes += [line for label, card in labelled for line in _more(label, card)]
    chances = {data_text(card): card["chance"] for _, card in labelled}
    notes.append(f"Chance: {', '.join(f'{name} {100 * chance:.1f} %' for name, chance in chances.items())}. "
                 "Top: share of the class predicted most often, clean or attacked, in %.")
    return notes


def _more(label: str, card: Card) -> list[str]:
    """Lines on what stands in no column: recall at each k, and what corruptions were looked at."""
    lines = []
    if (recall := card["metrics"].get("recall")) is not None:
        for way, name in (("image_to_text", "image to text"), ("text_to_image", "text to image")):
            told, states = recall[way], ["clean"] if card["threat"] is None else ["clean", "attacked"]
            figures = [f"at {k.removeprefix('recall_at_')} " + ", ".join(
                f"{state} {percent(one[state], one[f'{state}_standard_error'])}" for state in states)
                for k, one in told.items() if k.startswith("recall_at_")]  # fmt: skip
            where = f"{label}, {data_text(card)}, {printed(card['protocol'])} {eps_text(card)}"
            lines.append(f"Recall, {name}, % ({where}; n = {told['n']:,}): {'; '.join(figures)}.")
    if (told := card["metrics"].get("corruptions")) is not None:
        worst = min(told["per_kind"], key=lambda kind: told["per_kind"][kind]["mean_accuracy"])
        lines.append(f"corruptions ({label}, {data_text(card)}): mean accuracy over {len(told['kinds'])} kinds at severities "
                     f"{', '.join(map(str, told['severities']))} of {told['table']}'s table; lowest for {worst}, "
                     f"{100 * told['per_kind'][worst]['mean_accuracy']:.1f} %.")
    return lines


def _attack_text(attack: dict[str, Any]) -> str:
    targets = f", {attack['target']} targets" if attack["target"] is not None else ""
    return f"{attack['name']} ({attack['steps']} steps{targets})"


def show(labelled: Sequence[Labelled], stream: TextIO | None = None, width: int | None = None) -> None:
    """Prints the table and its notes, then those of defended models; plain text where the stream is no terminal."""
    console = Console(file=stream, width=width, highlight=False, markup=False)
    plain, defended = defended_report.split(labelled)
    for cards_of, of_cards, notes_of in ((plain, table, footnotes), (defended, defended_report.table, defended_report.footnotes)):
        if cards_of:
            console.print(of_cards(cards_of))
            for note in notes_of(cards_of):
                console.print(note, style="dim")


def write_csv(labelled: Sequence[Labelled], path: Path) -> Path:
    """Writes one line a card, shares in [0, 1], unrounded."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for label, card in labelled:
        writer.writerow(_csv_row(label, card))
    cards.write_whole(path, buffer.getvalue().encode())
    return path


def _csv_row(label: str, card: Card) -> dict[str, Any]:
    model, data, attacks, threat = card["model"], card["data"], card["attacks"], card["threat"] or {}
    success = attack_success(card["clean_accuracy"], card["robust_accuracy"], data["n"]).get("attack_success", {})
    calibrated, corrupted = card["metrics"].get("calibration", {}), card["metrics"].get("corruptions", {})
    columns = {
        "label": label, "model": model["name"], "method": model["method"], "text_transform": model["text_transform"],
        "sha256": model["sha256"], "data": data["name"],
        "protocol": card["protocol"]["name"], "fidelity": card["protocol"]["fidelity"],
        "attacks": "+".join(attack["name"] for attack in attacks), "steps": "+".join(str(attack["steps"]) for attack in attacks),
        "targets": "+".join(str(attack["target"] or "") for attack in attacks), "verdict": card["verdict"]["status"],
        "failed_checks": "+".join(card["verdict"]["failed_checks"]), "external": (card["external"] or {}).get("source"),
        "attack_success_drop": success.get("drop"), "attack_success_of_right": success.get("of_right"),
        "calibration_error_clean": calibrated.get("clean"), "calibration_error_attacked": calibrated.get("attacked"),
        "mean_corruption_accuracy": corrupted.get("mean_accuracy"),
        "mean_corruption_standard_error": corrupted.get("mean_accuracy_standard_error"),
        "clean_standard_error": card["standard_error"]["clean"], "robust_standard_error": card["standard_error"]["robust"],
        **defended_report.csv_row(card),
    }  # fmt: skip
    same = {name: {**card, **data, **threat}.get(name) for name in CSV_COLUMNS if name not in columns}
    return {**same, **columns}
