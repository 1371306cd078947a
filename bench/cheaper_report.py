"""The table of cheaper adversarial training, from the rows that ``bench.cheaper_training`` left."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aft.cards import standard_error
from bench.step_cost import parts_of, summed

ROWS, TIMES = "rows.json", "times.json"
BASELINE = "tecoa_seed"
Mark = Mapping[str, float]
COLUMNS = ("row", "what differs", "time", "forwards", "images", "robust at equal time", "clean there", "time of a step", "warned of")
HEAD = (
    "# Cheaper adversarial training, and its price",
    "",
    "Written by `python -m bench.cheaper_training` (recipe: `bench/cheaper_training.yaml`); `rows.json` has every evaluation, `times.json`",
    "the time of each kind of step. What the options are and what they risk: [docs/cheaper_training.md](../../docs/cheaper_training.md).",
    "",
)
#: A list a round, in it the time of each kind of a row's steps over a step of the baseline.
Rounds = Sequence[Sequence[float]]
THE_UNIT: Rounds = ((1.0,),)


@dataclass(frozen=True)
class Yardstick:
    """What the baseline has after its last step, and when it first had as much: means over its seeds.

    Args:
        robust, spread: accuracy at the end, and its standard deviation.
        cost, images, steps: at the end.
        crossing: share of its images at the first evaluation at or above ``robust``; a seed that never gets there counts whole.
        seeds: how many.
    """

    robust: float
    spread: float
    cost: float
    images: float
    steps: float
    crossing: float
    seeds: int

    @classmethod
    def of(cls, rows: Mapping[str, Any]) -> Yardstick | None:
        """From the rows; none where the baseline is not measured yet."""
        curves = [row["marks"] for name, row in rows.items() if name.startswith(BASELINE)]
        if not curves:
            return None
        ends = [marks[-1] for marks in curves]
        mean = {key: statistics.fmean(end[key] for end in ends) for key in ("robust_accuracy", "cost", "images", "step")}
        robust = [end["robust_accuracy"] for end in ends]
        spread = statistics.stdev(robust) if len(ends) > 1 else 0.0
        firsts = [reached(marks, mean["robust_accuracy"], float("inf"), by="images") or marks[-1] for marks in curves]
        crossing = statistics.fmean(first["images"] / end["images"] for first, end in zip(firsts, ends, strict=True))
        return cls(mean["robust_accuracy"], spread, mean["cost"], mean["images"], mean["step"], crossing, len(ends))


def kept(results: Path) -> dict[str, Any]:
    """The rows that are there, by name."""
    rows: dict[str, Any] = json.loads(path.read_text()) if (path := results / ROWS).exists() else {}
    return rows


def times_of(recipe: Mapping[str, Any], results: Path) -> dict[str, Rounds] | None:
    """Of each row; none where not every row is timed."""
    path = results / TIMES
    times: dict[str, Rounds] = json.loads(path.read_text())["ratios"] if path.exists() else {}
    return times if times.keys() >= recipe["rows"].keys() else None


def typical(rounds: Rounds) -> list[float]:
    """Time of each kind of steps: medians of the rounds."""
    return [statistics.median(one) for one in zip(*rounds, strict=True)]


def taken(row: Mapping[str, Any], of_a_step: Sequence[float], steps: float) -> float:
    """By the first ``steps`` steps of a row, in steps of the baseline."""
    ends = parts_of(row["model"], attack_steps=0, own_side=1)  # when each kind ends is all that is asked
    return summed(of_a_step, ends, steps, row["plan"])


def dated(row: Mapping[str, Any], rounds: Rounds, yard: Yardstick) -> list[Mark]:
    """The marks of a row with their ``time``, in times of the whole baseline."""
    return [{**mark, "time": taken(row, typical(rounds), mark["step"]) / yard.steps} for mark in row["marks"]]


def reached(marks: Sequence[Mark], target: float, most: float, by: str = "time") -> Mark | None:
    """The first mark at or above the target, within what a row may spend."""
    return next((mark for mark in marks if mark["robust_accuracy"] >= target and mark[by] <= most), None)


def at_equal_time(marks: Sequence[Mark]) -> Mark | None:
    """The last mark that does not take longer than the baseline."""
    return next((mark for mark in reversed(marks) if mark["time"] <= 1 + 1e-9), None)


def line(name: str, says: str, row: Mapping[str, Any], rounds: Rounds, yard: Yardstick, most: float, n: int) -> str:
    """A row of the table."""
    marks, steps = dated(row, rounds, yard), row["marks"][-1]["step"]
    equal, mark = at_equal_time(marks), reached(marks, yard.robust, most)
    accuracies = ["", ""] if equal is None else [shown(equal[key], n) for key in ("robust_accuracy", "clean_accuracy")]
    took = ["not reached", "", ""] if mark is None else [
        f"{share:.2f}" for share in (mark["time"], mark["cost"] / yard.cost, mark["images"] / yard.images)
    ]
    ends = [taken(row, one, steps) / steps for one in (typical(rounds), *rounds)]
    of_a_step = f"{ends[0]:.2f}" + (f" ({min(ends[1:]):.2f} to {max(ends[1:]):.2f})" if len(rounds) > 1 else "")
    return f"| {' | '.join([name, says, *took, *accuracies, of_a_step, '; '.join(row['warned']) or '-'])} |"


def place(marks: Sequence[Mark], yard: Yardstick, most: float) -> tuple[bool, float]:
    """What rows are sorted by: time to the target; where it is not reached, accuracy at equal time."""
    mark = reached(marks, yard.robust, most)
    return (False, mark["time"]) if mark else (True, -(at_equal_time(marks) or marks[-1])["robust_accuracy"])


def shown(share: float, n: int) -> str:
    """In % with one standard error over images."""
    return f"{100 * share:.1f} ± {100 * standard_error(share, n):.1f}"


def page(recipe: Mapping[str, Any], results: Path) -> str:
    """All of ``results/cheaper_training/README.md``."""
    rows, n, most = kept(results), recipe["shared"]["data"]["init_args"]["holdout"], recipe["most"]
    yard, times = Yardstick.of(rows), times_of(recipe, results)
    lines = [*HEAD]
    if yard is None:
        return "\n".join([*lines, "The baseline is not measured yet.", ""])
    steps, batch = recipe["baseline"]["steps"], recipe["shared"]["data"]["init_args"]["batch_size"]
    lines += [
        f"Baseline: TeCoA with two attack steps from MiniCLIP-32, {steps} steps of {batch}; one constant rate,",
        f"{recipe['rate']:g}, for all rows. It ends at {100 * yard.robust:.1f} % robust accuracy (mean of {yard.seeds} seeds, standard",
        f"deviation {100 * yard.spread:.1f} points): PGD-10, L-inf 2/255, {n} held-out training images of Tiny-ImageNet, a figure",
        f"to compare these rows by and no verdict on a model. It took {yard.cost:.3g} forwards.",
        "",
        f"To that accuracy, by the first evaluation (each {recipe['every']} steps) at or above it, as shares of what the baseline's",
        f"{steps} steps took. `time` ranks the rows: steps of each kind times what such a step takes, over a step of the baseline,",
        "measured in short runs in turn (median of rounds). `forwards` are counted where they happen, of one image through the whole",
        f"tower; `images` with repetitions. `not reached`: not in {most:g} times the baseline's time. Accuracies in % ± one standard error",
        f"over images, by the last evaluation within the baseline's time (so up to {recipe['every']} steps before its end);",
        "`time of a step`: mean, over the baseline's, and its range over rounds. Differences below twice the seeds' standard deviation",
        "say nothing, and the first crossing of a noisy curve comes early for every row: hold each against the baseline's own, which come",
        f"at {yard.crossing:.2f} of its time on average.",
        "",
    ]
    if times is None:
        return "\n".join([*lines, "Steps are not timed yet (`--time`, on a quiet machine), so no row is trained.", ""])
    lines += [
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    told = {name: row["says"] for name, row in recipe["rows"].items()}
    rounds = {name: times.get(name, THE_UNIT) for name in rows}
    for name in sorted(rows, key=lambda name: place(dated(rows[name], rounds[name], yard), yard, most)):
        lines.append(line(name, told.get(name, "the baseline"), rows[name], rounds[name], yard, most, n))
    return "\n".join([*lines, ""])
