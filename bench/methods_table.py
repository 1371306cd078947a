"""Trains every method by one recipe and measures it: ``python -m bench.methods_table [--only NAME ...]``.

``bench/methods_table.yaml`` has the recipe. Each method searches its rate on held-out training images, trains, and is measured on
Tiny-ImageNet's validation images and zero-shot on CIFAR-10. Everything is resumable: what is there is not done again. Runs lie in
``runs/methods_table``; the chosen rates and the weights' sha256 of a row go to ``results/methods_table/rows/LABEL.json``, its cards to
``results/methods_table/cards/LABEL``: what two machines made is put together by copying both folders into one. After each row the table
(``results/methods_table/README.md``) is written anew; ``--show`` writes it and its block in ``docs/methods.md``, and no more. A row that
stands there is not done again, also where its run is gone. Rows whose weights belong in git are measured once they are there, so that a
card's sha256 names a file that everybody has: commit them, and start again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aft.cards import write_whole
from aft.clip import ModelSpec, load_model
from aft.clip.pack import pack_tower
from aft.errors import ending_calmly, unknown_name
from bench import methods_report
from bench.machine import hardware, machine
from bench.page import fill
from bench.runs import HERE, Method, fit, measured_speed, run

RECIPE = HERE / "bench" / "methods_table.yaml"
RUNS = HERE / "runs" / "methods_table"
RESULTS = HERE / "results" / "methods_table"
DOCS = HERE / "docs" / "methods.md"
DATA = {"tiny_imagenet32": "configs/data/tiny_imagenet32.yaml", "cifar10": "configs/data/cifar10.yaml"}
#: Rows whose image towers are committed before they are measured; of the others the sha256 and the command are kept.
COMMITTED = {"tecoa_seed0": "tecoa", "fare_seed0": "fare", "tga_zsr_seed0": "tga_zsr"}


def held_out(recipe: dict[str, Any], method: Method, folder: Path) -> dict[str, float]:
    """Clean and PGD-10 robust accuracy on the held-out training images; kept beside the run."""
    kept = folder / "held_out.json"
    if not kept.exists():
        settings = yaml.safe_load((folder / "recipe.yaml").read_text())
        del settings["trainer"]["limit_val_batches"]
        settings["trainer"]["default_root_dir"] = str(folder / "validate")
        settings["model"]["init_args"]["clip"] = {"name": "miniclip32", "pretrained": str(folder / "checkpoints" / "last.ckpt")}
        (folder / "validate.yaml").write_text(yaml.safe_dump(settings))
        code = "import sys, json, train; m = train.main(['validate', '-c', sys.argv[1]]).trainer.callback_metrics; " \
               "json.dump({k[4:]: float(v) for k, v in m.items() if k.startswith('val/')}, open(sys.argv[2], 'w'))"
        run("-c", code, str(folder / "validate.yaml"), str(kept), log=folder / "validate.txt")
    figures: dict[str, float] = json.loads(kept.read_text())
    return figures


def search(recipe: dict[str, Any], method: Method) -> tuple[float, dict[str, Any]]:
    """The rate with the best mean of clean and robust accuracy on held-out images, and what each gave; once for all seeds."""
    for path in (RESULTS / "rows" / f"{method.name}_seed{seed}.json" for seed in method.seeds):
        if path.exists():
            told = json.loads(path.read_text())
            return told["rate"], told["search"]
    tried: dict[str, Any] = {}
    for rate in recipe["search"]["rates"]:
        lr = rate * method.factor
        folder = RUNS / method.name / f"search-{lr:g}"
        fit(recipe, method, folder, lr, recipe["search"]["steps"], 0)
        tried[f"{lr:g}"] = held_out(recipe, method, folder)
    best = max(tried, key=lambda lr: tried[lr]["clean_accuracy"] + tried[lr]["robust_accuracy"])
    return float(best), tried


def relative_costs(recipe: dict[str, Any], methods: list[Method]) -> dict[str, list[float]]:
    """Time of a training step over TeCoA's, once a round: in each, short runs of one method after the other."""
    given, ratios = recipe["cost"], dict[str, list[float]]()
    for turn in range(given["rounds"]):
        speeds = {}
        for method in methods:
            folder = RUNS / "cost" / f"{method.name}-{turn}"
            speeds[method.name] = measured_speed(recipe, method, folder, min(recipe["search"]["rates"]), given["steps"])
        for name, speed in speeds.items():
            ratios.setdefault(name, []).append(speeds["tecoa"] / speed)
    return ratios


def measure(recipe: dict[str, Any], label: str, weights: Path) -> None:
    """Clean, and PGD and APGD at every radius, on both data sets; cards go to the results."""
    given, out = recipe["evaluate"], RUNS / "eval"
    models = RUNS / f"{label}.yaml"
    models.write_text(yaml.safe_dump({"models": {label: {"name": "miniclip32", "pretrained": str(weights)}}}))
    eps = "[" + ", ".join(given["eps"]) + "]"
    for data in DATA.values():
        run("eval.py", "-c", "configs/eval/apgd.yaml", "-c", data, "-c", of_this_project(models), "--protocols", "[clean, pgd, apgd]",
            "--eps", eps, "--n", str(given["n"]), "--steps", str(given["steps"]), "--targets", str(given["targets"]),
            "--largest_first", "true", "--out", of_this_project(out), log=RUNS / f"{label}.txt")  # fmt: skip
    for path in (out / "cards" / label).iterdir():
        (RESULTS / "cards" / label).mkdir(parents=True, exist_ok=True)
        (RESULTS / "cards" / label / path.name).write_bytes(path.read_bytes())


