"""What stands in ``results/bench.json``, and how it is shown: on a screen of 80 columns, and as a table of a page."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from aft.cards import write_whole
from aft.clip.matmul import products
from aft.errors import DataError
from aft.evaluation import origin
from aft.evaluation.effort import span
from bench.machine import hardware
from bench.speed.row import Effort, Found, Row, middle_half
from datamodules.zero_shot_table import table as suite

SCHEMA = "aft.bench/1"
COLUMNS = 80
#: What must be the same where rows of two starts stand in one file.
PLACE = ("machine", "versions", "threads", "device", "products")


def head(effort: Effort) -> dict[str, Any]:
    """All that is the same for every row of a start."""
    return {
        "schema": SCHEMA, "machine": hardware(), "versions": origin.versions(), "threads": torch.get_num_threads(),
        "device": effort.device, "products": products(), "quick": effort.quick,
    }  # fmt: skip


def measured(row: Row, found: Found, effort: Effort, seconds: float, load: float) -> dict[str, Any]:
    """A row of the file: each repeat, median and spread, target, and whether it is met.

    Args:
        row: what was measured.
        found: what came out.
        effort: on which device.
        seconds: that it took.
        load: of the machine before it (mean number of running processes over a minute): the rows' own work is part of it.
    """
    commit, dirty = origin.commit()
    median, (low, high), aim = statistics.median(found.values), middle_half(found.values), row.aim(effort)
    return {
        "name": row.name, "what": row.what, "unit": row.unit, "target": None if aim is None else str(aim), "median": median,
        "quartiles": [low, high], "range": [min(found.values), max(found.values)], "met": None if aim is None else aim.met(median),
        "values": found.values, "parts": found.parts, "told": found.told, "seconds": round(seconds, 1), "load": round(load, 2),
        "commit": commit, "dirty": dirty, "created": origin.now(),
    }  # fmt: skip


def missing(row: Row, why: str) -> dict[str, Any]:
    """A row that could not be measured here, in words that fit into a cell of a table."""
    return {"name": row.name, "what": row.what, "not_measured": " ".join(why.replace("|", "/").split())}


def read(path: Path) -> dict[str, Any]:
    """The file.

    Raises:
        DataError: it is another schema's.
    """
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if told.get("schema") != SCHEMA:
        raise DataError(f"{path}: schema {told.get('schema')!r} is not {SCHEMA!r}: measure again with python -m bench.speed.")
    return told


def older(path: Path, start: Mapping[str, Any], names: Iterable[str]) -> list[dict[str, Any]]:
    """Rows of an earlier start that stay beside ``names``: those of the same machine and setting (``PLACE``).

    Raises:
        DataError: the file is of another machine or setting, so that the rows do not belong into one table.
    """
    if not path.exists():
        return []
    before = read(path)
    differs = [key for key in (*PLACE, "quick") if before.get(key) != start[key]]
    if differs:
        raise DataError(
            f"{path} was measured with another {', '.join(differs)}: measure all rows, or give --out FILE for these."
        )
    return [row for row in before["rows"] if row["name"] not in set(names)]


def write(path: Path, start: Mapping[str, Any], rows: list[dict[str, Any]], order: Iterable[str]) -> None:
    """Whole or not at all, rows in their order."""
    places = {name: place for place, name in enumerate(order)}
    kept = sorted(rows, key=lambda row: places.get(row["name"], len(places)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps({**start, "rows": kept}, indent=1) + "\n").encode())


def number(value: float, unit: str) -> str:
    """A figure as tables show it.

    Example:
        >>> number(1.0312, "x"), number(3e-13, "x"), number(8.04, "s"), number(3.0, "calls")
        ('1.031', '3.0e-13', '8.0 s', '3')
    """
    if unit == "s":
        return f"{value:.1f} s"
    if unit == "calls":
        return f"{value:.4g}"
    return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.3f}"


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row's cells: what, reach, median, middle half, repeats, met."""
    if "not_measured" in row:
        return [row["what"], "", f"not measured: {row['not_measured']}", "", "", ""]
    low, high = (number(value, row["unit"]) for value in row["quartiles"])
    one = len(row["values"]) < 2
    met = {None: "", True: "yes", False: "NO"}[row["met"]]
    return [row["what"], row["target"] or "", number(row["median"], row["unit"]), "" if one else f"{low} to {high}",
            str(len(row["values"])), met]  # fmt: skip


