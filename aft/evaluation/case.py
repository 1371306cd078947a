"""A classifier and some images, as the doubts look at them: what several of them need is computed once.

Shapes: n images, C channels, H rows, W columns, K classes; S forward passes of one search, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from aft.attacks import APGD, PGD, ClassificationObjective, sample_keys, value_and_gradient
from aft.attacks.base import Adversarial, Attack, Judged, Objective
from aft.attacks.objectives import LossName
from aft.attacks.threat_model import Norm
from aft.errors import InputError

#: The search that is looked into takes so many times the steps of the others: whether it has come to rest shows late.
TRACED = 6


@dataclass(frozen=True, eq=False)
class Case:
    """What is doubted.

    Args:
        logits: maps images ``[n, C, H, W]`` in [0, 1] to ``[n, K]``, with a gradient where the caller allows one.
        images_nCHW, labels_n: images that are right when clean and their classes; checks of accuracy count on that.
        eps, norm: the radius at which the figure was measured.
        modules: the networks behind ``logits``.
        steps: of the checks' own attacks.
        seed: of their noise.
        siblings: logits of other models over the same classes, from which images may be carried over.
        robust_n: who withstood the attacks of the figure that is doubted, bool ``[n]``; none: not known.
        undefended: logits of the same weights without any defence; none where there is no defence.
    """

    logits: Callable[[Tensor], Tensor]
    images_nCHW: Tensor
    labels_n: Tensor
    eps: float
    norm: Norm = "linf"
    modules: Sequence[nn.Module] = field(default_factory=tuple)
    steps: int = 20
    seed: int = 0
    siblings: Sequence[Callable[[Tensor], Tensor]] = ()
    robust_n: Tensor | None = None
    undefended: Callable[[Tensor], Tensor] | None = None

    @cached_property
    def keys_n(self) -> Tensor:
        """Keys of counted noise."""
        return sample_keys(self.seed, 0, torch.arange(len(self.labels_n))).to(self.images_nCHW.device)

    @cached_property
    def clean_nK(self) -> Tensor:
        """Logits of the clean images without a graph."""
        return self.look(self.images_nCHW)

    @property
    def classes(self) -> int:
        """K."""
        return self.clean_nK.shape[1]

    @cached_property
    def spread(self) -> float:
        """Standard deviation of the logits over the classes, the mean over images: the scale that differences are measured by."""
        return float(self.clean_nK.double().std(1).mean().clamp_min(1e-12))

    def look(self, images_nCHW: Tensor) -> Tensor:
        """Logits without a graph."""
        with torch.no_grad():
            return self.logits(images_nCHW).detach()

    def right(self, images_nCHW: Tensor) -> Tensor:
        """Whether a fresh forward gives the label, bool ``[n]``."""
        return self.look(images_nCHW).argmax(1) == self.labels_n

    def objective(self, loss: LossName = "ce", logits: Callable[[Tensor], Tensor] | None = None) -> ClassificationObjective:
        """Of an attack on these images."""
        return ClassificationObjective(logits or self.logits, self.labels_n, loss, modules=self.modules)

    def run(self, attack: Attack, loss: LossName = "ce", logits: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Who is still right under this attack, by a fresh forward, bool ``[n]``."""
        return self.right(attack(self.objective(loss, logits), self.images_nCHW, self.keys_n).x_BCHW)

    def pgd(self, steps: int | None = None, restarts: int = 1, eps: float | None = None) -> PGD:
        """The checks' attack: PGD with its best iterate."""
        count = steps or self.steps
        radius = self.eps if eps is None else eps
        return PGD(eps=radius, norm=self.norm, steps=count, relative_step_size=2.5 / count, restarts=restarts, keep="best")

    def gradient(self, loss: LossName = "ce") -> Tensor | None:
        """The gradient of the loss by the clean images, ``[n, C, H, W]``; none where there is none."""
        try:
            rows_n = torch.arange(len(self.labels_n), device=self.images_nCHW.device)
            with torch.enable_grad():
                return value_and_gradient(self.objective(loss), self.images_nCHW, rows_n)[1]
        except (InputError, RuntimeError):
            return None

    @cached_property
    def ce_gradient(self) -> Tensor | None:
        """Of the cross-entropy."""
        return self.gradient()

    @cached_property
    def traced(self) -> Trace | None:
        """A long PGD that drops nobody, with all that it saw; none where the model has no gradient."""
        if self.ce_gradient is None:
            return None
        watched = Watched(self.objective())
        count = TRACED * self.steps
        attack = PGD(eps=self.eps, norm=self.norm, steps=count, relative_step_size=2.5 / count, keep="best", drop_broken=False)
        found = attack(watched, self.images_nCHW, self.keys_n)
        return Trace(found, torch.stack(watched.losses), torch.stack(watched.broken))

    @cached_property
    def white_box_n(self) -> Tensor:
        """Who withstands that PGD, APGD on top, and the attacks of the figure; without a gradient the last alone."""
        withstood_n = torch.ones_like(self.labels_n, dtype=torch.bool) if self.robust_n is None else self.robust_n
        if self.traced is None:
            return withstood_n
        apgd = APGD(eps=self.eps, norm=self.norm, steps=self.steps)
        return withstood_n & self.right(self.traced.found.x_BCHW) & self.run(apgd)


@dataclass(frozen=True, eq=False)
class Trace:
    """A search and what it saw: ``losses_Sn`` and ``broken_Sn`` of every forward pass."""

    found: Adversarial
    losses_Sn: Tensor
    broken_Sn: Tensor


class Watched:
    """An objective over another one that notes what it says."""

    def __init__(self, inner: Objective) -> None:
        self.inner = inner
        self.losses: list[Tensor] = []
        self.broken: list[Tensor] = []

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The inner one's."""
        return self.inner.modules

    def __call__(self, x_nCHW: Tensor, rows_n: Tensor) -> Judged:
        """Asks, and notes."""
        judged = self.inner(x_nCHW, rows_n)
        self.losses.append(judged.loss_n.detach())
        assert judged.broken_n is not None
        self.broken.append(judged.broken_n)
        return judged
