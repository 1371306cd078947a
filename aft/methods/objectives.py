"""What an attack maximises where it is no classification: a loss of the student's encoding. n images of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from aft.attacks import Judged
from aft.clip import Encoding, ZeroShotModel


@dataclass(frozen=True, eq=False)
class EncodingObjective:
    """``loss(encoding, rows)``, one value a sample; it knows no end, so nothing is ever broken.

    Args:
        model: the student.
        loss: of the encoding of n images and their places ``rows_n`` in the batch; ``[n]``, at least fp32.
    """

    model: ZeroShotModel
    loss: Callable[[Encoding, Tensor], Tensor]

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The student."""
        return (self.model,)

    def __call__(self, x_nCHW: Tensor, rows_n: Tensor) -> Judged:
        """The loss of these images."""
        return Judged(self.loss(self.model.encode(x_nCHW).precise, rows_n))