def start_in_words(rows: Iterable[Mapping[str, Any]]) -> str:
    """What a start is spent on, medians of its stretches, and the dearest packages; nothing where it was not measured."""
    found = next((row for row in rows if row["name"] == "start_up" and row.get("parts")), None)
    if found is None:
        return ""
    stretches = ", ".join(f"{name} {statistics.median(seconds):.1f} s" for name, seconds in found["parts"].items())
    packages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in list(found["told"]["imports"].items())[:5])
    return f"A start, by its stretches: {stretches}. Own time of the dearest packages: {packages}."


def saving_in_words(rows: Iterable[Mapping[str, Any]]) -> str:
    """What ours spends of AutoAttack's own forwards, share by share; nothing where it was not measured."""
    found = next((row for row in rows if row["name"] == "robust_share" and row.get("told")), None)
    if found is None:
        return ""
    shares = ", ".join(f"{ratio:.2f} at {float(share):.0%}" for share, ratio in found["told"]["by_robust_share"].items())
    return f"Forwards of all four attacks, ours over AutoAttack's own, by the robust share: {shares}."


def shares_in_words(rows: Iterable[Mapping[str, Any]]) -> str:
    """What an evaluation costs by the share of images that nothing breaks, as Markdown; nothing where it was not measured.

    The last column is the whole zero-shot suite at that pace, all images of its sets, were each as small as those that were measured.
    """
    found = next((row for row in rows if row["name"] == "along_shares" and row.get("told")), None)
    if found is None:
        return ""
    told, images = found["told"], sum(record.images for record in suite().values())
    most = next(one["seconds"] for one in told["curve"] if one["robust_share"] == 1)
    lines = []
    for one in sorted(told["curve"], key=lambda one: float(one["robust_share"])):
        shares = [seconds / whole for seconds, whole in zip(one["seconds"], most, strict=True)]
        lines.append(f"| {one['robust_share']:.0%} | {one['forwards']:.1f} | {statistics.median(shares):.2f} ({min(shares):.2f} to "
                     f"{max(shares):.2f}) | {span(statistics.median(one['seconds']) * images)} |")  # fmt: skip
    return "\n".join([
        f"An evaluation of MiniCLIP-32 by the share of its images that are robust, of those that are right when clean ({told['attacks']}; "
        f"{told['steps']} steps, {told['targets']} targets; {told['images']} images, whose share the radius sets; any other costs one "
        "forward). Time over that of robust images alone: median and range of rounds. The suite: at that pace, were all of its images as "
        "small, and right when clean.", "",
        f"| robust share | forwards an image | time | zero-shot suite, {images:,} images |", "|---|---|---|---|", *lines,
    ])  # fmt: skip


HEADS = ("what", "reach", "median", "middle half", "n", "met")


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """One table on the screen."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name, settings in zip(HEADS, ({"ratio": 1}, {"min_width": 7}, {"justify": "right"}, {}, {"justify": "right"}, {}), strict=True):
        table.add_column(name, **settings)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*cells(row))
    Console(width=COLUMNS).print(table)
    for said in filter(None, (start_in_words(rows), saving_in_words(rows))):
        Console(width=COLUMNS).print(said)


def page(told: Mapping[str, Any]) -> str:
    """The same as Markdown, with the machine above it."""
    place = told["machine"]
    lines = [
        f"{place['processor']}, {place['cores']} cores, {told['threads']} threads; {place['accelerator'] or 'no GPU'}; fp32 products by "
        f"{told['products']}; torch {told['versions']['torch']}, Python {told['versions']['python']}."
        + (" A quick run, too short for figures." if told["quick"] else ""),
        "",
        f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS),
        *(f"| {' | '.join(cells(row))} |" for row in told["rows"]),
    ]  # fmt: skip
    said = filter(None, (words(told["rows"]) for words in (start_in_words, saving_in_words, shares_in_words)))
    return "\n\n".join(["\n".join(lines), *said])
