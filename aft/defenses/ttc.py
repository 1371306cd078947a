"""TTC: a counterattack in pixel space that moves an image away from its own embedding, where it is suspiciously stable under noise.

Shapes: n images, C channels, H height, W width, D embedding width.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from aft.attacks.noise import uniform
from aft.clip.model import ZeroShotModel, at_least_fp32
from aft.clip.stages import Draw, Gate, Stage, Stages
from aft.clip.weights import load_model, named
from aft.defenses.base import Defended, check_gate, embed, gradient_at, length, softened_sign
from aft.defenses.geometry import relative_drift
from aft.errors import ConfigError


class TTC(Defended):
    """Test-time counterattack.

    1. ``d_0`` uniform in [-eps, eps], cut so that ``x + d_0`` is in [0, 1].
    2. ``r = |E_g(x + d_0) - E_g(x)| / |E_g(x)|`` on raw embeddings of the gate's tower.
    3. ``d_{j+1} = cut(d_j + step_size sign grad_d |E(x + d_j) - E(x)|^2)`` for j below ``steps``, cut to the same box.
    4. Where ``r < threshold`` the image is ``x + sum_j w_j d_j`` with ``w_j ~ exp(beta j)``, elsewhere ``x + d_0``: the random noise stays.

    Args:
        model: a plain model.
        eps: of the box, in units of the pixel range.
        step_size: in the same units.
        steps: of the counterattack.
        beta: how much the later steps weigh more.
        threshold: tau above; 0.2 is the published one, for ViT-B/32, and it depends on the tower. None counterattacks every image.
        gate_model: whose tower the gate looks through: the *original* weights where ``model`` was fine-tuned. A model, or what
            ``eval.py --model`` takes; none: the model itself.

    Raises:
        ConfigError: a setting out of range.

    Reference:
        Xing et al., arXiv 2503.03613. The published code draws ``d_0`` from the global generator, so that a result depends on the
        image's place in its batch; here it is counted noise.
    """

    name: ClassVar[str] = "ttc"

    def __init__(
        self, model: ZeroShotModel, *, eps: float | str = "4/255", step_size: float | str = "1/255", steps: int = 2, beta: float = 2.0,
        threshold: float | None = 0.2, gate_model: ZeroShotModel | str | None = None,
    ) -> None:  # fmt: skip
        if steps < 1 or not math.isfinite(beta):
            raise ConfigError(f"steps = {steps}, beta = {beta}: give one step or more, and a finite beta.")
        check_gate(threshold, "threshold")
        gate = load_model(named(gate_model)).to(model.logit_scale) if isinstance(gate_model, str) else gate_model
        if gate is not None and gate.defense is not None:
            raise ConfigError(f"gate_model is itself defended, by {gate.defense['name']}: give its .undefended.")
        super().__init__(
            model, eps=length(eps, "eps"), step_size=length(step_size, "step_size"), steps=int(steps), beta=float(beta),
            threshold=threshold, gate_model=None if gate is None else f"{gate.record.name}:{gate.record.sha256[:12]}",
        )  # fmt: skip
        self.gate_model = gate

    @property
    def forwards_per_image(self) -> int:
        """The image as it came, each step, the result; and two more for a gate."""
        return 2 + int(self.settings["steps"]) + (0 if self.settings["threshold"] is None else 2)

    @property
    def backwards_per_image(self) -> int:
        """One a step."""
        return int(self.settings["steps"])

    @property
    def stages(self) -> Stages:
        """Before the tower."""
        gate = None if self.settings["threshold"] is None else self._gate
        return Stages(pixels=Stage(self._counterattacked, differentiable=False, random=True, gate=gate, smooth=self._smoothly,
                                   otherwise=self._noised))  # fmt: skip

    def _start(self, x_nCHW: Tensor, draw: Draw) -> Tensor:
        """``d_0``."""
        noise_nCHW = 2 * uniform(draw.keys_n, draw.count(), x_nCHW.shape[1:]).to(x_nCHW) - 1
        return self._cut(self.settings["eps"] * noise_nCHW, x_nCHW)

    def _cut(self, delta_nCHW: Tensor, x_nCHW: Tensor) -> Tensor:
        """Into the box, and so that the image stays in [0, 1]."""
        eps = self.settings["eps"]
        return torch.minimum(torch.maximum(delta_nCHW.clamp(-eps, eps), -x_nCHW), 1 - x_nCHW)

    def _noised(self, x_nCHW: Tensor, draw: Draw) -> Tensor:
        """``x + d_0``: what is done where the gate is shut."""
        return (x_nCHW + self._start(x_nCHW, draw)).clamp(0, 1)

    def _gate(self, x_nCHW: Tensor, draw: Draw | None) -> Gate:
        """``-r`` against ``-threshold``: it acts on what is too stable."""
        assert draw is not None
        tower = self.gate_model or self.plain
        return Gate(-relative_drift(embed(tower, x_nCHW), embed(tower, self._noised(x_nCHW, draw))), -self.settings["threshold"])

    def _counterattacked(self, x_nCHW: Tensor, draw: Draw) -> Tensor:
        """The image plus a weighted mean of the counterattack's points, which is a constant to a gradient."""
        return (x_nCHW + self._delta(x_nCHW.detach(), draw, smooth=False)).clamp(0, 1)

    def _smoothly(self, x_nCHW: Tensor, draw: Draw) -> Tensor:
        """The same with a softened sign, to be differentiated twice."""
        return (x_nCHW + self._delta(x_nCHW, draw, smooth=True)).clamp(0, 1)

    def _delta(self, x_nCHW: Tensor, draw: Draw, smooth: bool) -> Tensor:
        """``sum_j w_j d_j``."""
        received_nD = embed(self.plain, x_nCHW)
        weights = step_weights(self.settings["steps"], self.settings["beta"])
        delta_nCHW = self._start(x_nCHW, draw)
        total_nCHW = weights[0] * delta_nCHW
        for weight in weights[1:]:
            gradient_nCHW = gradient_at(lambda at_nCHW: self._distance(at_nCHW, received_nD), x_nCHW + delta_nCHW, smooth)
            direction_nCHW = softened_sign(gradient_nCHW) if smooth else gradient_nCHW.sign()
            delta_nCHW = self._cut(delta_nCHW + self.settings["step_size"] * direction_nCHW, x_nCHW)
            total_nCHW = total_nCHW + weight * delta_nCHW
        return total_nCHW

    def _distance(self, at_nCHW: Tensor, received_nD: Tensor) -> Tensor:
        """Squared distance of raw embeddings, ``[n]``."""
        return (at_least_fp32(self.plain.encode(at_nCHW).embedding_BD) - received_nD).square().sum(-1)


def step_weights(steps: int, beta: float) -> list[float]:
    """``w_j ~ exp(beta j)`` for j = 0 .. steps, of sum 1.

    Example:
        >>> [round(weight, 4) for weight in step_weights(2, 2.0)]
        [0.0159, 0.1173, 0.8668]
    """
    raw = [math.exp(beta * (j - steps)) for j in range(steps + 1)]
    return [weight / sum(raw) for weight in raw]
