"""What several processes cost, measured with two, and a model of many: ``python -m bench.scaling [--quick --out FILE]``.

Two processes (gloo, one thread each) take TeCoA steps on MiniCLIP-32, in turn: with the all-reduce of gradients, without it (DDP's
``no_sync``), and the first process alone with the whole batch. So the all-reduce's cost is a ratio of steps that lie side by side. Steps
begin together (a barrier that is not timed); a step has taken as long as its slower process. The same is done at several numbers of
attack steps; the kinds come first in turn. Bytes on the wire are counted as they are sent: buckets by a hook of DDP, all collectives by
the dispatcher. The link between the two processes is measured by all-reduces alone, and with it the model (``scaling_model.py``) says what
overhead to expect; the table has the measured one over that. Then the model with a GPU's figures, which are assumptions. Writes
``results/scaling.json`` and the tables of ``docs/scaling.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch

from aft.cards import write_whole
from aft.clip.cost import vit_cost
from aft.errors import ending_calmly
from bench.machine import machine, place_of, ratios, spread
from bench.page import fenced, fill, table
from bench.runs import to_the_end
from bench.scaling_model import Network, Step, buckets_of, sent

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 3600  # seconds of the two processes
OUT, PAGE = ROOT / "results" / "scaling.json", ROOT / "docs" / "scaling.md"

# Assumptions about GPUs, none of them measured here.
ACHIEVED = 400e12  # FLOP/s of one, as in docs/cluster.md
OVERLAP = 0.5  # of a transfer under the backward pass, half is paid for all the same: both want the memory and some of the cores
LATENCY = 5e-6  # seconds of a hop
IN_A_NODE = 8
LINKS = {"in a node": 300e9, "a 200 Gb/s card a GPU": 8 * 25e9, "one 100 Gb/s card a node": 12.5e9}  # bytes/s of the rings together
GPUS = (8, 64, 512)
MODELS = (("ViT-B-32", 64), ("ViT-L-14", 16))  # and images a GPU and step
ATTACK_STEPS = (0, 2, 10)


def run_two(folder: Path, quick: bool) -> dict[str, Any]:
    """Runs the two processes; what both found, the steps of each as the slower one took them."""
    to_the_end([sys.executable, "-m", "bench.scaling_two", str(folder), *(["--quick"] if quick else [])], LIMIT)
    first, second = (json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    return {**first, "steps": {k: as_the_slower(kinds, second["steps"][k]) for k, kinds in first["steps"].items()}}


def as_the_slower(first: dict[str, list[float]], second: dict[str, list[float]]) -> dict[str, list[float]]:
    """Seconds of each kind of step, as the slower of both processes took it; alone, as the first: the second has one image then."""
    return {kind: seconds if kind == "alone" else [max(pair) for pair in zip(seconds, second[kind], strict=True)]
            for kind, seconds in first.items()}  # fmt: skip


def fitted(transfers: dict[str, list[float]]) -> Network:
    """Bandwidth and latency of the link from the medians of all-reduces of several sizes on two processes, by least squares.

    On two processes an all-reduce takes ``bytes / bandwidth + 2 latency``.
    """
    sizes = torch.tensor([float(size) for size in transfers], dtype=torch.float64)
    seconds = torch.tensor([spread(found)["median"] for found in transfers.values()], dtype=torch.float64)
    columns = torch.stack((sizes, torch.ones_like(sizes)), 1) / seconds[:, None]  # relative errors count, or the largest would decide all
    slope, constant = torch.linalg.lstsq(columns, torch.ones_like(seconds)[:, None]).solution.flatten().tolist()
    return Network(1 / max(slope, 1e-15), max(constant, 0.0) / 2)


def compared(found: dict[str, Any], network: Network) -> list[dict[str, Any]]:
    """For each number of attack steps: the overhead measured, and what the model says without overlap and with all of it."""
    rows = []
    for k, kinds in found["steps"].items():
        step = Step(spread(kinds["unsynced"])["median"], spread(kinds["backward"])["median"], found["wire"]["TeCoA"]["buckets"])
        said = {name: step.seconds(network, 2, overlap) / step.compute - 1 for name, overlap in (("no", 0.0), ("full", 1.0))}
        over = {key: value - 1 if key != "n" else value for key, value in ratios(kinds["synced"], kinds["unsynced"]).items()}
        faster, without = (ratios(kinds["alone"], kinds[kind]) for kind in ("synced", "unsynced"))
        rows.append({"attack_steps": int(k), "overhead": over, "predicted": said, "of_one_process": faster, "without_all_reduce": without,
                     "seconds": {kind: spread(seconds) for kind, seconds in kinds.items()}})  # fmt: skip
    return rows


def wire(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Bytes a step by method: expected from parameters and embeddings, counted by hook and dispatcher, and sent by each process."""
    rows = []
    for name, one in found["wire"].items():
        counted = one["collectives"]
        moved = sum(sent(op, size, 2) for op, size in counted.items())
        rows.append({"method": name, "gradients": one["gradients"], "by_hook": sum(one["buckets"]), "buckets": len(one["buckets"]),
                     "gathers_expected": one["gathers"], "gathers_counted": counted.get("allgather", 0), "collectives": counted,
                     "sent": moved})  # fmt: skip
    return rows


