"""TGA-ZSR and Comp-TGA: text-guided attention stays where the original model looks.

Shapes: B images, N patches, D embedding width, S side of the map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from aft.clip import Encoding
from aft.errors import ConfigError
from aft.losses import map_distance, text_guided_attention
from aft.losses.attention import Axis
from aft.methods.targets import Targets
from aft.methods.tecoa import TeCoA
from aft.methods.terms import Alignment, Term, Weight, one_of, register_term
from aft.methods.views import Views


@dataclass(eq=False)
class AttentionTerm(Term):
    """Distance of the student's text-guided attention from the frozen original's on the clean image.

    ``axis`` is what norms are taken over (``channel``: the paper; ``token``: as released, class token included). ``size`` is the side of
    the enlarged map in pixels, by which the term grows; none means the size of the images that the tower sees. ``complement`` multiplies
    the map by one minus the map of "This is not a photo of a ..." (Comp-TGA).
    """

    axis: Axis = "channel"
    size: int | None = None
    complement: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("axis", self.axis, ("channel", "token"))
        if self.size is not None and self.size < 1:
            raise ConfigError(f"size = {self.size}: give the side of the attention map in pixels, such as 224.")

    def distance(self, student: Encoding, targets: Targets) -> Tensor:
        """The mean over the batch of ``||A(student) - A(teacher, clean)||_2``."""
        return map_distance(self._map(student, targets), self._map(targets.teacher_clean, targets)).mean()

    def _map(self, encoding: Encoding, targets: Targets) -> Tensor:
        tokens_BND = encoding.tokens_BND
        assert tokens_BND is not None

        def map_of(bank: str) -> Tensor:
            """Of each image's text in a bank."""
            text_BD, size = targets.text[bank][targets.labels], self.size or targets.resolution
            return text_guided_attention(tokens_BND, text_BD, size, self.axis, encoding.embedding_BD)

        return map_of("class") * (1 - map_of("negation")) if self.complement else map_of("class")


@dataclass(eq=False)
class AttentionRefinement(AttentionTerm):
    """Keeps the attention under attack where the original model looks on the clean image (TGA-ZSR, ``L_AR``)."""

    weight: Weight = 0.08
    needs: ClassVar[frozenset[str]] = frozenset({"labels", "tokens", "teacher_clean"})

    def __call__(self, targets: Targets, views: Views) -> Tensor:
        """``mean ||A(student, x_adv) - A(teacher, x)||_2``."""
        return self.distance(views.adversarial, targets)


@dataclass(eq=False)
class AttentionConstraint(AttentionTerm):
    """Keeps the attention on clean images where the original model looks (TGA-ZSR, ``L_AMC``)."""

    weight: Weight = 0.05
    needs: ClassVar[frozenset[str]] = frozenset({"labels", "tokens", "teacher_clean", "clean"})

    def __call__(self, targets: Targets, views: Views) -> Tensor:
        """``mean ||A(student, x) - A(teacher, x)||_2``."""
        return self.distance(views.clean, targets)


register_term("attention_refinement", AttentionRefinement)
register_term("attention_constraint", AttentionConstraint)


class TGAZSR(TeCoA):
    """TeCoA, and the map of where the class's text fits the image stays that of the original model on the clean image.

    ``L = CE(x_adv) + 0.08 mean ||A(x_adv) - A_0(x)||_2 + 0.05 mean ||A(x) - A_0(x)||_2`` with ``A`` the cosines of patch tokens and class
    text, scaled to [0, 1] and enlarged; the attack maximises the cross-entropy alone. With ``complement`` and weights 0.10 and 0.07 it is
    Comp-TGA (``configs/methods/comp_tga.yaml``). Forwards of the image tower in a step with ``k`` attack steps: ``k + 3``.

    The distances grow with the side of the enlarged map: weights published for 224 pixels weigh a seventh at 32 pixels; ``size: 224``
    gives them their published size on any tower. How coarse the map is, is decided by the patch grid (7 x 7 for a ViT-B/32). ResNet
    towers, which the papers leave out, take each place of the last map through the attention pool's value and output projections: an
    extension of ours.

    Reference:
        Yu et al., "Text-Guided Attention is All You Need for Zero-Shot Robustness in Vision-Language Models", NeurIPS 2024,
        arXiv 2410.21802. Comp-TGA: "Complementary Text-Guided Attention for Zero-Shot Adversarial Robustness", arXiv 2603.18598.

    Where the released code differs (read in its repository; ``configs/methods/tga_zsr_released.yaml``: ``axis: token``):
        * tokens are divided by each channel's norm over all tokens, the class token included, so the map holds no cosines; the ports of
          AGFT and AdvFLYP do the same;
        * the min-max has no guard, so a constant map gives NaN; its gradient runs through minimum and maximum (here, too);
        * Comp-TGA seeds torch in every step, so that the attack's random start is always the same; maps are enlarged with antialiasing,
          and its texts are multiplied by the logit scale, which the min-max takes out again;
        * the frozen model's maps are computed with a graph that nobody uses; ``--arch`` changes nothing, the tower is always a ViT-B/32;
        * ImageNet's texts are kept in a file by the number of classes alone, in fp16, whatever template and model;
        * L1 and cosine in place of the distance, and GradCAM maps, can be chosen; here only what the paper reports;
        * as published it does not run: a misspelt logit scale, a missing import, calls with wrong arguments;
        * its TeCoA for comparison has a tenth of its learning rate (1e-5 against 1e-4); the last epoch is taken, none is chosen.
        * AGFT's port swaps the two weights and takes a mean absolute difference: another loss.
    """

    method: ClassVar[str] = "tga_zsr"
    default_terms: ClassVar[Mapping[str, Term]] = {
        "alignment": Alignment(),
        "attention_refinement": AttentionRefinement(),
        "attention_constraint": AttentionConstraint(),
    }