def of_this_project(path: Path) -> str:
    """As commands on cards name it, which are the same on every machine."""
    return str(path.relative_to(HERE)) if path.is_relative_to(HERE) else str(path)


def tower_of(label: str) -> Path:
    """Where the packed image tower of a row lies whose weights belong in git."""
    return Path("results", "weights", f"{COMMITTED[label]}.safetensors")


def committed(label: str) -> Path | None:
    """The row's tower where git has it: it is not trained again."""
    return tower if label in COMMITTED and in_git(tower := tower_of(label)) else None


def weights_of(label: str, checkpoint: Path) -> Path:
    """What is measured: a packed image tower where the row's weights belong in git, else the checkpoint itself."""
    if label not in COMMITTED:
        return checkpoint
    pack_tower(load_model(ModelSpec(pretrained=str(checkpoint))), HERE / tower_of(label))
    return tower_of(label)


def in_git(path: Path) -> bool:
    """Whether the last commit holds this very file."""
    known = subprocess.run(["git", "cat-file", "-e", f"HEAD:{path}"], cwd=HERE, capture_output=True).returncode == 0
    return known and subprocess.run(["git", "diff", "--quiet", "HEAD", "--", str(path)], cwd=HERE).returncode == 0


@dataclass(frozen=True)
class Row:
    """One trained run: its label, its weights as they are measured, and what is kept of it."""

    label: str
    weights: Path
    told: dict[str, Any]


def stands(label: str, recipe: dict[str, Any]) -> bool:
    """Whether the results hold this row whole: what is kept of its run, and a card of every cell."""
    cells = len(DATA) * (1 + 2 * len(recipe["evaluate"]["eps"]))
    return (RESULTS / "rows" / f"{label}.json").exists() and len(list((RESULTS / "cards" / label).glob("*.json"))) == cells


def trained(recipe: dict[str, Any], methods: list[Method]) -> Iterator[Row]:
    """Every run that the results do not hold yet, one after the other."""
    for method in methods:
        missing = {seed: f"{method.name}_seed{seed}" for seed in method.seeds if not stands(f"{method.name}_seed{seed}", recipe)}
        if not missing:
            continue
        rate, tried = search(recipe, method)
        for seed, label in missing.items():
            folder = RUNS / method.name / f"seed{seed}"
            there = committed(label)
            weights = there or weights_of(label, fit(recipe, method, folder, rate, recipe["train"]["steps"], seed))
            sha256 = load_model(ModelSpec("miniclip32", str(weights))).record.sha256
            command = f"python -m bench.methods_table --only {method.name}"
            yield Row(label, weights, {"rate": rate, "search": tried, "sha256": sha256, "command": command})


def keep(label: str, told: dict[str, Any]) -> None:
    """Writes what is kept of a run to ``results/methods_table/rows/LABEL.json``: with it the row stands."""
    write_whole(RESULTS / "rows" / f"{label}.json", (json.dumps(told, indent=1) + "\n").encode())


def keep_costs(costs: dict[str, list[float]]) -> None:
    """Adds to ``results/methods_table/cost.json``; those of other hardware do not stay beside them."""
    path, here = RESULTS / "cost.json", machine()
    before = json.loads(path.read_text()) if path.exists() else {"machine": here, "ratios": {}}
    alike = all(before["machine"][key] == here[key] for key in (*hardware(), "threads"))
    write_whole(path, (json.dumps({"machine": here, "ratios": {**(before["ratios"] if alike else {}), **costs}}, indent=1) + "\n").encode())


def write_page(recipe: dict[str, Any]) -> None:
    """The table of what is there."""
    write_whole(RESULTS / "README.md", methods_report.page(recipe, RESULTS).encode())


def fill_docs(recipe: dict[str, Any]) -> None:
    """The block of the table in ``docs/methods.md``. Not while rows are made: their cards would say that the checkout was changed."""
    fill(DOCS, "bench.methods_table", methods_report.in_short(recipe, RESULTS))


def asked_for(parser: argparse.ArgumentParser, recipe: dict[str, Any]) -> tuple[argparse.Namespace, list[Method]]:
    """The command line, and the methods that it means."""
    given = parser.parse_args()
    for name in given.only:
        if name not in recipe["methods"]:
            parser.error(unknown_name("method", name, recipe["methods"]))
    if given.cost and given.only and "tecoa" not in given.only:
        parser.error("--cost is relative to TeCoA's step: add tecoa to --only.")
    return given, [Method.of(name, told) for name, told in recipe["methods"].items() if not given.only or name in given.only]


def main() -> None:
    """Does what is missing, and writes the table of what is there."""
    parser = argparse.ArgumentParser(prog="python -m bench.methods_table", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of methods; none: all")
    parser.add_argument("--cost", action="store_true", help="also measure the time of a step (let nothing else run)")
    parser.add_argument("--show", action="store_true", help="only write the table and its block in docs/methods.md again")
    recipe = yaml.safe_load(RECIPE.read_text())
    given, methods = asked_for(parser, recipe)
    if given.show:
        fill_docs(recipe)
    else:
        for row in trained(recipe, methods):
            print(f"{row.label}: rate {row.told['rate']:g}, trained", flush=True)
            if row.label in COMMITTED and not in_git(row.weights):
                sys.exit(f"commit {row.weights}, then start again: what is measured should be in git.")
            measure(recipe, row.label, row.weights)
            keep(row.label, row.told)
            write_page(recipe)
            print(f"{row.label}: measured", flush=True)
    if given.cost:
        keep_costs(relative_costs(recipe, methods))
    write_page(recipe)


if __name__ == "__main__":
    with ending_calmly():
        main()
