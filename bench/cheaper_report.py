"""The table of cheaper adversarial training, from the rows that ``bench.cheaper_training`` left."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aft.cards import standard_error

ROWS = "rows.json"
BASELINE = "tecoa_seed"
Mark = Mapping[str, float]
COLUMNS = ("row", "what differs", "forwards", "time", "CPU", "images", "robust at equal forwards", "clean there", "forwards an image",
           "warned of")  # fmt: skip
HEAD = (
    "# Cheaper adversarial training, and its price",
    "",
    "Written by `python -m bench.cheaper_training` (recipe: `bench/cheaper_training.yaml`); `rows.json` has every evaluation.",
    "What the options are and what they risk: [docs/cheaper_training.md](../../docs/cheaper_training.md).",
    "",
)


@dataclass(frozen=True)
class Yardstick:
    """What the baseline has after its last step: means over its seeds."""

    robust: float
    spread: float
    cost: float
    seconds: float
    cpu_seconds: float
    images: float
    seeds: int

    @classmethod
    def of(cls, rows: Mapping[str, Any]) -> Yardstick | None:
        """From the rows; none where the baseline is not measured yet."""
        ends = [row["marks"][-1] for name, row in rows.items() if name.startswith(BASELINE)]
        if not ends:
            return None
        mean = {key: statistics.fmean(end[key] for end in ends) for key in ends[0]}
        robust = [end["robust_accuracy"] for end in ends]
        return cls(mean["robust_accuracy"], statistics.stdev(robust) if len(ends) > 1 else 0.0, mean["cost"], mean["seconds"],
                   mean["cpu_seconds"], mean["images"], len(ends))  # fmt: skip


def kept(results: Path) -> dict[str, Any]:
    """The rows that are there, by name."""
    rows: dict[str, Any] = json.loads(path.read_text()) if (path := results / ROWS).exists() else {}
    return rows


def reached(marks: Sequence[Mark], target: float, most: float) -> Mark | None:
    """The first mark at or above the target, within what a row may spend."""
    return next((mark for mark in marks if mark["robust_accuracy"] >= target and mark["cost"] <= most), None)


def at_equal_cost(marks: Sequence[Mark], cost: float) -> Mark | None:
    """The last mark that does not cost more."""
    return next((mark for mark in reversed(marks) if mark["cost"] <= cost * (1 + 1e-9)), None)


def ratios(mark: Mark | None, yard: Yardstick) -> list[str]:
    """What a row took to the target, as shares of what the baseline took: forwards, time, CPU time, images."""
    if mark is None:
        return ["not reached", "", "", ""]
    whole = {"cost": yard.cost, "seconds": yard.seconds, "cpu_seconds": yard.cpu_seconds, "images": yard.images}
    return [f"{mark[key] / of:.2f}" for key, of in whole.items()]


def line(name: str, says: str, row: Mapping[str, Any], yard: Yardstick, most: float, n: int) -> str:
    """A row of the table."""
    marks: list[Mark] = row["marks"]
    equal, last = at_equal_cost(marks, yard.cost), marks[-1]
    accuracies = ["", ""] if equal is None else [shown(equal[key], n) for key in ("robust_accuracy", "clean_accuracy")]
    took = ratios(reached(marks, yard.robust, most * yard.cost), yard)
    cells = [name, says, *took, *accuracies, f"{last['cost'] / last['images']:.2f}", "; ".join(row["warned"]) or "-"]
    return f"| {' | '.join(cells)} |"


def place(row: Mapping[str, Any], yard: Yardstick, most: float) -> tuple[bool, float]:
    """What rows are sorted by: forwards to the target; where it is not reached, accuracy at equal forwards."""
    marks: list[Mark] = row["marks"]
    mark = reached(marks, yard.robust, most * yard.cost)
    return (False, mark["cost"]) if mark else (True, -(at_equal_cost(marks, yard.cost) or marks[-1])["robust_accuracy"])


def shown(share: float, n: int) -> str:
    """In % with one standard error over images."""
    return f"{100 * share:.1f} ± {100 * standard_error(share, n):.1f}"


def page(recipe: Mapping[str, Any], results: Path) -> str:
    """All of ``results/cheaper_training/README.md``."""
    rows, n, most = kept(results), recipe["shared"]["data"]["init_args"]["holdout"], recipe["most"]
    yard = Yardstick.of(rows)
    lines = [*HEAD]
    if yard is None:
        return "\n".join([*lines, "The baseline is not measured yet.", ""])
    steps, batch = recipe["baseline"]["steps"], recipe["shared"]["data"]["init_args"]["batch_size"]
    lines += [
        f"Baseline: TeCoA with two attack steps from MiniCLIP-32, {steps} steps of {batch}; one constant rate,",
        f"{recipe['rate']:g}, for all rows. It ends at {100 * yard.robust:.1f} % robust accuracy (mean of {yard.seeds} seeds, standard",
        f"deviation {100 * yard.spread:.1f} points): PGD-10, L-inf 2/255, {n} held-out training images of Tiny-ImageNet, a figure",
        "to compare these rows by and no verdict on a model. It took",
        f"{yard.seconds:.0f} s of steps ({yard.cpu_seconds:.0f} s of CPU time) and {yard.cost:.3g} forwards.",
        "",
        f"To that accuracy, by the first evaluation (each {recipe['every']} steps) at or above it, as shares of what the baseline's",
        f"{steps} steps took: `forwards` are counted where they happen, in forwards of one image through the whole tower, and rank the",
        "rows; `time` (monotonic clock, steps alone) and `CPU` (of the process) are of a machine that others used, too; `images` with",
        f"repetitions. `not reached`: not for {most:g} times the forwards. Accuracies in % ± one standard error over images, by the last",
        "evaluation within the baseline's forwards. Differences below twice the seeds' standard deviation say nothing, and the first",
        "crossing of a noisy curve comes early for every row, the baseline's own among them.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    told = {name: row["says"] for name, row in recipe["rows"].items()}
    order = sorted(rows, key=lambda name: place(rows[name], yard, most))
    return "\n".join([*lines, *(line(name, told.get(name, "the baseline"), rows[name], yard, most, n) for name in order), ""])