def many() -> list[dict[str, Any]]:
    """The model's efficiency on GPUs at equal images a GPU."""
    rows = []
    for name, batch in MODELS:
        config = open_clip.get_model_config(name)
        with torch.device("meta"):
            tower = open_clip.model.CLIP(**{k: v for k, v in config.items() if k in ("embed_dim", "vision_cfg", "text_cfg")}).visual
        cost, buckets = vit_cost(config), buckets_of([p.numel() * 4 for p in tower.parameters()])  # fp32, as DDP sends under bf16-mixed
        for k in ATTACK_STEPS:
            step = Step(batch * cost.fine_tuning_step(k) / ACHIEVED, batch * cost.weight_gradient / ACHIEVED, buckets)
            at = {}
            for link, bandwidth in LINKS.items():
                for n in GPUS:
                    if (link == "in a node") == (n <= IN_A_NODE):
                        at[f"{n}, {link}"] = {hops: step.efficiency(Network(bandwidth, LATENCY, hops), n, OVERLAP)
                                              for hops in ("ring", "tree")}  # fmt: skip
            rows.append({"model": name, "images_a_gpu": batch, "attack_steps": k, "step_seconds": step.compute, "bytes": sum(buckets),
                         "efficiency": at})  # fmt: skip
    return rows


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints, writes; returns what it wrote."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps: whether it runs, no figures; needs --out")
    parser.add_argument("--out", type=Path, help=f"where the figures go; the usual place, {OUT.name}, fills the page as well")
    given = parser.parse_args(args)
    out = place_of(given.out, OUT, given.quick)
    with tempfile.TemporaryDirectory() as folder:
        found = run_two(Path(folder), given.quick)
    network = fitted(found["transfers"])
    told = {"machine": machine(), "quick": given.quick, "global_batch": found["global_batch"],
            "link": {"bandwidth": network.bandwidth, "latency": network.latency,
                     "all_reduce": {size: spread(seconds) for size, seconds in found["transfers"].items()}},
            "two_processes": compared(found, network), "wire": wire(found),
            "assumptions": {"achieved_flops": ACHIEVED, "overlap": OVERLAP, "latency": LATENCY, "links": LINKS},
            "many": many()}  # fmt: skip
    write_whole(out, (json.dumps(told, indent=1) + "\n").encode())
    if out == OUT:
        fill(PAGE, "bench.scaling", fenced(in_words(told)))
    print(in_words(told), flush=True)
    return told


def in_words(told: dict[str, Any]) -> str:
    """The tables."""
    def shown(one: dict[str, float], scale: float = 1.0) -> str:
        """Median and quartiles."""
        return f"{scale * one['median']:.2f} ({scale * one['quarter']:.2f} to {scale * one['three_quarters']:.2f})"

    said = [f"{100 * row['predicted']['full']:.2f} to {100 * row['predicted']['no']:.2f}" for row in told["two_processes"]]
    two = [[str(row["attack_steps"]), shown(row["overhead"], 100), text, f"{row['overhead']['median'] / row['predicted']['no']:.1f}",
            shown(row["of_one_process"]), shown(row["without_all_reduce"])]
           for row, text in zip(told["two_processes"], said, strict=True)]  # fmt: skip
    bytes_ = [[row["method"], *(f"{row[key]:,}" for key in ("gradients", "by_hook", "buckets", "gathers_expected", "gathers_counted")),
               f"{row['sent']:,.0f}"] for row in told["wire"]]  # fmt: skip
    places = list(told["many"][0]["efficiency"])
    far = [[f"{row['model']}, {row['images_a_gpu']} images, {row['attack_steps']} attack steps",
            *(f"{100 * row['efficiency'][p]['ring']:.0f} / {100 * row['efficiency'][p]['tree']:.0f}" for p in places)]
           for row in told["many"]]  # fmt: skip
    link = told["link"]
    return "\n\n".join((
        f"link of the two processes: {link['bandwidth'] / 1e9:.2f} GB/s, {link['latency'] * 1e6:.0f} us",
        table(["attack steps", "all-reduce, % of a step", "the model says", "over it", "speed-up over one", "without all-reduce"], two),
        table(["bytes a step", "gradients", "in buckets", "buckets", "gathers, expected", "counted", "sent by each"], bytes_),
        table(["efficiency, %, ring / tree", *places], far),
    ))  # fmt: skip


if __name__ == "__main__":
    with ending_calmly():
        main()
