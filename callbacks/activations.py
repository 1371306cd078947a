"""Less memory for large image towers: activations of the training forward are computed again instead of held."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
from torch import nn

from aft.errors import ConfigError
from aft.methods.module import ClipModule


class ActivationCheckpointing(L.Callback):
    """Recomputes each block of the image tower in the backward pass of a training step; it costs one more forward a step.

    Attacks are left alone: they run in eval mode with frozen weights, hold less, and would pay the forward at every attack step.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Switches with the tower's mode, just before each forward.

        Raises:
            ConfigError: the tower cannot do it.
        """
        visual = pl_module.model.visual if isinstance(pl_module, ClipModule) else None
        if not hasattr(visual, "set_grad_checkpointing") or not hasattr(visual, "transformer"):
            raise ConfigError(f"{type(visual).__name__} cannot recompute activations: take callbacks.ActivationCheckpointing out.")
        assert isinstance(visual, nn.Module)
        self.handle = visual.transformer.register_forward_pre_hook(partial(by_mode, visual))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """As it was before."""
        if hasattr(self, "handle"):
            self.handle.remove()


def by_mode(visual: nn.Module, blocks: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Recomputes while the tower trains: its frozen parts, as all blocks behind learned prompts, are in eval mode then, too."""
    blocks.grad_checkpointing = visual.training  # type: ignore[assignment]
