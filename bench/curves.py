"""Loss curves without and with each speed-up: ``python -m bench.curves`` (100 steps, 3 seeds each; about 50 minutes of one core).

MiniCLIP-32 (for channels last a small ResNet) on the embedded sample. Where the mathematics is unchanged both curves run in float64 and
must be equal: in fp32 the signs of small gradients differ by rounding, and the curves part. Where sums or roundings change they run in
fp32, and what counts is the mean loss of the last fifth. Both ways share each seed's images and order, so their difference is taken seed
by seed. The speed-up holds where the mean difference, widened by two of its standard errors, is below twice the standard deviation of
that loss over seeds: it then moves the loss by less than another seed does. Written to ``results/curves.json`` and the table of
``docs/performance.md``. Another speed-up is one line.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from aft.attacks import PGD
from aft.cards import write_whole
from aft.clip.attention import unfold_attention
from aft.clip.matmul import products, use_onednn, use_torch, wanted
from aft.clip.patches import embed_by_convolution
from aft.errors import DataError, ending_calmly
from aft.evaluation import origin
from aft.methods import FARE, AdversarialFineTuning, OptimizerSpec, TeCoA
from aft.methods.teacher_cache import TeacherCache
from bench.machine import hardware, place_of
from bench.page import fenced, fill, table
from bench.speed.__main__ import quiet
from bench.speed.row import Effort
from bench.speed.setting import MINI, ROOT, tiny_resnet, trainer
from callbacks import Compiled
from datamodules import Sample

OUT, PAGE = ROOT / "results" / "curves.json", ROOT / "docs" / "performance.md"
STEPS, SEEDS = 100, 3
#: Of a loss, relative: what two curves of the same mathematics may differ by in float64.
EQUAL = 1e-6
#: Images a step of curves that must be equal, whatever they are made of, and of those that are held against the noise of seeds.
EQUAL_BATCH, NOISY_BATCH = 32, 64

#: Changes a method before it trains, and gives callbacks.
Change = Callable[[AdversarialFineTuning], list[L.Callback]]


def tecoa(seed: int, batch_size: int) -> tuple[AdversarialFineTuning, L.LightningDataModule]:
    """TeCoA with crops and mirror images."""
    return TeCoA(MINI, **settings(seed)), Sample(batch_size=batch_size, augment="crop_flip", seed=seed)


def tecoa_resnet(seed: int, batch_size: int) -> tuple[AdversarialFineTuning, L.LightningDataModule]:
    """TeCoA on a small ResNet; its first weights are the seed's."""
    torch.manual_seed(seed)
    return TeCoA(tiny_resnet(), **settings(seed)), Sample(batch_size=batch_size, augment="crop_flip", seed=seed)


def fare(seed: int, batch_size: int) -> tuple[AdversarialFineTuning, L.LightningDataModule]:
    """FARE on images that are the same each time; with 32 a step its second epoch begins at the 64th."""
    return FARE(MINI, **settings(seed)), Sample(batch_size=batch_size, augment="none", seed=seed)


def settings(seed: int) -> dict[str, Any]:
    """What both methods share."""
    attack = PGD(eps="2/255", step_size="2/255", steps=2)
    return {"attack": attack, "optimizer": OptimizerSpec(name="adamw", lr=3e-4, warmup_steps=10), "seed": seed}


def untouched(method: AdversarialFineTuning) -> list[L.Callback]:
    """As it is."""
    return []


def with_torchs_attention(method: AdversarialFineTuning) -> list[L.Callback]:
    """Without the folded projection."""
    unfold_attention(method.model.visual)
    return []


def with_torchs_convolution(method: AdversarialFineTuning) -> list[L.Callback]:
    """Patches by a convolution."""
    embed_by_convolution(method.model.visual)
    return []


def in_usual_order(method: AdversarialFineTuning) -> list[L.Callback]:
    """The image tower's weights as torch lays them."""
    method.model.visual.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return []


def with_a_cache(method: AdversarialFineTuning) -> list[L.Callback]:
    """As ``cache_teacher: true`` makes it."""
    method.teacher_cache = TeacherCache()
    return []


class Products(L.Callback):
    """Whose fp32 products a run uses; afterwards as before.

    Args:
        use: ``use_onednn`` or ``use_torch``.
    """

    def __init__(self, use: Callable[[], object]) -> None:
        self.use = use

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Switches."""
        self.before = products()
        self.use()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Switches back."""
        {"onednn": use_onednn, "torch": use_torch}[self.before]()


@dataclass(frozen=True)
class SpeedUp:
    """Two ways to train.

    Args:
        without, with_it: what each changes.
        unchanged: whether the mathematics is the same.
        made: method and data, for a seed and a batch size.
        precision: of the trainer with it, where that is what is changed.
        here: whether there is a difference on this machine.
    """

    without: Change
    with_it: Change
    unchanged: bool = True
    made: Callable[[int, int], tuple[AdversarialFineTuning, L.LightningDataModule]] = tecoa
    precision: Any = None
    here: Callable[[], bool] = lambda: True


SPEED_UPS: dict[str, SpeedUp] = {
    "folded": SpeedUp(with_torchs_attention, untouched),
    "patches": SpeedUp(with_torchs_convolution, untouched),
    "channels_last": SpeedUp(in_usual_order, untouched, made=tecoa_resnet),
    "cache_teacher": SpeedUp(untouched, with_a_cache, made=fare),
    "compiled": SpeedUp(untouched, lambda method: [Compiled()]),
    "onednn": SpeedUp(lambda method: [Products(use_torch)], lambda method: [Products(use_onednn)], unchanged=False, here=wanted),
    "bf16": SpeedUp(untouched, untouched, unchanged=False, precision="bf16-mixed"),
}


