"""LORE: robust embeddings under a constraint on the clean ones. B images, D embedding width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aft.errors import ConfigError
from aft.losses import squared_distance
from aft.methods.fare import FARE, EmbeddingDistance
from aft.methods.targets import Targets
from aft.methods.terms import Term, register_term
from aft.methods.views import Views


@dataclass(eq=False)
class CleanConstraint(Term, nn.Module):
    """Lagrangian of ``c(x) = ||f(x) - f_0(x)||^2 - rho ||f_0(x)||^2 <= 0``, with a multiplier ``m >= 0`` that learns by ascent.

    Its value is ``mean( sg(m) c - m sg(c) )``: the image tower descends on ``m c``, and one descent step on the multiplier's parameters is
    an ascent step of the dual. They take a plain gradient step of size ``lr`` of their own after every ``every``-th step of the tower.

    ``dual``: ``network`` gives each sample its own multiplier, ``softplus(MLP(unit f_0(x)))`` with ``hidden`` units; ``scalar`` has one
    for all (dual ascent). ``start`` is the multiplier at first. Its own value is always 0 and is no figure to watch: logged are the penalty
    ``mean(m c)``, the multiplier, the violation (mean of ``max(c, 0)``) and the share of samples that violate.
    """

    rho: float = 0.1
    dual: str = "network"
    hidden: int = 64
    start: float = 1.0
    lr: float = 0.01
    every: int = 1
    needs: ClassVar[frozenset[str]] = frozenset({"teacher_clean", "clean"})
    steps_itself: ClassVar[bool] = True

    def __post_init__(self) -> None:
        nn.Module.__init__(self)
        super().__post_init__()
        if self.dual not in ("network", "scalar"):
            raise ConfigError(f"dual = {self.dual!r} is unknown: write network (a multiplier a sample) or scalar (one for all).")
        for name in ("rho", "start", "lr"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} = {getattr(self, name)} is not above 0: give a positive number.")
        for name in ("hidden", "every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} is below 1: give a whole number of 1 or more.")

    def prepare(self, width: int, seed: int) -> None:
        """Builds the multiplier; its first value is ``start`` for every sample."""
        constant = torch.tensor(self.start).expm1().log()  # softplus of it is start
        if self.dual == "scalar":
            self.bias = nn.Parameter(constant.reshape(1))
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = nn.Sequential(nn.Linear(width, self.hidden), nn.GELU(), nn.Linear(self.hidden, 1))
        with torch.no_grad():
            self.network[2].weight.zero_()  # type: ignore[operator]
            self.network[2].bias.fill_(float(constant))  # type: ignore[operator]

    def multiplier(self, reference_BD: Tensor) -> Tensor:
        """``m``, one a sample, ``[B]``."""
        if self.dual == "scalar":
            return F.softplus(self.bias).expand(len(reference_BD))
        raised_B1: Tensor = self.network(F.normalize(reference_BD, dim=1))
        return F.softplus(raised_B1[:, 0].to(reference_BD.dtype))

    def __call__(self, targets: Targets, views: Views) -> Tensor:
        """The Lagrangian's second part; see the class."""
        reference_BD = targets.teacher_clean.embedding_BD
        allowed_B = self.rho * reference_BD.square().sum(1)
        c_B = squared_distance(views.clean.embedding_BD, reference_BD) - allowed_B
        m_B = self.multiplier(reference_BD)
        beyond_B = c_B.detach() > 0
        self.figures = {
            "penalty": (m_B * c_B).mean(), "multiplier": m_B.mean(), "violation": c_B.clamp_min(0).mean(),
            "violated": beyond_B.float().mean(),
        }  # fmt: skip
        return (m_B.detach() * c_B - m_B * c_B.detach()).mean()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """The multiplier's own step: plain gradient descent on ``-m c``, every ``every``-th time; gradients of other steps are dropped."""
        for parameter in self.parameters():
            if parameter.grad is not None and step % self.every == 0:
                parameter.sub_(self.lr * parameter.grad)
            parameter.grad = None


register_term("clean_constraint", CleanConstraint)


class LORE(FARE):
    """FARE under a constraint: the clean embedding may not leave the original one by more than a share ``rho`` of its squared length.

    ``min_f max_m E[ ||f(x_adv) - f_0(x)||^2 + m(x) (||f(x) - f_0(x)||^2 - rho ||f_0(x)||^2) ]``, ``m >= 0``; the attack maximises the first
    part alone. The multiplier is thrown away after training. Forwards of the image tower in a step with ``k`` attack steps: ``k + 3``.

    Reference:
        Khodabandeh et al., "LORE: Lagrangian-Optimized Robust Embeddings for Visual Encoders", arXiv 2505.18884. The formulation is from
        memory, and no code was found: margin, network and all settings are ours. Its extension to labels is not built.
    """

    method: ClassVar[str] = "lore"
    default_terms: ClassVar[Mapping[str, Term]] = {"embedding_distance": EmbeddingDistance(), "clean_constraint": CleanConstraint()}
