"""What a classification attack maximises: per-sample losses on logits, and the objective that puts them over a model.

Shapes: n images of a batch of B, K classes, T targets an image; ``labels`` and ``targets`` are int64; ``rows_n`` says which of the
B samples the n images are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from aft.attacks.base import Judged
from aft.errors import ConfigError, InputError, unknown_name

LossName = Literal["ce", "margin", "dlr", "dlr_targeted", "margin_targeted"]
TargetedLoss = Literal["dlr_targeted", "margin_targeted"]
CLASSES_NEEDED = {"ce": 2, "margin": 2, "dlr": 3, "dlr_targeted": 4, "margin_targeted": 2}


def ce(logits_nK: Tensor, labels_n: Tensor) -> Tensor:
    """Cross-entropy ``log sum_j exp z_j - z_y``.

    Returns:
        ``[n]``; no reduction, since a mean divides the gradient by the batch size and half precision then rounds it to zero.

    Example:
        >>> import torch
        >>> ce(torch.zeros(1, 4), torch.tensor([2])).exp()
        tensor([4.])
    """
    return functional.cross_entropy(logits_nK, labels_n, reduction="none")


def margin(logits_nK: Tensor, labels_n: Tensor) -> Tensor:
    """Margin ``max_{j != y} z_j - z_y``: positive where the image is misclassified.

    Reference:
        Carlini and Wagner, arXiv 1608.04644 (the logit difference, without its confidence clamp).

    Example:
        >>> import torch
        >>> margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
        tensor([-1.])
    """
    return _best_other(logits_nK, labels_n) - _at(logits_nK, labels_n)


def dlr(logits_nK: Tensor, labels_n: Tensor) -> Tensor:
    """Difference of logits ratio ``-(z_y - max_{j != y} z_j) / (z_(1) - z_(3))``, with ``z_(i)`` the i-th largest; 3 classes or more.

    Neither a shift nor a (positive) scale of the logits changes it. Where ``z_(1) = z_(3)`` the denominator is 1e-12.

    Reference:
        Croce and Hein, arXiv 2003.01690 (DLR).
    """
    _need_classes(logits_nK, "dlr")
    top_n3 = logits_nK.topk(3, dim=1).values
    return margin(logits_nK, labels_n) / (top_n3[:, 0] - top_n3[:, 2] + 1e-12)


def dlr_targeted(logits_nK: Tensor, labels_n: Tensor, targets_n: Tensor) -> Tensor:
    """Targeted DLR ``-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)``, with ``z_(i)`` the i-th largest; 4 classes or more.

    Reference:
        Croce and Hein, arXiv 2003.01690 (targeted DLR).
    """
    _need_classes(logits_nK, "dlr_targeted")
    top_n4 = logits_nK.topk(4, dim=1).values
    spread_n = top_n4[:, 0] - (top_n4[:, 2] + top_n4[:, 3]) / 2
    return (_at(logits_nK, targets_n) - _at(logits_nK, labels_n)) / (spread_n + 1e-12)


def margin_targeted(logits_nK: Tensor, labels_n: Tensor, targets_n: Tensor) -> Tensor:
    """Margin of one wrong class, ``z_t - z_y``: zero on the boundary between the two.

    Example:
        >>> import torch
        >>> margin_targeted(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]), torch.tensor([1]))
        tensor([-2.])
    """
    return _at(logits_nK, targets_n) - _at(logits_nK, labels_n)


_TARGETED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"dlr_targeted": dlr_targeted, "margin_targeted": margin_targeted}
_UNTARGETED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": ce, "margin": margin, "dlr": dlr}


@dataclass(frozen=True, eq=False)
class ClassificationObjective:
    """A classifier under attack: the loss to raise, and whether an image is broken (``argmax z != y``).

    Args:
        logits: maps images ``[n, C, H, W]`` to logits ``[n, K]``; lower precision is raised to fp32 before the loss.
        labels_B: the right classes, int64 ``[B]`` in ``[0, K)``.
        loss: ``ce``, ``margin``, ``dlr`` (3 classes or more); with ``targets_B`` ``dlr_targeted`` (4 or more) or ``margin_targeted``.
        targets_B: classes to go to, int64 ``[B]``; for the targeted losses alone.
        modules: what to freeze and put in eval mode during the attack.

    Raises:
        ConfigError: unknown loss, or a loss and targets that do not fit.
        InputError: labels or targets outside ``[0, K)``, or too few classes for the loss; the first call tells K.
    """

    logits: Callable[[Tensor], Tensor]
    labels_B: Tensor
    loss: LossName = "ce"
    targets_B: Tensor | None = None
    modules: Sequence[nn.Module] = ()
    _highest: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        if self.loss not in CLASSES_NEEDED:
            raise ConfigError(unknown_name("loss", str(self.loss), CLASSES_NEEDED))
        if (self.loss in _TARGETED) != (self.targets_B is not None):
            given = "none" if self.targets_B is None else "some"
            raise ConfigError(
                f"loss = {self.loss!r} came with {given} targets_B: {' and '.join(_TARGETED)} need them, every other loss takes none."
            )
        for name, classes_B in (("labels_B", self.labels_B), ("targets_B", self.targets_B)):
            if classes_B is not None:
                object.__setattr__(self, "_highest", max(self._highest, _highest_class(classes_B, name)))

    def __call__(self, x_nCHW: Tensor, rows_n: Tensor) -> Judged:
        """The loss to be maximised and the verdict of the images; ``rows_n`` (int64) are their places in the batch."""
        logits_nK = self._checked_logits(x_nCHW)
        labels_n = self.labels_B[rows_n]
        if self.targets_B is not None:
            loss_n = _TARGETED[self.loss](logits_nK, labels_n, self.targets_B[rows_n])
        else:
            loss_n = _UNTARGETED[self.loss](logits_nK, labels_n)
        return Judged(loss_n, logits_nK.detach().argmax(1) != labels_n)

    def towards(self, targets_B: Tensor, loss: TargetedLoss = "dlr_targeted") -> "ClassificationObjective":
        """The same classifier under a targeted loss towards ``targets_B``."""
        return replace(self, loss=loss, targets_B=targets_B)

    def wrong_classes(self, x_nCHW: Tensor, rows_n: Tensor, count: int) -> Tensor:
        """The ``count`` most likely wrong classes, most likely first, int64 ``[n, count]``.

        Raises:
            InputError: fewer than ``count + 1`` classes.
        """
        logits_nK = self._checked_logits(x_nCHW).detach()
        if count + 1 > logits_nK.shape[1]:
            raise InputError(
                f"{count} targets need {count + 1} classes or more, the logits have {logits_nK.shape[1]}: "
                f"set targets to {logits_nK.shape[1] - 1} or fewer."
            )
        others_nK = logits_nK.scatter(1, self.labels_B[rows_n, None], -torch.inf)
        return others_nK.topk(count, dim=1).indices

    def _checked_logits(self, x_nCHW: Tensor) -> Tensor:
        logits_nK = self.logits(x_nCHW)
        if logits_nK.ndim != 2 or len(logits_nK) != len(x_nCHW):
            raise InputError(f"logits have shape {tuple(logits_nK.shape)} for {len(x_nCHW)} images: return one row of K logits an image.")
        _need_classes(logits_nK, self.loss)
        if self._highest >= logits_nK.shape[1]:
            raise InputError(
                f"class {self._highest} is outside [0, {logits_nK.shape[1]}): the logits have {logits_nK.shape[1]} columns, "
                "so labels, targets and the model's class list do not belong together."
            )
        return logits_nK if logits_nK.dtype == torch.float64 else logits_nK.float()


def _at(logits_nK: Tensor, classes_n: Tensor) -> Tensor:
    """``z_{c(i)}`` for each row."""
    return logits_nK.gather(1, classes_n[:, None]).squeeze(1)


def _best_other(logits_nK: Tensor, labels_n: Tensor) -> Tensor:
    """``max_{j != y} z_j`` for each row."""
    return logits_nK.scatter(1, labels_n[:, None], -torch.inf).max(1).values


def _need_classes(logits_nK: Tensor, loss: str) -> None:
    if logits_nK.shape[1] < CLASSES_NEEDED[loss]:
        raise InputError(
            f"loss {loss!r} needs {CLASSES_NEEDED[loss]} classes or more, the logits have {logits_nK.shape[1]}: use ce or margin instead."
        )


def _highest_class(classes_B: Tensor, name: str) -> int:
    """The largest class number, after the checks that need no K; one wait for the device."""
    if classes_B.dtype != torch.int64 or classes_B.ndim != 1 or not classes_B.numel():
        raise InputError(f"{name} is {classes_B.dtype} of shape {tuple(classes_B.shape)}: give one int64 class number an image, shape [B].")
    if classes_B.is_meta:  # no values to look at: operations are counted on the meta device
        return 0
    lowest, highest = torch.stack(torch.aminmax(classes_B)).tolist()
    if lowest < 0:
        raise InputError(f"{name} holds {lowest}, outside [0, K): class numbers are 0 to K - 1; leave unlabelled images out.")
    return int(highest)
