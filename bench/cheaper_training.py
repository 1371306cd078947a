"""The price of cheaper adversarial training in accuracy: ``python -m bench.cheaper_training [--only NAME ...]``.

``bench/cheaper_training.yaml`` has the rows. The baseline trains first; every other row trains until it has its robust accuracy, or has
spent three times as much. Everything is resumable, also after a kill. Runs lie in ``runs/cheaper_training``; rows go to
``results/cheaper_training/rows.json`` and the table to its ``README.md``, row after row. A row that stands there is not done again.
``--time`` measures what a step of each kind takes (let nothing else run), by which the rows are then ranked.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Mapping
from typing import Any

import yaml

from aft.cards import write_whole
from aft.clip.weights import describe
from aft.errors import unknown_name
from bench import cheaper_report
from bench.machine import machine
from bench.meter import MARKS
from bench.runs import HERE, Method, fit, measured_speed
from bench.step_cost import parts_of, planned, spent

RECIPE = HERE / "bench" / "cheaper_training.yaml"
RUNS = HERE / "runs" / "cheaper_training"
RESULTS = HERE / "results" / "cheaper_training"


def steps_of(row: dict[str, Any], recipe: dict[str, Any], config: dict[str, Any], own_side: int) -> tuple[int, int]:
    """Steps of a row's plan, which cost what the baseline's cost, and the most that it may make."""
    attack = recipe["shared"]["model"]["init_args"]["attack"]["init_args"]["steps"]
    budget = recipe["baseline"]["steps"] * parts_of({}, attack, own_side)[-1].operations(config)
    parts = parts_of(row.get("model", {}), attack, own_side)
    plan = round(budget / planned(parts, config))
    rest = recipe["most"] * budget - spent(parts, config, plan, plan)
    every = recipe["every"]
    return plan, math.ceil((plan + rest / parts[-1].operations(config)) / every) * every


def with_ends(settings: dict[str, Any], plan: int, steps: int) -> dict[str, Any]:
    """Settings whose phases end at shares of the whole run, not of the plan."""
    phases = [{**phase, "until": round(phase["until"] * plan) / steps} for phase in settings.get("phases", [])]
    return {**settings, **({"phases": phases} if phases else {})}


def train_row(recipe: dict[str, Any], label: str, row: dict[str, Any], steps: int, seed: int, meter: dict[str, Any]) -> dict[str, Any]:
    """Trains one row, or what of it is missing, and says what is kept of it."""
    own = with_data(recipe, row)
    watch = [{"class_path": "bench.meter.Meter", "init_args": {"every": recipe["every"], "most": recipe["most"], **meter}},
             {"class_path": "callbacks.CollapseWatch", "init_args": {"every": 100}}, {"class_path": "callbacks.PlainProgress"}]  # fmt: skip
    folder = RUNS / label
    trainer = {"callbacks": watch, **row.get("trainer", {})}
    fit(own, Method(label, "TeCoA", row.get("model", {})), folder, recipe["rate"], steps, seed, trainer)
    log = (folder / "log.txt").read_text()
    return {"marks": json.loads((folder / MARKS).read_text()), "batch": own["shared"]["data"]["init_args"]["batch_size"],
            "warned": sorted(set(re.findall(r"(?:catastrophic overfitting|collapse) at step \d+", log))),
            "command": f"python -m bench.cheaper_training --only {label}"}  # fmt: skip


def baseline(recipe: dict[str, Any]) -> tuple[float, float]:
    """Robust accuracy of the baseline after its last step, and what its steps cost; means over seeds, trained where they are missing."""
    steps = recipe["baseline"]["steps"]
    for seed in recipe["baseline"]["seeds"]:
        label = f"tecoa_seed{seed}"
        if label not in cheaper_report.kept(RESULTS):
            keep(label, {**train_row(recipe, label, {}, steps, seed, {}), "plan": steps, "model": {}})
            print(f"{label}: measured", flush=True)
    ends = [row["marks"][-1] for name, row in cheaper_report.kept(RESULTS).items() if name.startswith("tecoa_seed")]
    return statistics.fmean(end["robust_accuracy"] for end in ends), statistics.fmean(end["cost"] for end in ends)


def kinds(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The model's settings for each kind of steps of a row, each alone: its phases, then what comes after them."""
    given = row.get("model", {})
    whole = {key: value for key, value in given.items() if key != "phases"}
    return [*({**whole, "phases": [{**phase, "until": 1.0}]} for phase in given.get("phases", [])), whole]


def step_times(recipe: dict[str, Any]) -> dict[str, list[float]]:
    """Time of a step of each kind, over one of the baseline: short runs, one after the other, in rounds; medians of the rounds' ratios."""
    given = recipe["timing"]
    wanted = {"baseline": {}, **recipe["rows"]}
    ratios: dict[str, list[list[float]]] = {name: [] for name in wanted}
    for turn in range(given["rounds"]):
        seconds: dict[str, list[float]] = {}
        for name, row in wanted.items():
            seconds[name] = [seconds_of_a_step(recipe, f"{name}-{place}-{turn}", row, kind) for place, kind in enumerate(kinds(row))]
        for name, those in seconds.items():
            ratios[name].append([one / seconds["baseline"][0] for one in those])
    return {name: [statistics.median(one) for one in zip(*rounds, strict=True)] for name, rounds in ratios.items()}


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
    parser.add_argument("--time", action="store_true", help="only measure what a step of each kind takes, on a quiet machine")
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
        target, budget = baseline(recipe)
        print(f"target: {100 * target:.1f} % robust for {budget:.3g} forward-equivalents", flush=True)
        config: Any = describe(recipe["shared"]["model"]["init_args"]["clip"]["name"], None).config
        for label, row in recipe["rows"].items():
            if label in cheaper_report.kept(RESULTS) or (given.only and label not in given.only):
                continue
            plan, steps = steps_of(row, recipe, config, config["vision_cfg"]["image_size"])
            own = {**row, "model": with_ends(row.get("model", {}), plan, steps)}
            try:
                done = train_row(recipe, label, own, steps, 0, {"target": target, "budget": budget, "enough": row.get("enough", 1.0)})
            except SystemExit as error:  # its own; the others go on
                failed.append(f"{label}: {error}")
                continue
            keep(label, {**done, "plan": plan, "model": row.get("model", {})})
            print(f"{label}: measured", flush=True)
    write_page(recipe)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
