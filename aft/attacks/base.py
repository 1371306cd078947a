"""The attack's contract: what an objective says, what an attack gives back, and that it leaves no trace.

Shapes: B images, C channels, H rows, W columns; n of the B are still under attack, ``rows_n`` (int64) says which.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from aft.attacks.guards import naming_out_of_memory, undisturbed
from aft.attacks.threat_model import ThreatModel, threat_model
from aft.errors import ConfigError, InputError


class Judged(NamedTuple):
    """What an objective says of n images.

    ``loss_n``: fp32 or fp64, per sample, to be maximised. ``broken_n``: bool, whether the attack has reached its end; None where the
    objective knows no end (an embedding distance).
    """

    loss_n: Tensor
    broken_n: Tensor | None = None


class Adversarial(NamedTuple):
    """What an attack gives back; nothing in it has a graph.

    Attributes:
        x_BCHW: the adversarial images, inside ball and box; fp32, or fp64 where the clean images were.
        loss_B: their loss with ``keep="best"``; with ``keep="last"`` the last one known, which is that of the last but one iterate.
        broken_B: whether they are broken; None where that is not known (``keep="last"``, or the objective gives no verdict).
        gain_B: ``loss_B`` minus the first loss of the attack, without an extra forward pass.
        finite_B: False where a loss or an input gradient was ever NaN or infinite.
    """

    x_BCHW: Tensor
    loss_B: Tensor
    broken_B: Tensor | None
    gain_B: Tensor
    finite_B: Tensor


class Objective(Protocol):
    """What an attack maximises: ``objective(x_nCHW, rows_n) -> Judged``, per sample, without coupling between samples.

    ``modules`` are put in eval mode and frozen while the attack runs.
    """

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The networks that the objective runs."""

    def __call__(self, x_nCHW: Tensor, rows_n: Tensor) -> Judged:
        """Judges images ``x_nCHW`` in [0, 1], which are the samples ``rows_n`` of the batch."""


@runtime_checkable
class Targetable(Objective, Protocol):
    """An objective that a targeted attack can aim."""

    def wrong_classes(self, x_nCHW: Tensor, rows_n: Tensor, count: int) -> Tensor:
        """The ``count`` most likely wrong classes of each image, most likely first, int64 ``[n, count]``."""

    def towards(self, targets_B: Tensor, loss: Literal["dlr_targeted", "margin_targeted"] = "dlr_targeted") -> Objective:
        """The objective that grows as samples near the classes ``targets_B``; the margin is zero on the boundary."""


class Attack(ABC):
    """``attack(objective, x_BCHW, keys_B) -> Adversarial``: the entry that all attacks share.

    It checks the input, leaves a caller's ``no_grad`` and ``inference_mode``, freezes ``objective.modules``, restores everything (also
    after an exception) and names a lack of memory. Subclasses are frozen dataclasses of settings with ``eps`` and ``norm``, and search.
    """

    name: ClassVar[str]
    eps: float | str
    norm: str

    @property
    def threat(self) -> ThreatModel:
        """The ball that the settings describe."""
        return threat_model(self.norm, self.eps)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The settings as a plain dictionary, for result cards."""

    @abstractmethod
    def search(self, objective: Objective, x_BCHW: Tensor, keys_B: Tensor) -> Adversarial:
        """The attack itself, on checked input and with gradients enabled; call the attack instead."""

    def search_from(self, objective: Objective, x_BCHW: Tensor, keys_B: Tensor, start_BCHW: Tensor) -> Adversarial:
        """The same from given points, where an attack can begin anywhere.

        Raises:
            ConfigError: this one cannot.
        """
        raise ConfigError(f"the attack {self.name} chooses its own start: to begin at given points use aft.attacks.PGD.")

    def __call__(self, objective: Objective, x_BCHW: Tensor, keys_B: Tensor, start_BCHW: Tensor | None = None) -> Adversarial:
        """Attacks a batch.

        Args:
            objective: what to maximise.
            x_BCHW: clean images in [0, 1], any float type; fp64 stays fp64, all others become fp32.
            keys_B: int64 keys of counted noise, from :func:`aft.attacks.sample_keys`.
            start_BCHW: where the attack begins, moved into ball and box first; none: where its settings say.

        Returns:
            The adversarial images and what is known of them.

        Raises:
            ConfigError: a start is given, and the attack takes none.
            InputError: images, keys or start break the contract above.
            RunError: out of memory.
        """
        check_input(x_BCHW, keys_B)
        self.threat.check(x_BCHW)
        what = f"the attack {self.name} ({self.describe().get('steps')} steps)"
        with naming_out_of_memory(what, x_BCHW), undisturbed(objective.modules):
            precise = torch.float64 if x_BCHW.dtype == torch.float64 else torch.float32
            clean_BCHW, keys_B = x_BCHW.detach().to(precise, copy=True), keys_B.to(x_BCHW.device, copy=True)
            if start_BCHW is None:
                return self.search(objective, clean_BCHW, keys_B)
            if start_BCHW.shape != x_BCHW.shape:
                raise InputError(f"start_BCHW has shape {tuple(start_BCHW.shape)} for images {tuple(x_BCHW.shape)}: give a point an image.")
            return self.search_from(objective, clean_BCHW, keys_B, self.threat.project(start_BCHW.detach().to(clean_BCHW), clean_BCHW))


def check_input(x_BCHW: Tensor, keys_B: Tensor) -> None:
    """Checks images and keys once, with one wait for the device.

    Raises:
        InputError: not a batch of float images in [0, 1] with one int64 key each.
    """
    if not x_BCHW.dtype.is_floating_point:
        raise InputError(f"x_BCHW is {x_BCHW.dtype}: an attack works on floats in [0, 1], so pass images.float() / 255.")
    if x_BCHW.ndim != 4 or not x_BCHW.numel():
        raise InputError(f"x_BCHW has shape {tuple(x_BCHW.shape)}: give a batch of one image or more, [B, C, H, W].")
    if keys_B.dtype != torch.int64 or keys_B.shape != x_BCHW.shape[:1]:
        raise InputError(
            f"keys_B is {keys_B.dtype} of shape {tuple(keys_B.shape)} for {len(x_BCHW)} images: "
            f"give int64 [{len(x_BCHW)}], from aft.attacks.sample_keys(seed, epoch, index)."
        )
    if x_BCHW.is_meta:  # no values to look at: operations are counted on the meta device
        return
    low, high = torch.stack(torch.aminmax(x_BCHW.detach())).tolist()
    if not (low >= 0 and high <= 1):
        raise InputError(
            f"x_BCHW holds values from {low:g} to {high:g}: an attack takes finite pixels in [0, 1] before any normalisation, so undo "
            "mean and std, divide grey levels by 255, clamp after a bicubic resize, and drop images with NaN."
        )