class Losses(L.Callback):
    """The loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One more."""
        self.values.append(float(outputs["loss"]))


def curve(one: SpeedUp, change: Change, precision: Any, seed: int, steps: int) -> list[float]:
    """The losses of a run."""
    method, data = one.made(seed, EQUAL_BATCH if one.unchanged else NOISY_BATCH)
    losses = Losses()
    trainer(Effort(), steps, [losses, *change(method)], precision=precision).fit(method, datamodule=data)
    return losses.values


def compared(name: str, seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Both curves of every seed, and what is concluded."""
    one = SPEED_UPS[name]
    if not one.here():
        return {"not_measured": "both ways are the same on this machine"}
    base = "64-true" if one.unchanged else "32-true"
    without = [curve(one, one.without, base, seed, steps) for seed in seeds]
    with_it = [curve(one, one.with_it, one.precision or base, seed, steps) for seed in seeds]
    pairs = [pair for curves in zip(without, with_it, strict=True) for pair in zip(*curves, strict=True)]
    told = {
        "unchanged": one.unchanged, "precision": base, "largest_difference": max(abs(b - a) / abs(a) for a, b in pairs),
        **differences(without, with_it, max(1, steps // 5)), "without": without, "with": with_it,
    }  # fmt: skip
    return {**told, "holds": told["largest_difference"] < EQUAL if one.unchanged else within_noise(told)}


def differences(without: list[list[float]], with_it: list[list[float]], last: int) -> dict[str, float]:
    """Of the mean loss of the last steps: both means, the mean paired difference with its standard error, and the noise over seeds.

    Args:
        without, with_it: a curve a seed, the same seeds.
        last: so many steps.
    """
    ends, others = ([statistics.fmean(values[-last:]) for values in curves] for curves in (without, with_it))
    apart = [b - a for a, b in zip(ends, others, strict=True)]
    deviations = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in (ends, apart)]
    return {"end_without": statistics.fmean(ends), "end_with": statistics.fmean(others), "noise_over_seeds": deviations[0],
            "difference": statistics.fmean(apart), "standard_error": deviations[1] / math.sqrt(len(apart))}  # fmt: skip


def within_noise(told: Mapping[str, Any]) -> bool:
    """``|difference| + 2 standard errors < 2 noise``; one seed tells nothing."""
    return bool(abs(told["difference"]) + 2 * told["standard_error"] < 2 * told["noise_over_seeds"])


def in_words(told: Mapping[str, Any]) -> str:
    """One line a speed-up."""
    rows = []
    for name, one in told["speed_ups"].items():
        if "not_measured" in one:
            rows.append([name, *["-"] * 5, one["not_measured"]])
            continue
        rows.append([name, "the same" if one["unchanged"] else "changed", f"{one['largest_difference']:.1e}", f"{one['end_without']:.4f}",
                     f"{one['difference']:+.1e} ({one['standard_error']:.1e})", f"{one['noise_over_seeds']:.4f}",
                     "yes" if one["holds"] else "NO"])  # fmt: skip
    head = ["speed-up", "maths", "apart", "end loss", "with it (s.e.)", "noise", "holds"]
    return f"{told['steps']} steps, {told['seeds']} seeds; {told['machine']['processor']}\n\n{table(head, rows)}"


def older(out: Path, start: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Of the file, what stays beside ``names``.

    Raises:
        DataError: it was measured elsewhere or otherwise.
    """
    if not out.exists():
        return {}
    before = json.loads(out.read_text(encoding="utf-8"))
    differs = [key for key, value in start.items() if before.get(key) != value]
    if differs:
        raise DataError(f"{out} was measured with another {', '.join(differs)}: measure all speed-ups, or give --out FILE for these.")
    return {name: one for name, one in before["speed_ups"].items() if name not in names}


def main(words: Sequence[str] | None = None) -> int:
    """Runs, shows, writes; 1 where something does not hold.

    Raises:
        ConfigError: other steps or seeds over the kept figures.
        DataError: the file was measured elsewhere.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.curves", description=__doc__)
    parser.add_argument("--only", action="append", choices=sorted(SPEED_UPS), help="this one; may be given again. Others in the file stay.")
    parser.add_argument("--steps", type=int, default=STEPS, help="another number needs --out")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="another number needs --out")
    parser.add_argument("--out", type=Path, help=f"where the curves go; the usual place, {OUT.name}, fills the page as well")
    asked = parser.parse_args(words)
    out = place_of(asked.out, OUT, (asked.steps, asked.seeds) != (STEPS, SEEDS))
    quiet()
    start = {"machine": hardware(), "versions": origin.versions(), "steps": asked.steps, "seeds": asked.seeds,
             "products": products(), "threads": torch.get_num_threads(), "images_a_step": [EQUAL_BATCH, NOISY_BATCH]}  # fmt: skip
    found = older(out, start, asked.only) if asked.only else {}
    for name in asked.only or SPEED_UPS:
        found[name] = compared(name, range(asked.seeds), asked.steps)
        told = {**start, "speed_ups": {each: found[each] for each in SPEED_UPS if each in found}}
        write_whole(out, (json.dumps(told) + "\n").encode())
    if out == OUT:
        fill(PAGE, "bench.curves", fenced(in_words(told)))
    print(f"{in_words(told)}\n\nwritten: {out}")
    return int(not all(one.get("holds", True) for one in found.values()))


if __name__ == "__main__":
    with ending_calmly():
        sys.exit(main())
