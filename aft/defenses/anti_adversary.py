"""Anti-adversary: a few steps in pixel space that make the model surer of what it says, before it says it.

Shapes: n images, C channels, H height, W width, K classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from aft.clip.model import Encoding, ZeroShotModel
from aft.clip.stages import Draw, Stage, Stages
from aft.defenses.base import Defended, gradient_at, length, softened_sign
from aft.errors import ConfigError


class AntiAdversary(Defended):
    """``g_{j+1} = g_j - step_size sign grad_g CE(F(x + g_j), argmax F(x))`` from ``g_0 = 0``; the image is ``clip01(x + g)``.

    It lowers the loss of a class, so it must know the classes: those of the bank that ``text_bank`` made last. Logits over another bank
    are refused.

    Args:
        model: a plain model.
        step_size: in units of the pixel range.
        steps: how many.

    Raises:
        ConfigError: a setting out of range; on use, no text bank was made, or logits are asked over another one.

    Reference:
        Alfarra et al., arXiv 2103.14347 (two steps of 0.15, from memory; each point is cut to [0, 1] here).
    """

    name: ClassVar[str] = "anti_adversary"

    def __init__(self, model: ZeroShotModel, *, step_size: float | str = 0.15, steps: int = 2) -> None:
        if steps < 1:
            raise ConfigError(f"steps = {steps}: give one step or more.")
        super().__init__(model, step_size=length(step_size, "step_size"), steps=int(steps))
        self._classes_KD: Tensor | None = None

    @property
    def forwards_per_image(self) -> int:
        """Each step, and the result; the first step's forward also says the class."""
        return 1 + int(self.settings["steps"])

    @property
    def backwards_per_image(self) -> int:
        """One a step."""
        return int(self.settings["steps"])

    def text_bank(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """The model's bank, which also says what the defence's classes are from now on."""
        self._classes_KD = super().text_bank(names, templates)
        return self._classes_KD

    def logits(self, encoding: Encoding, text_KD: Tensor, logit_scale: Tensor | float | None = None) -> Tensor:
        """The model's, over the bank that the defence knows."""
        known_KD = self._classes()
        if text_KD.shape != known_KD.shape or not torch.equal(text_KD.to(known_KD), known_KD):
            raise ConfigError("anti_adversary defended these images for other classes: make the bank with its own text_bank, then embed.")
        return super().logits(encoding, text_KD, logit_scale)

    @property
    def stages(self) -> Stages:
        """Before the tower."""
        return Stages(pixels=Stage(self._surer, differentiable=False, smooth=self._smoothly))

    def _classes(self) -> Tensor:
        if self._classes_KD is None:
            raise ConfigError("anti_adversary must know the classes: call its text_bank(names, templates) before it embeds images.")
        return self._classes_KD

    def _surer(self, x_nCHW: Tensor, draw: Draw | None) -> Tensor:
        """The image plus a push that is a constant to a gradient."""
        return (x_nCHW + self._push(x_nCHW.detach(), smooth=False)).clamp(0, 1)

    def _smoothly(self, x_nCHW: Tensor, draw: Draw | None) -> Tensor:
        """The same with a softened sign, to be differentiated twice."""
        return (x_nCHW + self._push(x_nCHW, smooth=True)).clamp(0, 1)

    def _push(self, x_nCHW: Tensor, smooth: bool) -> Tensor:
        """``g`` after all steps."""
        said_n: Tensor | None = None

        def loss(at_nCHW: Tensor) -> Tensor:
            """Of the class that the model names on the image as it came, ``[n]``."""
            nonlocal said_n
            logits_nK = self.plain.logits(self.plain.encode(at_nCHW), self._classes())
            said_n = logits_nK.detach().argmax(1) if said_n is None else said_n
            return F.cross_entropy(logits_nK, said_n, reduction="none")

        push_nCHW = torch.zeros_like(x_nCHW)
        for _ in range(self.settings["steps"]):
            gradient_nCHW = gradient_at(loss, x_nCHW + push_nCHW, smooth)
            direction_nCHW = softened_sign(gradient_nCHW) if smooth else gradient_nCHW.sign()
            push_nCHW = (x_nCHW + push_nCHW - self.settings["step_size"] * direction_nCHW).clamp(0, 1) - x_nCHW
        return push_nCHW
