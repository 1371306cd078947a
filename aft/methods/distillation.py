"""Terms that keep a distribution over classes near another one; PMG-AFT, TRADES, AdvFLYP and TIMA are made of them.

Shapes: B images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from aft.errors import ConfigError
from aft.losses import kl_divergence
from aft.methods.targets import Targets
from aft.methods.terms import Term, one_of, register_term
from aft.methods.views import Views

Direction = Literal["adversarial_first", "adversarial_second"]
Reduction = Literal["mean", "sum"]


@dataclass(eq=False)
class Divergence(Term):
    """Kullback-Leibler divergence between the adversarial image's distribution and another.

    ``adversarial_first`` is ``KL(P_adv || P_other)``, ``adversarial_second`` is ``KL(P_other || P_adv)``. Logits are divided by
    ``temperature``. ``sum`` adds up over all images of an optimiser step, on all processes, in place of the mean.
    """

    direction: Direction = "adversarial_first"
    temperature: float = 1.0
    reduction: Reduction = "mean"
    bank: str = "class"

    @property
    def couples_batch(self) -> bool:  # type: ignore[override]
        """Over the captions of a batch, which are those of all its images."""
        return self.bank == "captions"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("direction", self.direction, ("adversarial_first", "adversarial_second"))
        one_of("reduction", self.reduction, ("mean", "sum"))
        if not self.temperature > 0:
            raise ConfigError(f"temperature = {self.temperature} is not above 0: logits are divided by it.")

    def between(self, adversarial_BK: Tensor, other_BK: Tensor, targets: Targets) -> Tensor:
        """The reduced divergence of two sets of logits."""
        pair = (adversarial_BK, other_BK) if self.direction == "adversarial_first" else (other_BK, adversarial_BK)
        mean = kl_divergence(pair[0] / self.temperature, pair[1] / self.temperature).mean()
        return mean * targets.samples_per_step if self.reduction == "sum" else mean


@dataclass(eq=False)
class TeacherDistillation(Divergence):
    """The student under attack against the frozen teacher on the same adversarial image (PMG-AFT, ``L_general``)."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher_adversarial"})

    def __call__(self, targets: Targets, views: Views) -> Tensor:
        """``KL(P_adv || P_teacher(x_adv))``, or the other way round."""
        teacher_BK = targets.logits(targets.teacher_adversarial, self.bank)
        return self.between(views.logits(views.adversarial, self.bank), teacher_BK, targets)


@dataclass(eq=False)
class CleanConsistency(Divergence):
    """The student under attack against itself on the clean image (PMG-AFT, ``L_clean``; TRADES).

    ``detach`` holds the clean image's distribution constant; else the gradient flows through both.
    """

    detach: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"clean"})

    def __call__(self, targets: Targets, views: Views) -> Tensor:
        """``KL(P_adv || P_clean)``, or the other way round."""
        clean_BK = views.logits(views.clean, self.bank)
        clean_BK = clean_BK.detach() if self.detach else clean_BK
        return self.between(views.logits(views.adversarial, self.bank), clean_BK, targets)


@dataclass(eq=False)
class TextAwareDistillation(Divergence):
    """The student under attack against the teacher on the clean image, both over the original class texts (TIMA, TAKD; form ours)."""

    direction: Direction = "adversarial_second"
    bank: str = "original"
    needs: ClassVar[frozenset[str]] = frozenset({"teacher_clean"})

    def __call__(self, targets: Targets, views: Views) -> Tensor:
        """``KL(P_teacher(x) || P_adv)``, or the other way round."""
        teacher_BK = targets.logits(targets.teacher_clean, self.bank)
        return self.between(views.logits(views.adversarial, self.bank), teacher_BK, targets)


register_term("teacher_distillation", TeacherDistillation)
register_term("clean_consistency", CleanConsistency)
register_term("text_aware_distillation", TextAwareDistillation)
