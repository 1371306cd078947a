"""Loss curves without and with each speed-up: ``python -m bench.curves`` (100 steps, 3 seeds each; about 10 minutes on two idle cores).

TeCoA from MiniCLIP-32 on the embedded sample. Where the mathematics is unchanged both curves run in float64 and must be equal: in fp32 the
signs of small gradients differ by rounding, and the curves part. Where it is changed they run in fp32, and the mean loss of the last
fifth must differ by less than twice its standard deviation over seeds. Written to ``results/curves.json``. Another speed-up is one line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table
from torch import nn

from aft.attacks import PGD
from aft.cards import write_whole
from aft.clip.attention import FoldedAttention
from aft.evaluation import origin
from aft.methods import OptimizerSpec, TeCoA
from bench.speed.__main__ import quiet
from bench.speed.record import machine
from bench.speed.row import Effort
from bench.speed.setting import MINI, ROOT, trainer
from callbacks import Compiled
from datamodules import Sample

OUT = ROOT / "results" / "curves.json"
#: Of a loss, relative: what two curves of the same mathematics may differ by in float64.
EQUAL = 1e-6


def untouched(method: TeCoA) -> list[L.Callback]:
    """As it is."""
    return []


def with_torchs_attention(method: TeCoA) -> list[L.Callback]:
    """Without the folded projection."""
    for module in method.model.visual.modules():
        if isinstance(module, FoldedAttention):
            module.__class__ = nn.MultiheadAttention
    return []


@dataclass(frozen=True)
class SpeedUp:
    """Two ways to train.

    Args:
        without, with_it: change the method, and give callbacks.
        unchanged: whether the mathematics is the same.
    """

    without: Callable[[TeCoA], list[L.Callback]]
    with_it: Callable[[TeCoA], list[L.Callback]]
    unchanged: bool = True


SPEED_UPS: dict[str, SpeedUp] = {
    "folded": SpeedUp(with_torchs_attention, untouched),
    "compiled": SpeedUp(untouched, lambda method: [Compiled()]),
    "bf16": SpeedUp(untouched, lambda method: [], unchanged=False),
}
#: The trainer's precision where it is what is changed.
PRECISION = {"bf16": "bf16-mixed"}


class Losses(L.Callback):
    """The loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One more."""
        self.values.append(float(outputs["loss"]))


def curve(change: Callable[[TeCoA], list[L.Callback]], precision: Any, seed: int, steps: int) -> list[float]:
    """The losses of a run."""
    optimizer = OptimizerSpec(name="adamw", lr=3e-4, warmup_steps=10)
    method = TeCoA(MINI, attack=PGD(eps="2/255", step_size="2/255", steps=2), optimizer=optimizer, seed=seed)
    losses = Losses()
    fit = trainer(Effort(), steps, [losses, *change(method)], precision=precision)
    fit.fit(method, datamodule=Sample(batch_size=64, augment="crop_flip", seed=seed))
    return losses.values


def compared(name: str, seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Both curves of every seed, and what is concluded."""
    one = SPEED_UPS[name]
    base = "64-true" if one.unchanged else "32-true"
    without = [curve(one.without, base, seed, steps) for seed in seeds]
    with_it = [curve(one.with_it, PRECISION.get(name, base), seed, steps) for seed in seeds]
    pairs = [pair for curves in zip(without, with_it, strict=True) for pair in zip(*curves, strict=True)]
    last = max(1, steps // 5)
    ends = [[statistics.fmean(values[-last:]) for values in curves] for curves in (without, with_it)]
    noise = statistics.stdev(ends[0]) if len(seeds) > 1 else 0.0
    told = {
        "unchanged": one.unchanged, "precision": base, "largest_difference": max(abs(b - a) / abs(a) for a, b in pairs),
        "end_without": statistics.fmean(ends[0]), "end_with": statistics.fmean(ends[1]), "noise_over_seeds": noise,
        "without": without, "with": with_it,
    }  # fmt: skip
    apart = abs(told["end_with"] - told["end_without"])
    return {**told, "holds": told["largest_difference"] < EQUAL if one.unchanged else apart < 2 * noise}


def show(found: dict[str, dict[str, Any]]) -> None:
    """One line a speed-up."""
    table = Table("speed-up", "mathematics", "largest difference", "loss at the end", "seeds' noise", "holds", box=None)
    for name, told in found.items():
        table.add_row(name, "the same" if told["unchanged"] else "changed", f"{told['largest_difference']:.1e}",
                      f"{told['end_without']:.4f}, {told['end_with']:.4f}", f"{told['noise_over_seeds']:.4f}",
                      "yes" if told["holds"] else "NO")  # fmt: skip
    Console(width=80).print(table)


def main(words: Sequence[str] | None = None) -> int:
    """Runs, shows, writes; 1 where something does not hold."""
    parser = argparse.ArgumentParser(prog="python -m bench.curves", description=__doc__)
    parser.add_argument("--only", action="append", choices=sorted(SPEED_UPS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args(words)
    quiet()
    found: dict[str, dict[str, Any]] = {}
    for name in asked.only or SPEED_UPS:
        found[name] = compared(name, range(asked.seeds), asked.steps)
        told = {"machine": machine(), "versions": origin.versions(), "steps": asked.steps, "seeds": asked.seeds, "speed_ups": found}
        write_whole(asked.out, (json.dumps(told) + "\n").encode())
    show(found)
    print(f"written: {asked.out}")
    return int(not all(told["holds"] for told in found.values()))


if __name__ == "__main__":
    sys.exit(main())
