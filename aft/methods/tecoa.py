"""TeCoA: text-guided contrastive adversarial training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from aft.methods.base import AdversarialFineTuning, need_attack
from aft.methods.terms import Alignment, Term


class TeCoA(AdversarialFineTuning):
    """Cross-entropy of adversarial images to their class texts, among all training classes.

    ``L = -(1/B) sum_i log softmax_c( s * <z(x_i + delta_i), t_c> )[y_i]``, and the attack maximises the same loss.
    Forwards of the image tower in a step with ``k`` attack steps: ``k + 1``; of the text tower: none.

    Reference:
        Mao et al., "Understanding Zero-Shot Adversarial Robustness for Large-Scale Models", ICLR 2023, arXiv 2212.07016.

    Where the released code differs (read in its repository):
        * it encodes all class texts anew at each attack step; here they are encoded once;
        * its attack calls ``.backward()`` after ``zero_grad()``, so attack gradients add to the weights' own; not here;
        * the attack runs with the tower in training mode, which moves a ResNet's BatchNorm statistics; here in eval mode (the same for a
          ViT without dropout); its arguments ``restarts`` and ``early_stop`` do nothing;
        * fp16 autocast with a mean-reduced loss and no scaling of the image's gradient; here the loss is summed and logits are fp32;
        * the optimiser steps on fp32 weights through a gradient scaler; the logit scale is clamped to 100 though nothing trains it;
        * images are enlarged by bicubic interpolation without antialiasing, whose kernel is another one than ours with it; its constants
          named after CIFAR-100 are CLIP's mean and standard deviation;
        * the learning rate is 1e-7 unless told otherwise (the paper's 1e-5 is from memory), eps 2/255 with 5 steps where the README has
          1/255 with 2, and the step size is a whole number of grey levels;
        * it chooses the best checkpoint by test sets, of which it sees every 20th batch alone; here by a part of the training set;
        * as published, fine-tuning does not start (a mis-indented line), and installing overwrites files of two packages.
        (RobustVLM's TeCoA is another recipe: AdamW with 1e-5, 10 attack steps, scale 100, other class names; see ``docs/methods.md``.)
    """

    method: ClassVar[str] = "tecoa"
    default_terms: ClassVar[Mapping[str, Term]] = {"alignment": Alignment()}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        need_attack(self.attack, type(self).__name__)
