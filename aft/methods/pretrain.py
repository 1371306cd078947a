"""Contrastive pre-training of image and text tower, clean or adversarial."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from aft.methods.learning_from_captions import LearningFromCaptions
from aft.methods.terms import CaptionContrast, Term

MAX_LOG_SCALE = math.log(100.0)


class ContrastivePretraining(LearningFromCaptions):
    """CLIP's pre-training (arXiv 2103.00020); with an attack on the images it is adversarial pre-training (as in arXiv 2501.09446).

    Both towers and the logit scale learn, by InfoNCE over the global batch in both directions; base weights may be random and the attack
    may be none. Forwards of the image tower in a step with ``k`` attack steps: ``k + 1``; of the text tower: one.

    Args:
        captions_per: ``class`` draws one caption a class (a class-caption cross-entropy), ``image`` one an image (InfoNCE).

    For the other arguments see :class:`LearningFromCaptions`.
    """

    method: ClassVar[str] = "none"
    default_terms: ClassVar[Mapping[str, Term]] = {"caption_contrast": CaptionContrast()}
    trains_text: ClassVar[bool] = True
    keeps_statistics: ClassVar[bool] = False  # random weights have none worth keeping

    def __init__(self, *args: Any, captions_per: Literal["class", "image"] = "class", **kwargs: Any) -> None:
        super().__init__(*args, captions_per=captions_per, **kwargs)

    @property
    def recipe(self) -> str:
        """Not the method's own name where an attack makes it an adversarial one."""
        return self.method if self.attack is None else "adversarial_pretraining"

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Keeps the logit scale at 100 or below, as CLIP does."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.model.clip.get_parameter("logit_scale").clamp_(max=MAX_LOG_SCALE)
