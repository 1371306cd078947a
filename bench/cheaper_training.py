"""The price of cheaper adversarial training in accuracy: ``python -m bench.cheaper_training [--only NAME ...]``.

``bench/cheaper_training.yaml`` has the rows. ``--time`` comes first (let nothing else run): it measures what a step of each kind takes,
over a step of the baseline. Then the baseline trains, and every other row until it has the baseline's robust accuracy (and has taken the
baseline's time), or has taken three times as long, by those measured steps: how busy the machine is while it trains does not matter.
Everything is resumable, also after a kill. Runs lie in ``runs/cheaper_training``; times and rows go to ``results/cheaper_training``, the
table to its ``README.md``, row after row. A row that stands there is not done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from aft.cards import write_whole
from aft.clip.weights import describe
from aft.errors import ending_calmly, unknown_name
from bench import cheaper_report
from bench.machine import machine
from bench.meter import MARKS
from bench.runs import HERE, Method, fit, measured_speed
from bench.step_cost import parts_of, planned, summed

RECIPE = HERE / "bench" / "cheaper_training.yaml"
RUNS = HERE / "runs" / "cheaper_training"
RESULTS = HERE / "results" / "cheaper_training"


@dataclass(frozen=True)
class Length:
    """Of a row's run, in steps.

    Args:
        plan: by operations they cost what the baseline's cost; phases end at shares of them.
        least: up to the last evaluation that comes no later than the baseline's end.
        most: up to the first one at or after so many times that time.
    """

    plan: int
    least: int
    most: int


def length_of(row: dict[str, Any], recipe: dict[str, Any], config: dict[str, Any], own_side: int, of_a_step: Sequence[float]) -> Length:
    """How long a row trains.

    Args:
        row, recipe: as the YAML has them.
        config: of the model.
        own_side: side of its images, pixels.
        of_a_step: time of each of the row's kinds of steps, over a step of the baseline.
    """
    attack, whole = recipe["shared"]["model"]["init_args"]["attack"]["init_args"]["steps"], recipe["baseline"]["steps"]
    parts = parts_of(row.get("model", {}), attack, own_side)
    plan = round(whole * parts_of({}, attack, own_side)[-1].operations(config) / planned(parts, config))
    ends = itertools.count(recipe["every"], recipe["every"])
    most = next(end for end in ends if summed(of_a_step, parts, end, plan) >= recipe["most"] * whole)
    in_time = [end for end in range(0, most + 1, recipe["every"]) if summed(of_a_step, parts, end, plan) <= whole]
    return Length(plan, in_time[-1], most)


def with_ends(settings: dict[str, Any], plan: int, steps: int) -> dict[str, Any]:
    """Settings whose phases end at shares of the whole run, not of the plan."""
    phases = [{**phase, "until": round(phase["until"] * plan) / steps} for phase in settings.get("phases", [])]
    return {**settings, **({"phases": phases} if phases else {})}


def train_row(recipe: dict[str, Any], label: str, row: dict[str, Any], steps: int, seed: int, meter: dict[str, Any]) -> dict[str, Any]:
    """Trains one row, or what of it is missing, and says what is kept of it."""
    own = with_data(recipe, row)
    watch = [{"class_path": "bench.meter.Meter", "init_args": {"every": recipe["every"], **meter}},
             {"class_path": "callbacks.CollapseWatch", "init_args": {"every": 100}}, {"class_path": "callbacks.PlainProgress"}]  # fmt: skip
    folder = RUNS / label
    trainer = {"callbacks": watch, **row.get("trainer", {})}
    fit(own, Method(label, "TeCoA", row.get("model", {})), folder, recipe["rate"], steps, seed, trainer)
    log = (folder / "log.txt").read_text()
    return {"marks": json.loads((folder / MARKS).read_text()), "batch": own["shared"]["data"]["init_args"]["batch_size"],
            "warned": sorted(set(re.findall(r"(?:catastrophic overfitting|collapse) at step \d+", log))),
            "command": f"python -m bench.cheaper_training --only {label}"}  # fmt: skip


def baseline(recipe: dict[str, Any]) -> float:
    """Robust accuracy of the baseline after its last step, mean over seeds, trained where they are missing."""
    steps = recipe["baseline"]["steps"]
    for seed in recipe["baseline"]["seeds"]:
        label = f"tecoa_seed{seed}"
        if label not in cheaper_report.kept(RESULTS):
            keep(label, {**train_row(recipe, label, {}, steps, seed, {}), "plan": steps, "model": {}})
            print(f"{label}: measured", flush=True)
    yard = cheaper_report.Yardstick.of(cheaper_report.kept(RESULTS))
    assert yard is not None
    return yard.robust


def kinds(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The model's settings for each kind of steps of a row, each alone: its phases, then what comes after them."""
    given = row.get("model", {})
    whole = {key: value for key, value in given.items() if key != "phases"}
    return [*({**whole, "phases": [{**phase, "until": 1.0}]} for phase in given.get("phases", [])), whole]


