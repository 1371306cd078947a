"""Measures a defended model in two rounds, each part by part: A on all images, then B to E on what A left.

The second round begins when all rows of the first are there; what it needs to know beforehand (the pilot) is found by whichever process
comes first, and is the same for all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aft import cards
from aft.cards import Card, Verdicts
from aft.errors import ConfigError
from aft.evaluation import runner
from aft.evaluation.defended import COLUMNS, DefendedJudge, Pilot
from aft.evaluation.defended_card import CHECKS, summarise
from aft.evaluation.judge import Cell, Cost, scoring
from aft.evaluation.place import Place
from aft.evaluation.runner import Parts, card_path, finished
from aft.evaluation.sanity import MADE, sane
from aft.evaluation.verdict import FEWEST_IMAGES

#: Folder beside parts and cards of A's points, which all defences of a model share; it can be deleted, and costs their time again.
KEPT = "transfer"
Log = Callable[[str], None]
Measured = Callable[[list[int]], Verdicts]


def evaluate(
    cell: Cell, out: Path, label: str = "model", *, batch_size: int = 100, place: Place | None = None, command: str | None = None,
    log: Log = lambda _: None, **more: Any,
) -> Card | None:  # fmt: skip
    """Measures a cell, or what is left of it, and writes its card: in two rounds where its protocol is for defences.

    Args:
        cell, out, label, batch_size, place, command, log: see :func:`aft.evaluation.runner.evaluate`.
        more: its further arguments; a protocol for defences has checks of its own (:mod:`aft.evaluation.sanity`).

    Returns:
        The card; none while other processes still work on a round. Run the same command again then.

    Raises:
        ConfigError: images shall be kept of a protocol for defences.
    """
    if cell.protocol.plan is None:
        return runner.evaluate(cell, out, label, batch_size=batch_size, place=place, command=command, log=log, **more)
    if more.get("keep_images"):
        raise ConfigError(f"{cell.protocol.name} tries several points an image and keeps none: leave out keep_images.")
    path = card_path(out, label, cell)
    folder = out / "parts" / f"{path.parent.name}-{cell.id}"
    card = finished(path, cell) or _measured(cell, path, folder, out / KEPT, batch_size, place or Place(), command, log)
    checks = int(more.get("checks", 0))
    if card is not None and card["metrics"]["checks"]["images"] < checks and card["metrics"]["defended"]["pilot"]["ways"]:
        verdicts = cards.read_arrays(path.with_suffix(".npz"))
        right = min(checks, int(verdicts["clean"].sum()))
        if right >= FEWEST_IMAGES and card["metrics"]["checks"]["images"] < right:
            card = doubted(cell, card, verdicts, right)
            cards.write(path, card)
    return card


def doubted(cell: Cell, card: Card, verdicts: Verdicts, images: int) -> Card:
    """The card after the dear checks on the first ``images`` that are right when clean (so many there are); ``reliable`` where all hold."""
    rows = [int(row) for row in verdicts["row"][verdicts["clean"]]][:images]
    with scoring(cell.model):
        judge = DefendedJudge(cell)
        found = sane(judge, rows, verdicts, Pilot.of(card["metrics"]["defended"]["pilot"]))
    before = {name: text for name, text in card["metrics"]["checks"]["failed"].items() if name not in found}
    failed = {**before, **found}
    checks = {"images": images, "made": [*dict.fromkeys([*CHECKS, *MADE])], "failed": failed}
    verdict = {"status": "suspect" if failed else "reliable", "failed_checks": list(failed)}
    return {**card, "verdict": verdict, "metrics": {**card["metrics"], "checks": checks}}


def _measured(
    cell: Cell, path: Path, folder: Path, kept: Path, batch_size: int, place: Place, command: str | None, log: Log
) -> Card | None:
    """Both rounds, then the card."""
    with scoring(cell.model):
        judge = DefendedJudge(cell, kept)
        first = _round(judge, judge.first, range(len(cell.data)), Parts(folder / "first"), batch_size, place, log)
        if first is None:
            return None
        left = left_by_transfer(first, judge.plan.left)
        informed = [move for move in judge.moves if move.way != "transfer"]
        pilot, swept, second = Pilot({}), Verdicts(), None
        if informed and first["selection"][:, 0].any():
            pilot, swept = _pilot(judge, first, left, folder)
        if informed and left:
            place_of = {row: place_among for place_among, row in enumerate(left)}
            second = _round(
                judge, lambda rows: judge.second(rows, place_of, pilot, swept), left, Parts(folder / "second"), batch_size, place, log
            )
            if second is None:
                return None
    costs = np.zeros(3)
    for table in (first, second):
        if table is not None:
            costs += table.pop("cost")
    verdicts = joined(first, second, len(informed))
    card = summarise(cell, verdicts, left, pilot, costs, command)
    cards.write(path, card, verdicts)
    for name in ("first", "second"):
        Parts(folder / name).remove()
    for name in ("pilot.json", "swept.npz"):
        (folder / name).unlink(missing_ok=True)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
    return card


def left_by_transfer(first: Verdicts, most: int | None) -> list[int]:
    """The first ``most`` rows that no candidate of the first round breaks for all selection draws."""
    rows = first["row"][first["selection"].min(1) > 0]
    return [int(row) for row in rows[:most]]


def joined(first: Verdicts, second: Verdicts | None, informed: int) -> Verdicts:
    """One row an image of the cell, one column a candidate: clean, A, then the attacks of the second round (NaN where there was none)."""
    n = len(first["row"])
    where = {} if second is None else {int(row): place for place, row in enumerate(second["row"])}
    table = {name: first[name] for name in ("row", "index", "base")}
    for name in COLUMNS:
        column = first[name]
        empty: object = True if column.dtype == bool else -1 if column.dtype.kind == "i" else np.nan
        more: NDArray[np.generic] = np.full((n, informed), empty, column.dtype)
        for place, row in enumerate(first["row"]):
            if second is not None and int(row) in where:
                more[place] = second[name][where[int(row)]]
        table[name] = np.concatenate([column, more], axis=1)
    return table


def _round(
    judge: DefendedJudge, measured: Measured, rows: Sequence[int], parts: Parts, batch_size: int, place: Place, log: Log
) -> Verdicts | None:
    """This process's share of one round; the whole round with its summed ``cost`` where all of it is there, else none."""
    todo = parts.missing(rows[place.rank :: place.world])
    for start in range(0, len(todo), batch_size):
        begin = time.perf_counter()
        with Cost(judge.model.visual) as cost:
            verdicts = measured(todo[start : start + batch_size])
        parts.write(verdicts, (cost.forwards, cost.backwards, time.perf_counter() - begin))
        log(f"{min(start + batch_size, len(todo))} of {len(todo)} images of the {parts.folder.name} round")
    done = parts.read()
    if {int(row) for part in done for row in part["row"]} != {int(row) for row in rows}:
        return None
    total = np.sum([part.pop("cost") for part in done], axis=0)
    return {**cards.join(done), "cost": total}


def _pilot(judge: DefendedJudge, first: Verdicts, left: list[int], folder: Path) -> tuple[Pilot, Verdicts]:
    """The pilot from its files, or found and written."""
    told, table = folder / "pilot.json", folder / "swept.npz"
    if not (told.exists() and table.exists()):
        right = [int(row) for row in first["row"][first["selection"][:, 0] > 0]]
        pilot, swept = judge.pilot(right[: judge.plan.pilot], left)
        cards.write_arrays(table, swept)
        cards.write_whole(told, json.dumps(pilot.describe()).encode())
    return Pilot.of(json.loads(told.read_text())), cards.read_arrays(table)
