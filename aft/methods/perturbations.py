"""Perturbations that live longer than a step: where an attack begins, and free adversarial training.

Shapes: B images of this process, C channels, H height, W width, N places of the store.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aft.attacks import PGD, Adversarial, Attack, Objective, sample_keys
from aft.clip.model import at_least_fp32
from aft.errors import ConfigError
from aft.methods.distributed import gather_with_gradient

_LEVELS = 2.0**20  # pixels are told apart to this fraction of their range


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """An attack begins where the last one on the same pixels ended, so that it needs fewer steps.

    Args:
        free: no attack at all: the gradient that training computes anyway moves the perturbation by one step of the attack (free
            adversarial training). A step then costs one forward and one backward pass. It learns little unless batches come several
            times in a row: set ``data.init_args.replay``.
        capacity: perturbations that are kept, the newest; at least a global batch. Each takes two bytes a pixel value, in memory and in
            every checkpoint: 24 MiB for 4,096 images of 32 x 32. For warm starts from one pass to the next: the number of images.

    Raises:
        ConfigError: no capacity.

    Reference:
        Warm starts from pass to pass: arXiv 1912.11969 (which moves perturbations along with the augmentation; here they are dropped).
        Free: arXiv 1904.12843 (as released, a batch begins with the perturbations of the batch before, which are other images'; here
        what has none yet begins at random).
    """

    free: bool = False
    capacity: int = 4096

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ConfigError(f"warm_start.capacity = {self.capacity}: keep at least the images of a global batch.")


class PerturbationStore:
    """The newest perturbations of all processes, found by the number of the sample *and* by its clean pixels.

    With another crop or mirror image the pixels are others, and the attack begins as it would without a store: no perturbation is ever
    laid over pixels that it was not made for. Every process holds what all have found, so that the store, and with it a resumed run,
    is the same on any number of processes; that takes one gather of ``2 B C H W`` bytes a step and process.

    Args:
        settings: capacity, and whether training itself moves the perturbations.
    """

    def __init__(self, settings: WarmStart) -> None:
        self.settings = settings
        self.count = 0  # perturbations ever put; the newest ``capacity`` of them are here, number k at place k % capacity
        self.index_N = torch.empty(0, dtype=torch.long)
        self.marks_N = torch.empty(0, dtype=torch.long)
        self.change_NCHW = torch.empty(0, dtype=torch.half)
        self._moving: tuple[PGD, Tensor, Tensor, Tensor] | None = None

    def attack(
        self, attack: Attack, objective: Callable[[], Objective], images_BCHW: Tensor, index_B: Tensor, keys_B: Tensor
    ) -> Adversarial:
        """Runs the attack from what is kept, and keeps what it finds; with ``free``, only looks up where the images are now.

        Args:
            attack: a PGD.
            objective: makes what it maximises; not called with ``free``.
            images_BCHW, index_B: clean images and their numbers.
            keys_B: of counted noise, for images that have no perturbation yet.

        Returns:
            The attack's answer. With ``free`` its images are a leaf with gradient, :meth:`after_backward` moves them, and there is no gain.

        Raises:
            ConfigError: the attack is no PGD.
        """
        if not isinstance(attack, PGD):
            raise ConfigError(f"warm_start goes with aft.attacks.PGD, not with {type(attack).__name__}; FGSM is a PGD of one step.")
        images_BCHW = at_least_fp32(images_BCHW)  # as attacks do: 16-bit pixels are coarser than a perturbation
        start_BCHW = self.starts(attack, images_BCHW, index_B, keys_B)
        if not self.settings.free:
            found = attack(objective(), images_BCHW, keys_B, start_BCHW)
            self.put(images_BCHW, index_B, found.x_BCHW - images_BCHW)
            return found
        x_BCHW = attack.threat.project(start_BCHW, images_BCHW).detach().requires_grad_()
        self._moving = (attack, x_BCHW, images_BCHW, index_B)
        none_B = torch.zeros_like(index_B, dtype=torch.float32)
        return Adversarial(x_BCHW, none_B, None, none_B, torch.ones_like(index_B, dtype=torch.bool))

    def after_backward(self) -> None:
        """With ``free``: one step of the attack along the gradient that the training loss left at the images.

        Raises:
            ConfigError: there is none, because no term looks at the adversarial images.
        """
        if self._moving is None:
            return
        (attack, x_BCHW, images_BCHW, index_B), self._moving = self._moving, None
        if x_BCHW.grad is None:
            raise ConfigError("warm_start.free: no term looks at the adversarial images, so nothing moves them: set free: false.")
        moved_BCHW = attack.climb(x_BCHW.detach(), x_BCHW.grad, images_BCHW)
        self.put(images_BCHW, index_B, moved_BCHW - images_BCHW)

    def starts(self, attack: PGD, images_BCHW: Tensor, index_B: Tensor, keys_B: Tensor) -> Tensor:
        """Where each image begins: at its kept perturbation, or where the attack would begin; not projected yet."""
        fresh_BCHW = attack.start(images_BCHW, keys_B)
        if not self.count:
            return fresh_BCHW
        self._go_to(images_BCHW.device)
        same_BN = (index_B[:, None] == self.index_N) & (marks(images_BCHW)[:, None] == self.marks_N)
        newest_B, place_B = torch.where(same_BN, self._numbers(), -1).max(1)
        kept_BCHW = images_BCHW + self.change_NCHW[place_B].to(images_BCHW.dtype)
        return torch.where((newest_B >= 0)[:, None, None, None], kept_BCHW, fresh_BCHW)

    def put(self, images_BCHW: Tensor, index_B: Tensor, change_BCHW: Tensor) -> None:
        """Keeps the perturbations of all processes' images in place of the oldest; every process must call it.

        Raises:
            ConfigError: the capacity is less than a global batch.
        """
        rows = [gather_with_gradient(value) for value in (index_B, marks(images_BCHW), change_BCHW.detach().half())]
        added, room = len(rows[0]), self.settings.capacity
        if added > room:
            raise ConfigError(f"warm_start.capacity = {room} is less than the {added} images of a step: raise it to {added} or more.")
        if not len(self.index_N):
            self.index_N, self.marks_N = (value.new_full((room,), -1) for value in rows[:2])
            self.change_NCHW = rows[2].new_zeros((room, *rows[2].shape[1:]))
        self._go_to(images_BCHW.device)
        places = torch.arange(self.count, self.count + added, device=images_BCHW.device) % room
        self.index_N[places], self.marks_N[places], self.change_NCHW[places] = rows
        self.count += added

    def _numbers(self) -> Tensor:
        """Which perturbation of all that were ever put lies at each place, ``int64 [N]``; below 0 where none does."""
        places_N = torch.arange(len(self.index_N), device=self.index_N.device)
        return self.count - 1 - (self.count - 1 - places_N) % len(self.index_N)

    def _go_to(self, device: torch.device) -> None:
        self.index_N, self.marks_N, self.change_NCHW = (v.to(device) for v in (self.index_N, self.marks_N, self.change_NCHW))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: tensors and a number."""
        return {"count": self.count, "index": self.index_N, "marks": self.marks_N, "change": self.change_NCHW}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint; one of another capacity begins empty."""
        if len(state["index"]) in (0, self.settings.capacity):
            self.count = state["count"]
            self.index_N, self.marks_N, self.change_NCHW = state["index"], state["marks"], state["change"]


def marks(images_BCHW: Tensor) -> Tensor:
    """A number that tells an image's pixels from others', ``int64 [B]``, equal on every device.

    ``sum_p w_p level_p`` that wraps at 64 bits, with a hash of the place ``p`` as its weight: with weights that grow evenly, a mirror
    image, or a shifted one, of the same balance would have the same sum.
    """
    levels_BP = at_least_fp32(images_BCHW.detach()).mul(_LEVELS).round().long().flatten(1)
    return (levels_BP * sample_keys(0, 0, torch.arange(levels_BP.shape[1], device=levels_BP.device))).sum(1)
