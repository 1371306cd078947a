"""What adversarial pre-training of a large CLIP costs with each cheaper option: ``python -m bench.pretraining_cost``.

It writes the computed part of ``docs/scaling.md`` from the cost model and from what ``bench.cheaper_training`` measured; a test compares
the page with the computation.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import yaml

from aft.clip.cost import text_forward, vit_cost
from aft.errors import ending_calmly
from bench.cheaper_report import Yardstick, kept, reached
from bench.cheaper_training import RECIPE, RESULTS
from bench.page import fill
from bench.runs import HERE
from bench.step_cost import Part, parts_of, planned, spent

PAGE = HERE / "docs" / "scaling.md"
#: What is computed for. Pairs and passes: the size of LAION-400M and of CLIP's own data, and CLIP's 32 passes.
TOWER, PAIRS, PASSES = "ViT-B-16", 400e6, 32
#: GPU hours (A100, 40 GB) that open_clip's ViT-B/16 took for so many passes over LAION-400M without an attack: its docs/PRETRAINED.md.
PUBLISHED_HOURS = 10_700
#: Operations a second that a GPU achieves over a whole step, if all goes well on a newer one in bf16: an assumption.
HOPED_FOR = 400e12


@dataclass(frozen=True)
class Estimate:
    """Of one option, for one pass of the baseline over all pairs.

    Args:
        of_a_step: operations for one pair, mean over the plan.
        no_loss: operations in all if the option needed as many images as the baseline.
        measured: the same if it needed as many more, or fewer, as it did on MiniCLIP; none where it did not get there or is not measured.
        images: how many times the baseline's images that is.
    """

    of_a_step: float
    no_loss: float
    measured: float | None = None
    images: float | None = None


def with_text(operations: float, steps: float, config: Mapping[str, Any]) -> float:
    """Adds the text tower, which learns from one text a pair and step: ``3 F_text``."""
    return operations + steps * 3 * text_forward(config)


def estimate(
    parts: Sequence[Part], config: Mapping[str, Any], row: Mapping[str, Any] | None = None, yard: Yardstick | None = None, most: float = 0.0
) -> Estimate:
    """Carries an option over to another tower: its kinds of steps and the images that it needed stay, the cost of each step is the tower's.

    Args:
        parts: the option's kinds of steps.
        config: of the large model.
        row: what was measured of the option, if it was.
        yard: the measured baseline.
        most: times the baseline's cost that a row could spend.
    """
    of_a_step = with_text(planned(parts, config), 1, config)
    mark = None if row is None or yard is None else reached(row["marks"], yard.robust, most * yard.cost, by="cost")
    if mark is None or row is None or yard is None:
        return Estimate(of_a_step, PAIRS * of_a_step)
    whole = with_text(spent(parts, config, mark["step"], row["plan"]), mark["step"], config) * row["batch"]
    of_the_baseline = yard.crossing * yard.images  # to the first evaluation that is good enough, as of the option
    return Estimate(of_a_step, PAIRS * of_a_step, PAIRS * whole / of_the_baseline, mark["images"] / of_the_baseline)


def estimates(recipe: Mapping[str, Any], results: Path) -> dict[str, Estimate]:
    """Of plain pre-training, of the baseline, and of every row of the recipe that changes operations."""
    config, rows = open_clip.get_model_config(TOWER), kept(results)
    attack = recipe["shared"]["model"]["init_args"]["attack"]["init_args"]["steps"]
    side = 32  # MiniCLIP's, which the recipe's resolutions are shares of
    plain, base = [Part(float("inf"), 0)], parts_of({}, attack, side)
    found = {"no attack": estimate(plain, config), "baseline": estimate(base, config)}
    yard = Yardstick.of(rows)
    for name, row in recipe["rows"].items():
        if "precision" in row.get("trainer", {}):  # as many operations, and both rates are those of half precision already
            continue
        found[name] = estimate(parts_of(row.get("model", {}), attack, side), config, rows.get(name), yard, recipe["most"])
    return found


def published_rate() -> float:
    """Operations a second and GPU of the published run, from its hours and the cost model."""
    plain = estimate([Part(float("inf"), 0)], open_clip.get_model_config(TOWER))
    return PASSES * plain.no_loss / (PUBLISHED_HOURS * 3600)


def gpu_hours(operations: float, passes: float = 1) -> str:
    """At what is hoped for, to what was achieved; two digits."""
    low, high = (passes * operations / speed / 3600 for speed in (HOPED_FOR, published_rate()))
    return f"{two_digits(low)} to {two_digits(high)}"


def two_digits(value: float) -> str:
    """1,234 as 1,200."""
    return f"{float(f'{value:.2g}'):,.0f}"


def computed(recipe: Mapping[str, Any], results: Path) -> str:
    """The figures of the page, as Markdown."""
    config, found, rows = open_clip.get_model_config(TOWER), estimates(recipe, results), kept(results)
    cost, text = vit_cost(config), text_forward(config)
    base = found["baseline"].no_loss
    lines = [
        f"{TOWER} at {config['vision_cfg']['image_size']} px: F = {cost.forward / 1e9:.1f} GF, a = {cost.attention_share:.3f}, "
        f"p = {cost.patch_share:.3f}; text F_t = {text / cost.forward:.3f} F.",
        f"The published run achieved {published_rate() / 1e12:.0f} TF/s on each GPU.",
        "",
        f"| option | GF a pair | of the baseline's | images it needed | in all, of the baseline's | GPU hours a pass | {PASSES} passes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        measured = one.measured is not None
        state = "" if name in ("no attack", "baseline") else "not measured yet" if name not in rows else "not reached"
        images, total = (f"{one.images:.2f}", f"{one.measured / base:.2f}") if measured else (state, "")
        hours = [gpu_hours(one.measured if measured else one.no_loss, passes) + ("" if measured or not state else " (no loss)")
                 for passes in (1, PASSES)]  # fmt: skip
        lines.append(f"| {name} | {one.of_a_step / 1e9:.0f} | {one.no_loss / base:.2f} | {images} | {total} | {' | '.join(hours)} |")
    return "\n".join(lines)


def main() -> None:
    """Writes the figures into the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    recipe = yaml.safe_load(RECIPE.read_text())
    fill(PAGE, "bench.pretraining_cost", computed(recipe, RESULTS))


if __name__ == "__main__":
    with ending_calmly():
        main()
