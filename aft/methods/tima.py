"""TIMA-style: texts that spread without losing their meaning, and a margin from their distance.

Shapes: B images, K classes, n images under attack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from aft.attacks import Objective
from aft.clip import Encoding
from aft.clip.model import full_precision
from aft.clip.text_transform import TextTransformSpec
from aft.errors import ConfigError
from aft.losses import hyperspherical_energy, kl_divergence, rival_margins
from aft.losses.text import MARGIN_FUNCTIONS, MarginFunction, check_power
from aft.methods.distillation import TextAwareDistillation
from aft.methods.targets import Targets
from aft.methods.tecoa import TeCoA
from aft.methods.terms import Term, one_of, register_term
from aft.methods.views import Views


@dataclass(eq=False)
class MarginAlignment(Term):
    """Cross-entropy in which rivals get a margin from the distance of their *original* texts (TIMA, TAM; form ours)."""

    margin: float = 1.0
    function: MarginFunction = "decreasing"
    needs: ClassVar[frozenset[str]] = frozenset({"labels"})

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("margin function", self.function, MARGIN_FUNCTIONS)
        if not self.margin >= 0:
            raise ConfigError(f"margin = {self.margin} is negative: give 0 or more, in logits.")

    def margins(self, targets: Targets) -> Tensor:
        """What is added to each image's logits, ``[B, K]``."""
        return rival_margins(targets.text["original"], self.margin, self.function)[targets.labels]

    def __call__(self, targets: Targets, views: Views) -> Tensor:
        """``CE(logits(adversarial) + margins, labels)``."""
        return F.cross_entropy(views.logits(views.adversarial) + self.margins(targets), targets.labels)


@dataclass(eq=False)
class TextEnergy(Term):
    """Hyperspherical energy of the tuned class texts: falls as they spread (TIMA, MHE)."""

    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_power(self.power)

    def __call__(self, targets: Targets, views: Views) -> Tensor:
        """``mean_(j != k) 1 / (1 + ||t_j - t_k||^power)``."""
        text_KD = views.text("class")
        with full_precision(text_KD.device):
            return hyperspherical_energy(text_KD, self.power)


@dataclass(eq=False)
class ImageAwareDistillation(Term):
    """The tuned texts keep the original ones' similarities to the teacher's clean images (TIMA, IAKD; form ours)."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher_clean"})

    def __call__(self, targets: Targets, views: Views) -> Tensor:
        """``mean KL( P(teacher image, original texts) || P(teacher image, tuned texts) )``."""
        original_BK = targets.logits(targets.teacher_clean, "original")
        return kl_divergence(original_BK, views.logits(targets.teacher_clean)).mean()


register_term("margin_alignment", MarginAlignment)
register_term("text_energy", TextEnergy)
register_term("image_aware_distillation", ImageAwareDistillation)


class TIMA(TeCoA):
    """TIMA-style: the exact form is unpublished, and what is marked ours is ours.

    ``L = CE_margin(x_adv) + E(T) + KL(P(v0, T0) || P(v0, T)) + KL(P(v0, T0) || P(v_adv, T0))`` with ``T`` the tuned and ``T0`` the original
    class texts, ``v0`` the original image embedding of the clean image, ``E`` the hyperspherical energy. Texts are tuned by
    :class:`aft.clip.text_transform.Residual`, which new classes go through, too, and which is saved with the model. The attack maximises
    the cross-entropy with margins, texts held constant. Forwards of the image tower in a step with ``k`` attack steps: ``k + 2``.

    Reference:
        Ma et al., "TIMA: Text-Image Mutual Awareness for Balancing Zero-Shot Adversarial Robustness and Generalization Ability",
        arXiv 2405.17678; published with changes in AAAI 2026, 40(29). No code was found. Known: the four terms and what they are for,
        the energy with power 2 in its stabilised form. Ours: the margin's form and sign (rivals with *near* texts get more), both
        distillations, all weights, the residual network.
    """

    method: ClassVar[str] = "tima"
    default_text_transform: ClassVar[TextTransformSpec | None] = TextTransformSpec("residual")
    default_terms: ClassVar[Mapping[str, Term]] = {
        "margin_alignment": MarginAlignment(),
        "text_energy": TextEnergy(),
        "image_aware_distillation": ImageAwareDistillation(),
        "text_aware_distillation": TextAwareDistillation(),
    }

    def objective(self, targets: Targets) -> Objective:
        """The cross-entropy with margins; without that term, the plain one."""
        term = self.terms.get("margin_alignment")
        if not isinstance(term, MarginAlignment):
            return super().objective(targets)
        text_KD, margins_BK = targets.text["class"], term.margins(targets)

        def loss(encoding: Encoding, rows_n: Tensor) -> Tensor:
            """With constant texts, ``[n]``."""
            logits_nK = self.model.logits(encoding, text_KD, self.logit_scale) + margins_BK[rows_n]
            return F.cross_entropy(logits_nK, targets.labels[rows_n], reduction="none")

        return self.encoding_objective(loss)