def step_times(recipe: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Time of a step of each kind, over one of the baseline: for each row a list a round, in it each of its kinds.

    In a round short runs follow one another, every second round the other way round; the baseline is timed before them and after them, and
    the mean of both counts.
    """
    ratios: dict[str, list[list[float]]] = {name: [] for name in recipe["rows"]}
    for turn in range(recipe["timing"]["rounds"]):
        ends, seconds = [seconds_of_a_step(recipe, f"baseline-before-{turn}", {}, {})], dict[str, list[float]]()
        for name in sorted(recipe["rows"], key=list(recipe["rows"]).index, reverse=bool(turn % 2)):
            row = recipe["rows"][name]
            seconds[name] = [seconds_of_a_step(recipe, f"{name}-{place}-{turn}", row, kind) for place, kind in enumerate(kinds(row))]
        ends.append(seconds_of_a_step(recipe, f"baseline-after-{turn}", {}, {}))
        for name, those in seconds.items():
            ratios[name].append([one / statistics.fmean(ends) for one in those])
    return ratios


def seconds_of_a_step(recipe: dict[str, Any], label: str, row: dict[str, Any], model: dict[str, Any]) -> float:
    """Of a short run."""
    own = with_data(recipe, row)
    steps, folder, trainer = recipe["timing"]["steps"], RUNS / "timing" / label, row.get("trainer", {})
    images_a_second = measured_speed(own, Method(label, "TeCoA", model), folder, recipe["rate"], steps, trainer)
    return own["shared"]["data"]["init_args"]["batch_size"] / images_a_second


def with_data(recipe: dict[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with a row's own settings of the data."""
    own: dict[str, Any] = json.loads(json.dumps(recipe))
    own["shared"]["data"]["init_args"] |= row.get("data", {})
    return own


def keep(label: str, row: dict[str, Any]) -> None:
    """Adds a row to the results, and writes the table anew."""
    rows = {**cheaper_report.kept(RESULTS), label: row}
    write_whole(RESULTS / cheaper_report.ROWS, (json.dumps(rows, indent=1) + "\n").encode())
    write_page(yaml.safe_load(RECIPE.read_text()))


def write_page(recipe: dict[str, Any]) -> None:
    """The table of what is there."""
    write_whole(RESULTS / "README.md", cheaper_report.page(recipe, RESULTS).encode())


def main() -> None:
    """Does what is missing, and writes the table of what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="names of rows; none: all. The baseline is done in any case.")
    parser.add_argument("--show", action="store_true", help="only write the table again, from the rows that are there")
    parser.add_argument("--time", action="store_true", help="first of all: measure what a step of each kind takes, on a quiet machine")
    given = parser.parse_args()
    recipe, failed = yaml.safe_load(RECIPE.read_text()), list[str]()
    known = [*recipe["rows"], *(f"{cheaper_report.BASELINE}{seed}" for seed in recipe["baseline"]["seeds"])]
    for name in given.only:
        if name not in known:
            parser.error(unknown_name("row", name, known))
    if given.time:
        told = {"machine": machine(), "ratios": step_times(recipe)}
        write_whole(RESULTS / cheaper_report.TIMES, (json.dumps(told, indent=1) + "\n").encode())
    elif not given.show:
        target, times = baseline(recipe), cheaper_report.times_of(recipe, RESULTS)
        print(f"target: {100 * target:.1f} % robust", flush=True)
        if times is None:
            write_page(recipe)
            sys.exit("rows end by time: measure a step of each kind first, python -m bench.cheaper_training --time (let nothing else run).")
        config: Any = describe(recipe["shared"]["model"]["init_args"]["clip"]["name"], None).config
        for label, row in recipe["rows"].items():
            if label in cheaper_report.kept(RESULTS) or (given.only and label not in given.only):
                continue
            length = length_of(row, recipe, config, config["vision_cfg"]["image_size"], cheaper_report.typical(times[label]))
            own = {**row, "model": with_ends(row.get("model", {}), length.plan, length.most)}
            try:
                done = train_row(recipe, label, own, length.most, 0, {"target": target, "least": length.least})
            except SystemExit as error:  # its own; the others go on
                failed.append(f"{label}: {error}")
                continue
            keep(label, {**done, "plan": length.plan, "model": row.get("model", {})})
            print(f"{label}: measured", flush=True)
    write_page(recipe)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    with ending_calmly():
        main()
