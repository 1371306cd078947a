"""What the searches share: one evaluation of an objective, the record of the best, and the state of the samples under way.

Shapes: B images, C channels, H rows, W columns; n of the B are still under attack, ``rows_n`` (int64) says which.
"""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from aft.attacks.base import Adversarial, Judged, Objective
from aft.errors import InputError


class Evaluation(NamedTuple):
    """One forward pass over n images; ``broken_n`` is False where the loss is not finite, ``finite_n`` is of loss and gradient."""

    loss_n: Tensor
    broken_n: Tensor | None
    finite_n: Tensor


def value(objective: Objective, x_nCHW: Tensor, rows_n: Tensor) -> Evaluation:
    """Loss and verdict without a graph."""
    with torch.no_grad():
        return _evaluation(objective(x_nCHW, rows_n), x_nCHW)


def value_and_gradient(objective: Objective, x_nCHW: Tensor, rows_n: Tensor) -> tuple[Evaluation, Tensor]:
    """Loss, verdict, and the gradient of the *sum* of the losses by the input alone.

    The sum makes each image's gradient its own: a mean would divide it by the batch size, and half precision round it to zero.
    NaN and infinite entries of the gradient become 0, and their images are not ``finite_n``.

    Raises:
        InputError: the loss is not per sample, not fp32 or fp64, or does not depend on the images.
    """
    leaf_nCHW = x_nCHW.detach().requires_grad_(True)
    judged = objective(leaf_nCHW, rows_n)
    seen = _evaluation(judged, x_nCHW)
    gradient_nCHW = torch.autograd.grad(judged.loss_n.sum(), leaf_nCHW, allow_unused=True)[0] if judged.loss_n.requires_grad else None
    if gradient_nCHW is None:
        raise InputError(
            "the loss has no gradient by the images: the objective must neither detach them nor run under no_grad or inference_mode; "
            "for a model that is not differentiable use an adaptive or black-box attack."
        )
    largest_n = torch.linalg.vector_norm(gradient_nCHW, ord=torch.inf, dim=(1, 2, 3))
    return seen._replace(finite_n=seen.finite_n & largest_n.isfinite()), gradient_nCHW.nan_to_num(0, 0, 0)


def _evaluation(judged: Judged, x_nCHW: Tensor) -> Evaluation:
    """Checks what an objective said and cuts it from its graph."""
    loss_n, broken_n = judged
    if loss_n.shape != x_nCHW.shape[:1]:
        raise InputError(f"the loss has shape {tuple(loss_n.shape)} for {len(x_nCHW)} images: return one number an image, not reduced.")
    if loss_n.dtype not in (torch.float32, torch.float64):
        raise InputError(f"the loss is {loss_n.dtype}: take it in fp32, with .float() on the model's output before the loss.")
    finite_n = loss_n.detach().isfinite()
    return Evaluation(loss_n.detach(), None if broken_n is None else broken_n.detach() & finite_n, finite_n)


class Record:
    """What is known so far of each sample of a batch, over all steps and restarts of an attack.

    With ``best`` the point kept is a broken one before any other, then the one with the highest loss; a point whose loss is not finite
    is never kept. Without it only losses are, the newest finite one.
    """

    def __init__(self, x_BCHW: Tensor, best: bool = True) -> None:
        self.best = best
        self.x_BCHW = x_BCHW.clone() if best else x_BCHW
        self.loss_B = x_BCHW.new_full(x_BCHW.shape[:1], torch.nan)
        self.first_B = self.loss_B.clone()
        self.broken_B = torch.zeros_like(self.loss_B, dtype=torch.bool)
        self.finite_B = torch.ones_like(self.broken_B)
        self.judged = False

    def update(self, rows_n: Tensor, x_nCHW: Tensor, seen: Evaluation) -> None:
        """Takes in one evaluation of the samples ``rows_n``."""
        finite_n, old_n, first_n = seen.loss_n.isfinite(), self.loss_B[rows_n], self.first_B[rows_n]
        better_n = finite_n & (old_n.isnan() | (seen.loss_n > old_n)) if self.best else finite_n
        if self.best and seen.broken_n is not None:
            self.judged, was_n = True, self.broken_B[rows_n]
            better_n = (seen.broken_n & ~was_n) | (better_n & (seen.broken_n == was_n))
            self.broken_B[rows_n] = seen.broken_n | was_n
        if self.best:
            self.x_BCHW[rows_n] = torch.where(per_image(better_n), x_nCHW, self.x_BCHW[rows_n])
        self.loss_B[rows_n] = torch.where(better_n, seen.loss_n.to(old_n), old_n)
        self.first_B[rows_n] = torch.where(first_n.isnan() & finite_n, seen.loss_n.to(old_n), first_n)
        self.finite_B[rows_n] &= seen.finite_n

    def open_rows(self) -> Tensor:
        """The samples that are not broken yet, int64 ``[n]``."""
        return (~self.broken_B).nonzero().squeeze(1)

    def result(self, x_BCHW: Tensor | None = None) -> Adversarial:
        """The attack's answer: the points kept, or ``x_BCHW`` in their place."""
        chosen_BCHW = self.x_BCHW if x_BCHW is None else x_BCHW
        return Adversarial(chosen_BCHW, self.loss_B, self.broken_B if self.judged else None, self.loss_B - self.first_B, self.finite_B)


Walk = TypeVar("Walk", bound="Walkers")


@dataclass
class Walkers:
    """The state of n samples in a search: every field is a tensor with one row a sample, so nothing couples neighbours."""

    rows_n: Tensor

    def only(self: Walk, keep_n: Tensor) -> Walk:
        """The state of the samples where ``keep_n`` is true; itself where all are."""
        if bool(keep_n.all()):
            return self
        return replace(self, **{part.name: getattr(self, part.name)[keep_n] for part in fields(self)})


def per_image(flags_n: Tensor) -> Tensor:
    """``[n]`` as ``[n, 1, 1, 1]``."""
    return flags_n[:, None, None, None]
