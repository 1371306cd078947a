"""Adversarial pre-training against clean pre-training then TeCoA, at equal compute: ``python -m bench.pretraining [--only WAY ...]``.

``bench/pretraining.yaml`` has both ways. Compute is the number of floating-point operations of the training steps, counted by torch.
Everything is resumable; the rows go into the methods' table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from aft.cards import write_whole
from aft.clip import ModelSpec, load_model
from aft.errors import ending_calmly
from bench.methods_table import RECIPE, RUNS, keep, measure, stands, write_page
from bench.runs import HERE, Method, fit

WAYS = HERE / "bench" / "pretraining.yaml"
COUNTED = RUNS / "pretraining" / "flops.json"


def flops_of_a_step(phase: dict[str, Any], folder: Path) -> int:
    """Forward and backward of the towers, attack and optimiser: what two steps take more than one."""
    settings = json.loads(json.dumps(phase["shared"]))
    settings["model"]["class_path"] = f"aft.methods.{phase['kind']}"
    settings["trainer"] |= {"limit_val_batches": 0, "logger": False}
    settings["checkpoint"] = {"monitor": None, "save_top_k": 0, "save_last": False}  # else the next count would find its folder taken
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))

    def counted(steps: int) -> int:
        """Of a whole start."""
        place = str(folder / f"steps-{steps}")
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            train.main(["fit", "-c", str(folder / "recipe.yaml"), "--trainer.max_steps", str(steps), "--trainer.default_root_dir", place])
        return int(counter.get_total_flops())

    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not know fused attention
    return counted(2) - counted(1)


def plan(ways: dict[str, list[dict[str, Any]]], flops: dict[str, int]) -> dict[str, list[int]]:
    """Steps of each phase: those that are given, and for a way of shares as many as the others' compute allows.

    Args:
        ways: phases by the name of their way, each with ``steps`` or with ``share``.
        flops: of a training step, by the name of the phase.
    """
    budget = max(sum(flops[p["name"]] * p.get("steps", 0) for p in phases) for phases in ways.values())
    return {
        way: [p["steps"] if "steps" in p else round(p["share"] * budget / flops[p["name"]]) for p in phases] for way, phases in ways.items()
    }


def count(ways: dict[str, list[dict[str, Any]]]) -> dict[str, int]:
    """Operations of a step of each phase, by its name; kept beside the runs."""
    if not COUNTED.exists():
        found = {p["name"]: flops_of_a_step(p, RUNS / "pretraining" / "count" / p["name"]) for phases in ways.values() for p in phases}
        write_whole(COUNTED, json.dumps(found).encode())
    counted: dict[str, int] = json.loads(COUNTED.read_text())
    return counted


def main() -> None:
    """Trains both ways, phase after phase, and measures them."""
    ways, table = yaml.safe_load(WAYS.read_text())["ways"], yaml.safe_load(RECIPE.read_text())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[*ways], choices=[*ways], metavar="WAY", help="names of ways; none: both")
    wanted = parser.parse_args().only
    flops = count(ways)
    for way, steps in plan(ways, flops).items():
        if way not in wanted or stands(f"{way}_seed0", table):
            continue
        weights = "random"
        for phase, length in zip(ways[way], steps, strict=True):
            phase["shared"]["model"]["init_args"]["clip"] = {"name": "miniclip32", "pretrained": weights}
            method = Method(way, phase["kind"])
            weights = str(fit(phase, method, RUNS / "pretraining" / way / phase["name"], phase["rate"], length, 0))
            print(f"{way}, {phase['name']}: {length} steps of {flops[phase['name']]:.3g} operations", flush=True)
        spent = sum(flops[p["name"]] * n for p, n in zip(ways[way], steps, strict=True))
        told = {"rate": ways[way][0]["rate"], "sha256": load_model(ModelSpec(pretrained=weights)).record.sha256,
                "steps": {p["name"]: n for p, n in zip(ways[way], steps, strict=True)}, "operations": spent,
                "command": "python -m bench.pretraining"}  # fmt: skip
        measure(table, f"{way}_seed0", Path(weights))
        keep(f"{way}_seed0", told)
        write_page(table)


if __name__ == "__main__":
    with ending_calmly():
        main()
