"""What a training step of each cheaper option costs by the cost model, at any tower: what the table plans by and docs/scaling.md computes.

Costs are floating-point operations of the student's image tower for one image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aft.clip.cost import vit_cost


@dataclass(frozen=True)
class Part:
    """Steps of one kind.

    Args:
        until: share of the planned steps at which they end; infinity for what comes after the plan.
        attack_steps: k; 0 for none.
        free: the training backward moves the perturbation, too.
        drop_patches: share of patches that are dropped.
        side: side of the images, as a share of the tower's own.
    """

    until: float
    attack_steps: int
    free: bool = False
    drop_patches: float = 0.0
    side: float = 1.0

    def operations(self, config: Mapping[str, Any]) -> float:
        """Of a step, for one image: ``k (2 + a) F + (3 - p) F``; ``3 F`` where it is free."""
        patch, own = config["vision_cfg"]["patch_size"], config["vision_cfg"]["image_size"]
        side = max(1, round(self.side * own / patch)) * patch
        kept = max(1, round((1 - self.drop_patches) * (side // patch) ** 2))
        cost = vit_cost(config, side, kept)
        return 3 * cost.forward if self.free else cost.fine_tuning_step(self.attack_steps)


def parts_of(settings: Mapping[str, Any], attack_steps: int, own_side: int) -> list[Part]:
    """The kinds of steps of a row, in their order; the last one has no end.

    Args:
        settings: of the model: ``attack``, ``phases``, ``warm_start``.
        attack_steps: where the settings say nothing of the attack.
        own_side: side of the tower's images, pixels.
    """
    given = settings.get("attack", {}).get("init_args", {}).get("steps", attack_steps)
    free = bool(settings.get("warm_start", {}).get("free", False))

    def part(phase: Mapping[str, Any]) -> Part:
        """One phase."""
        steps = 0 if free or phase.get("clean") else phase.get("attack", {}).get("steps", given)
        side = phase.get("resolution", own_side) / own_side
        return Part(phase["until"], steps, free and not phase.get("clean", False), phase.get("drop_patches", 0.0), side)

    return [*map(part, settings.get("phases", [])), part({"until": float("inf")})]


def planned(parts: Sequence[Part], config: Mapping[str, Any]) -> float:
    """Mean operations of a step over the plan (shares 0 to 1)."""
    total, before = 0.0, 0.0
    for part in parts:
        total += (min(1.0, part.until) - before) * part.operations(config)
        before = min(1.0, part.until)
    return total


def spent(parts: Sequence[Part], config: Mapping[str, Any], steps: float, plan: float) -> float:
    """Operations of the first ``steps`` steps, for one image each, in a run whose plan has ``plan`` steps."""
    return summed([part.operations(config) for part in parts], parts, steps, plan)


def summed(of_a_step: Sequence[float], parts: Sequence[Part], steps: float, plan: float) -> float:
    """What the first ``steps`` steps take, where a step of each kind takes ``of_a_step``."""
    total, before = 0.0, 0.0
    for one, part in zip(of_a_step, parts, strict=True):
        end = min(steps, max(before, round(part.until * plan) if part.until <= 1 else steps))
        total += (end - before) * one
        before = end
    return total
