"""CLIPure-Cos: embeddings are moved towards the embedding of a blank template, as released, and in two forms that can be trusted.

Shapes: n images, D embedding width; T templates. ``t`` is the unit embedding of the blank template, ``theta`` the angle to it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from aft.clip.model import ZeroShotModel, at_least_fp32
from aft.clip.stages import Draw, Stage, Stages
from aft.defenses.base import Defended
from aft.defenses.geometry import about, has_direction, rotate, split
from aft.errors import ConfigError

#: The 80 prompts of OpenAI's ImageNet evaluation, as open_clip lists them.
IMAGENET_TEMPLATES: tuple[str, ...] = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)


class CLIPureCos(Defended):
    """What the three forms share: the blank template.

    Args:
        model: a plain model.
        templates: prompts with one ``{}`` each, whose class is left empty; none: the 80 of ImageNet. Their mean unit embedding goes
            through the model's text transformation, as a class would.
        **settings: the form's own.
    """

    def __init__(self, model: ZeroShotModel, templates: Sequence[str] | None = None, **settings: Any) -> None:
        super().__init__(model, templates=None if templates is None else list(templates), **settings)

    def blank(self, like: Tensor) -> Tensor:
        """``t``, a unit vector ``[D]``."""
        given = self.settings["templates"]
        bank_1D = self.plain.text_bank([""], IMAGENET_TEMPLATES if given is None else given)
        return F.normalize(bank_1D[0].to(like), dim=0)


class CLIPureCosRelease(CLIPureCos):
    """As released: ``steps`` times ``u <- unit(u + eta g / |G|)``, ``g = t - (u.t) u`` held constant, ``|G|`` the norm *over the batch*.

    An image's result depends on its neighbours, and alone, after an even number of steps, the forward is the identity for angles below
    ``arctan(eta)`` while each step divides the gradient by ``sqrt(1 + eta^2)``: a masked gradient, no defence. It is here to be measured.

    Args:
        model: a plain model.
        eta: the step.
        steps: how many.
        templates: see :class:`CLIPureCos`.

    Raises:
        ConfigError: a step that is not positive, or no step.

    Reference:
        Zhang et al., arXiv 2502.18176, as released; the release runs it in half precision.
    """

    name: ClassVar[str] = "clipure_cos_release"

    def __init__(self, model: ZeroShotModel, *, eta: float = 30.0, steps: int = 10, templates: Sequence[str] | None = None) -> None:
        if not (math.isfinite(eta) and eta > 0) or steps < 1:
            raise ConfigError(f"eta = {eta}, steps = {steps}: give a step above 0 and one step or more.")
        super().__init__(model, templates, eta=float(eta), steps=int(steps))
        warnings.warn("clipure_cos_release: the result of an image depends on its batch, and its gradient is masked; it is here to measure "
                      "what was released. Take clipure_cos_closed for anything else.", stacklevel=2)  # fmt: skip

    @property
    def stages(self) -> Stages:
        """After the tower."""
        return Stages(embedding=Stage(self._released, differentiable=False, batch_coupled=True, smooth=self._exact))

    def _released(self, z_nD: Tensor, x_nCHW: Tensor, draw: Draw | None) -> Tensor:
        """With the inner gradient as a constant."""
        z_nD = at_least_fp32(z_nD)
        return released(z_nD, self.blank(z_nD), self.settings["eta"], self.settings["steps"])

    def _exact(self, z_nD: Tensor, x_nCHW: Tensor, draw: Draw | None) -> Tensor:
        """With its true derivative."""
        z_nD = at_least_fp32(z_nD)
        return released(z_nD, self.blank(z_nD), self.settings["eta"], self.settings["steps"], detached=False)


class CLIPureCosSane(CLIPureCos):
    """Per sample: ``steps`` rotations by ``arctan(step)`` towards ``t``, the last one cut so that the sum is at most ``kappa theta``.

    Args:
        model: a plain model.
        step: the step along the unit tangent.
        steps: how many.
        kappa: share of the angle that is gone at most, in [0, 1).
        templates: see :class:`CLIPureCos`.

    Raises:
        ConfigError: a setting out of range.

    Reference:
        The iteration of arXiv 2502.18176 with the gradient of each sample normalised by itself, and small steps; ours.
    """

    name: ClassVar[str] = "clipure_cos_sane"

    def __init__(
        self, model: ZeroShotModel, *, step: float = 0.02, steps: int = 10, kappa: float = 0.9, templates: Sequence[str] | None = None
    ) -> None:
        if not (math.isfinite(step) and step > 0) or steps < 1:
            raise ConfigError(f"step = {step}, steps = {steps}: give a step above 0 and one step or more.")
        check_kappa(kappa)
        super().__init__(model, templates, step=float(step), steps=int(steps), kappa=float(kappa))

    @property
    def stages(self) -> Stages:
        """After the tower."""
        return Stages(embedding=Stage(self._moved))

    def _moved(self, z_nD: Tensor, x_nCHW: Tensor, draw: Draw | None) -> Tensor:
        """Step by step."""
        size_n1, unit_nD = split(at_least_fp32(z_nD))
        return size_n1 * iterated(unit_nD, self.blank(unit_nD), self.settings["step"], self.settings["steps"], self.settings["kappa"])


class CLIPureCosClosed(CLIPureCos):
    """The same in one rotation, ``phi = min(degrees, kappa theta)``: ``z' = [sin(theta - phi) z + sin(phi) t] / sin(theta)``.

    Args:
        model: a plain model.
        degrees: the rotation; ten steps of 0.02 of the iteration make 11.46.
        kappa: share of the angle that is gone at most, in [0, 1).
        templates: see :class:`CLIPureCos`.

    Raises:
        ConfigError: a setting out of range.

    Reference:
        Closed form of the iteration of arXiv 2502.18176 with each sample's own norm; ours.
    """

    name: ClassVar[str] = "clipure_cos_closed"

    def __init__(self, model: ZeroShotModel, *, degrees: float = 11.46, kappa: float = 0.9, templates: Sequence[str] | None = None) -> None:
        if not 0 <= degrees <= 180:
            raise ConfigError(f"degrees = {degrees} is outside [0, 180]: it is the angle by which embeddings are rotated.")
        check_kappa(kappa)
        super().__init__(model, templates, degrees=float(degrees), kappa=float(kappa))

    @property
    def stages(self) -> Stages:
        """After the tower."""
        return Stages(embedding=Stage(self._moved))

    def _moved(self, z_nD: Tensor, x_nCHW: Tensor, draw: Draw | None) -> Tensor:
        """In one rotation."""
        size_n1, unit_nD = split(at_least_fp32(z_nD))
        return size_n1 * slerp(unit_nD, self.blank(unit_nD), math.radians(self.settings["degrees"]), self.settings["kappa"])


def check_kappa(kappa: float) -> None:
    """Raises ConfigError where a share of the angle is none, or would reach the template itself, where every image is the same."""
    if not 0 <= kappa < 1:
        raise ConfigError(f"kappa = {kappa} is outside [0, 1): 0.9 stops after nine tenths of the angle to the template.")


def released(z_nD: Tensor, target_D: Tensor, eta: float, steps: int, detached: bool = True) -> Tensor:
    """The published iteration on embeddings; lengths stay.

    Args:
        z_nD: embeddings of one batch, which it couples.
        target_D: unit vector t.
        eta, steps: as published 30 and 10.
        detached: the inner gradient is a constant, as published.
    """
    size_n1, unit_nD = split(z_nD)
    for _ in range(steps):
        tangent_nD = target_D - (unit_nD @ target_D)[:, None] * unit_nD
        push_nD = tangent_nD / torch.linalg.vector_norm(tangent_nD).clamp_min(1e-12)
        unit_nD = F.normalize(unit_nD + eta * (push_nD.detach() if detached else push_nD), dim=-1)
    return size_n1 * unit_nD


def iterated(unit_nD: Tensor, target_D: Tensor, step: float, steps: int, kappa: float) -> Tensor:
    """``steps`` rotations by ``arctan(step)``, the last ones cut to ``kappa theta`` in all."""
    start_n, _ = about(unit_nD, target_D)
    left_n, moved_nD = kappa * start_n, unit_nD
    for _ in range(steps):
        angle_n = left_n.clamp(max=math.atan(step))
        _, towards_nD = about(moved_nD, target_D)
        moved_nD = F.normalize(moved_nD + angle_n.tan()[:, None] * towards_nD, dim=-1)
        left_n = left_n - angle_n
    return torch.where(has_direction(start_n)[:, None], moved_nD, unit_nD)


def slerp(unit_nD: Tensor, target_D: Tensor, phi: float, kappa: float) -> Tensor:
    """A rotation by ``min(phi, kappa theta)`` towards the target."""
    theta_n, _ = about(unit_nD, target_D)
    return rotate(unit_nD, target_D, (kappa * theta_n).clamp(max=phi))
