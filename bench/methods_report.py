"""The table of the methods, from the cards and runs that ``bench.methods_table`` left."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aft import cards

#: Accuracy in points, by protocol (clean, pgd, apgd) and radius in grey levels (0 for clean).
Figures = dict[tuple[str, float], float]

#: From here on, PGD above APGD is marked: the cheaper attack then says more of itself than of the model.
LARGEST_GAP = 3.0
NAMES = {"tiny_imagenet32": "Tiny-ImageNet, validation images", "cifar10": "CIFAR-10, zero-shot"}


def figures_of(folder: Path) -> dict[str, Figures]:
    """By data set, what the cards of one run say."""
    found: dict[str, Figures] = {}
    for path in sorted(folder.glob("*.json")):
        card = cards.read(path)
        own = found.setdefault(card["data"]["name"], {})
        threat, robust = card["threat"], card["robust_accuracy"]
        if threat is None:
            own["clean", 0] = 100 * card["clean_accuracy"]
        else:
            own[card["protocol"]["name"], round(255 * threat["eps"], 2)] = 100 * robust
    return found


def mean_and_spread(runs: Iterable[Figures]) -> tuple[Figures, Figures]:
    """Mean over the runs of one method, and their sample standard deviation (0 for one run)."""
    every = list(runs)
    shared = [key for key in every[0] if all(key in run for run in every)]
    mean = {key: statistics.fmean(run[key] for run in every) for key in shared}
    spread = {key: statistics.stdev([run[key] for run in every]) if len(every) > 1 else 0.0 for key in shared}
    return mean, spread


def by_method(results: Path, data: str) -> dict[str, list[Figures]]:
    """Runs of every method that are measured on these data, in alphabetical order."""
    found: dict[str, list[Figures]] = {}
    for folder in sorted((results / "cards").glob("*_seed*")):
        if figures := figures_of(folder).get(data):
            found.setdefault(folder.name.rpartition("_seed")[0], []).append(figures)
    return found


def against(value: float, other: float, noise: float) -> str:
    """An arrow where the difference is at least twice the noise of training, else nothing: it is not ranked then."""
    return "" if abs(value - other) < 2 * noise or value == other else " ↑" if value > other else " ↓"


def row(name: str, mean: Figures, tecoa: Figures, noise: Figures, radii: list[float], told: Mapping[str, Any]) -> str:
    """One method's line."""
    keys = [("clean", 0.0), *(("apgd", eps) for eps in radii)]
    errors = {key: 100 * cards.standard_error(mean[key] / 100, told["n"]) for key in keys}
    cells = [f"{mean[key]:.1f} ± {errors[key]:.1f}{against(mean[key], tecoa[key], noise[key])}" for key in keys]
    gap = max(mean["pgd", eps] - mean["apgd", eps] for eps in radii)
    flag = " (!)" if gap > LARGEST_GAP else ""
    return f"| {name} | {' | '.join(cells)} | {gap:.1f}{flag} | {told.get('rate', '-')} | {told.get('cost', '-')} |"


def table(results: Path, data: str, n: int, runs: Mapping[str, Any], costs: Mapping[str, float]) -> list[str]:
    """Markdown of one data set; nothing where TeCoA, which all is compared with, is not measured yet."""
    found = by_method(results, data)
    if "tecoa" not in found:
        return []
    tecoa, noise = mean_and_spread(found["tecoa"])
    radii = sorted(eps for protocol, eps in tecoa if protocol == "apgd")
    head = ["method", "clean", *(f"{eps:g}/255" for eps in radii), "largest PGD-to-APGD gap", "rate", "time of a step"]
    lines = [f"## {NAMES[data]}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, own in found.items():
        told = {"n": n, "rate": f"{runs[f'{name}_seed0']['rate']:g}"} | ({"cost": f"{costs[name]:.2f}"} if name in costs else {})
        mean, _ = mean_and_spread(own)
        lines.append(row(name if len(own) == 1 else f"{name}, mean of {len(own)} seeds", mean, tecoa, noise, radii, told))
    spread = ", ".join(f"{noise[key]:.1f} ({'clean' if key[0] == 'clean' else f'{key[1]:g}/255'})" for key in noise if key[0] != "pgd")
    return [*lines, "", f"Standard deviation of TeCoA over {len(found['tecoa'])} seeds, in points: {spread}.", ""]


def page(recipe: Mapping[str, Any], results: Path) -> str:
    """All of ``results/methods_table/README.md``."""
    runs, costs = (json.loads(path.read_text()) if (path := results / name).exists() else {} for name in ("runs.json", "cost.json"))
    given = recipe["evaluate"]
    lines = [
        "# Every method by one recipe",
        "",
        "Written by `python -m bench.methods_table` (recipe: `bench/methods_table.yaml`). `runs.json` has the rates tried, the sha256",
        "of the weights and the command of each row, `cards/` every figure.",
        "",
        f"Accuracy in % ± one standard error over images, n = {given['n']} of each data set. Robust: APGD-CE and APGD-T,",
        f"{given['steps']} steps, {given['targets']} targets, L-inf on native pixels. Largest radius first: an image that survives it is",
        "not attacked again at a smaller one, so smaller radii can only come out higher. ↑ and ↓: further from TeCoA than twice TeCoA's",
        "standard deviation over seeds; what has no arrow is not ranked.",
        f"Gap: PGD ({given['steps']} steps, same images) minus APGD, in points, at the radius where it",
        f"is largest; (!) above {LARGEST_GAP:g}. Time of a step: relative to TeCoA's.",
        "",
    ]
    for data in NAMES:
        lines += table(results, data, given["n"], runs, costs)
    return "\n".join(lines)
