"""``python -m bench.speed``: measures every row, shows the table, writes it to ``results/bench.json`` and ``docs/performance.md``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from aft.errors import ConfigError, ending_calmly, unknown_name
from bench.page import fill
from bench.speed import record
from bench.speed.row import Effort, NotHere, Row
from bench.speed.rows import ROWS
from bench.speed.setting import ROOT

OUT = ROOT / "results" / "bench.json"
PAGE = ROOT / "docs" / "performance.md"


def settings_of(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__)
    parser.add_argument("--only", action="append", metavar="ROW", help="measure this row; may be given again. Others in the file stay.")
    parser.add_argument("--quick", action="store_true", help="a few repeats: does every row run? Needs --out, since these are no figures.")
    parser.add_argument("--out", type=Path, default=None, help=f"file to write (default: {OUT.relative_to(ROOT)})")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch (default: its own choice)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto takes a GPU where there is one")
    parser.add_argument("--list", action="store_true", help="print the rows' names and end")
    parser.add_argument("--page", action="store_true", help="measure nothing: write the file's table into docs/performance.md")
    return parser.parse_args(words)


def chosen(only: Sequence[str] | None) -> list[Row]:
    """The rows asked for.

    Raises:
        ConfigError: there is no such row; near matches are listed.
    """
    by_name = {row.name: row for row in ROWS}
    for name in only or ():
        if name not in by_name:
            raise ConfigError(unknown_name("row", name, by_name))
    return list(ROWS) if not only else [row for row in ROWS if row.name in set(only)]


def measure(row: Row, effort: Effort) -> dict[str, Any]:
    """One row of the file; one that fails is told as one that is missing, and ends nothing else."""
    load, began = os.getloadavg()[0], time.perf_counter()
    try:
        found = row.measure(effort)
    except NotHere as error:
        return record.missing(row, str(error))
    except Exception as error:
        traceback.print_exc()
        return {**record.missing(row, in_a_line(error)), "failed": True}
    return record.measured(row, found, effort, time.perf_counter() - began, load)


def in_a_line(error: Exception) -> str:
    """Its kind and the first line of its words: the rest may name places of this machine."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def write_page(out: Path) -> None:
    """The table of a file into the page."""
    fill(PAGE, "bench.speed", record.page(record.read(out)))


def quiet() -> None:
    """Lightning's tips say nothing here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")


def main(words: Sequence[str] | None = None) -> int:
    """Measures, shows, writes file and page after every row; 1 where a row failed.

    Raises:
        ConfigError: an unknown row, or ``--quick`` over the kept figures.
    """
    asked = settings_of(words)
    rows, out = chosen(asked.only), asked.out or OUT
    if asked.list:
        print(*(f"{row.name:15} {row.what}" for row in rows), sep="\n")
        return 0
    if asked.page:
        write_page(out)
        return 0
    if asked.quick and asked.out is None:
        raise ConfigError(f"--quick measures too little for {OUT.relative_to(ROOT)}: give --out FILE.")
    quiet()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if asked.device == "auto" else asked.device
    effort = Effort(asked.quick, device)
    start = record.head(effort)
    kept = record.older(out, start, [row.name for row in rows]) if asked.only else []
    done: list[dict[str, Any]] = []
    for row in rows:
        print(f"{row.name} ...", end=" ", flush=True)
        done.append(measure(row, effort))
        print(" ".join(cell for cell in record.cells(done[-1])[2:] if cell), flush=True)
        record.write(out, start, [*kept, *done], [each.name for each in ROWS])
        if out == OUT:
            write_page(out)
    print()
    record.show(done)
    print(f"written: {out}")
    failed = [row["name"] for row in done if row.get("failed")]
    if failed:
        print(f"failed: {', '.join(failed)}; what they said is above", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    with ending_calmly():
        sys.exit(main())
