"""Phases of a run: what is cheaper for a while. A schedule of differences from the method's settings, over shares of the run.

Which phase a step is in follows from the step and the length of the run alone, so it is the same on every process and after any resume.
Shapes: M kept patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aft.attacks import Attack, sample_keys, uniform
from aft.clip.reduced import patches_at
from aft.errors import ConfigError, unknown_name

#: In the place of a sample's number, for noise that is a whole step's.
OF_THE_STEP = -1


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What differs up to a share of the run's optimiser steps; after the last phase the run's own settings hold.

    Args:
        until: share of the optimiser steps at which the phase ends, in (0, 1].
        attack: settings laid over those of the method's attack, such as ``{steps: 1, step_size: 2.5/255}``.
        clean: no attack: the clean view stands for the adversarial one.
        drop_patches: share of the patches that the student does not see, in [0, 1); other ones each step, the same ones in the attack and
            in the training forward of a step, for all images (FLIP, arXiv 2212.00794, drops others for each image).
        resolution: side in pixels of what the student's tower sees; the attack still moves the images' own pixels.

    Raises:
        ConfigError: a setting is out of range, or ``attack`` and ``clean`` are both given.
    """

    until: float
    attack: dict[str, Any] = field(default_factory=dict)
    clean: bool = False
    drop_patches: float = 0.0
    resolution: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ConfigError(f"until = {self.until} is outside (0, 1]: it is the share of the run's steps at which the phase ends.")
        if not 0 <= self.drop_patches < 1:
            raise ConfigError(f"drop_patches = {self.drop_patches} is outside [0, 1): it is the share of patches that are not seen.")
        if self.clean and self.attack:
            raise ConfigError(f"a phase is clean, and its attack has {self.attack}: give one of the two.")

    @property
    def sees_less(self) -> bool:
        """Whether the student's tower sees less than the whole image."""
        return self.drop_patches > 0 or self.resolution is not None


#: What holds where no phase does.
PLAIN = Phase(until=1.0)


def phase_at(phases: Sequence[Phase], step: int, total: float) -> Phase:
    """The phase of an optimiser step (0 is the first) in a run of ``total`` steps.

    Example:
        >>> phase_at([Phase(until=0.5, clean=True)], 4, 10).clean, phase_at([Phase(until=0.5, clean=True)], 5, 10).clean
        (True, False)
    """
    return next((phase for phase in phases if step < round(phase.until * total)), PLAIN)


def check_order(phases: Sequence[Phase]) -> None:
    """Raises ConfigError where phases do not follow one another."""
    ends = [phase.until for phase in phases]
    if ends != sorted(set(ends)):
        raise ConfigError(f"phases end at {ends}: each must end later than the one before.")


def attack_in(phase: Phase, attack: Attack | None) -> Attack | None:
    """The attack of a phase: none where it is clean, else the given one with the phase's settings laid over it.

    Raises:
        ConfigError: there is no attack to change, or it has no such setting, or does not allow the value.
    """
    if phase.clean or not phase.attack:
        return None if phase.clean else attack
    settings: Any = attack  # attacks are frozen dataclasses of settings
    if settings is None:
        raise ConfigError(f"a phase changes the attack by {phase.attack}, and there is none: set model.init_args.attack.")
    known = [setting.name for setting in dataclasses.fields(settings)]
    for name in phase.attack:
        if name not in known:
            raise ConfigError(unknown_name(f"setting of {type(attack).__name__} in a phase", name, known))
    changed: Attack = dataclasses.replace(settings, **phase.attack)
    return changed


def check_sight(phases: Sequence[Phase], visual: nn.Module, tokens: bool) -> None:
    """Checks that the tower can see less, where a phase asks for that.

    Args:
        phases: the schedule.
        visual: the student's tower.
        tokens: whether terms compare patch tokens.

    Raises:
        ConfigError: it cannot, or patch tokens would be compared with those of a teacher that sees all.
    """
    for phase in phases:
        if phase.sees_less:
            patches_at(visual, phase.resolution)
            if tokens:
                raise ConfigError("terms compare patch tokens, and a phase has fewer of them than the teacher: leave drop_patches and "
                                  "resolution out of the phases.")  # fmt: skip


def kept_patches(phase: Phase, visual: nn.Module, seed: int, step: int) -> Tensor | None:
    """Places of the patches that are seen in a step, ``int64 [M]``, in order; none for all.

    ``M = max(1, round((1 - drop) N))``, chosen by counted noise: a function of seed and step, the same on every process and device.
    """
    if not phase.drop_patches:
        return None
    count = patches_at(visual, phase.resolution)
    kept = max(1, round((1 - phase.drop_patches) * count))
    drawn_N = uniform(sample_keys(seed, step, torch.tensor([OF_THE_STEP])), 0, (count,))[0]
    return drawn_N.argsort(stable=True)[:kept].sort().values
