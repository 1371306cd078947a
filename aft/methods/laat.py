"""LAAT: language-driven anchors, spread out, for adversarial training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from aft.clip.text_transform import TextTransformSpec
from aft.losses import cosine
from aft.methods.targets import Targets
from aft.methods.tecoa import TeCoA
from aft.methods.terms import Alignment, Term, register_term
from aft.methods.views import Views


@dataclass(eq=False)
class Smoothness(Term):
    """Minus the cosine of the clean and of the adversarial embedding, both with gradient (LAAT, smoothness); -1 is its least value."""

    needs: ClassVar[frozenset[str]] = frozenset({"clean"})

    def __call__(self, targets: Targets, views: Views) -> Tensor:
        """``-mean cos(f(x), f(x_adv))``."""
        return -cosine(views.clean.embedding_BD, views.adversarial.embedding_BD).mean()


register_term("smoothness", Smoothness)


class LAAT(TeCoA):
    """Cross-entropy of adversarial images to *expanded* class texts, and a smooth embedding.

    ``L = CE(s cos(f(x_adv), A'), y) - beta mean cos(f(x), f(x_adv))`` with ``A'`` the class texts after
    :class:`aft.clip.text_transform.Expansion`, which is fitted on the training classes, applied to new ones, and saved with the model.
    The attack maximises the cross-entropy over ``A'``. Forwards of the image tower in a step with ``k`` attack steps: ``k + 2``.

    Reference:
        Li et al., "Language-Driven Anchors for Zero-Shot Adversarial Robustness", CVPR 2024, arXiv 2301.13096. Whether the paper's
        alignment cross-entropy has another term is not known to us.

    Where this differs: LAAT trains small networks from scratch (Conv4-512, ResNet-12), with logits that are plain cosines
    (``logit_scale: 1``). Here it fine-tunes CLIP's image tower, as later papers compare it, at the scale that is set: with 1,000 classes
    and scale 1 the cross-entropy cannot fall below 4.9 even where every cosine is perfect.
    Text goes through :class:`~aft.clip.text_transform.Expansion` unless ``text_transform`` says otherwise (``{name: identity}`` for none).

    Where the released code differs (read in its repository, MIT licence):
        * the best checkpoint is chosen on test classes;
        * new classes that lie far from the mean direction fold back from 180 degrees on, without a guard;
        * the learning rate falls once, at epoch 60: its second fall is behind a branch that is never reached;
        * adversarial weight perturbation, off by default, is the one of another loss than this one; here there is none;
        * the width of 512 is fixed, and its check of unit length lacks an absolute value;
        * AutoAttack asks for 9 target classes in 5-way tests, where there are 4;
        * minus the target's cosine, an angle or a squared distance can be chosen in place of the cross-entropy.
    """

    method: ClassVar[str] = "laat"
    default_text_transform: ClassVar[TextTransformSpec | None] = TextTransformSpec("expansion")
    default_terms: ClassVar[Mapping[str, Term]] = {"alignment": Alignment(), "smoothness": Smoothness()}
