"""The image tower as one compiled graph: faster steps for a slower first one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning as L
from torch import nn

from aft.errors import ConfigError
from aft.methods.module import ClipModule

#: Steps after the first that say how long a step takes without compilation.
AFTER = 3


class Compiled(L.Callback):
    """Compiles the forward of the image tower (``torch.compile``), in training and in the attack; the step around it stays as it is.

    The attack's passes with frozen weights and the training pass are graphs of their own, made when they are first asked for. After four
    steps it says how much longer the first one took, and logs it as ``speed/compile_seconds``. Names of parameters, checkpoints and the
    text tower stay as they are; a last batch of another size is compiled anew, so let the loader drop it.

    On CPUs where fp32 products go to oneDNN (``aft.clip.matmul``) compiled code multiplies by torch's own, which are slower there: it calls
    ``mm.out`` and ``addmm.out``, which are not replaced. A step can then come out slower than without this callback.

    Args:
        backend: of torch.compile; ``inductor`` needs a C++ compiler (CPU) or Triton (GPU).
        mode: of inductor, such as ``max-autotune``; none: its default.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor", mode: str | None = None) -> None:
        self.backend, self.mode = backend, mode
        self.seconds: list[float] = []
        self.compile_seconds: float | None = None

    @staticmethod
    def _tower(pl_module: L.LightningModule) -> nn.Module:
        if not isinstance(pl_module, ClipModule):
            raise ConfigError(f"{type(pl_module).__name__} has no image tower: take callbacks.Compiled out.")
        return pl_module.model.visual

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Marks the tower; it is compiled at its first call.

        Raises:
            ConfigError: what trains has no image tower.
        """
        self._tower(pl_module).compile(backend=self.backend, mode=self.mode)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """The clock runs for the first few steps."""
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Says once what compilation took."""
        if self.compile_seconds is not None:
            return
        self.seconds.append(time.perf_counter() - self.began)
        if len(self.seconds) > AFTER:
            self.compile_seconds = self.seconds[0] - statistics.median(self.seconds[1:])
            pl_module.log("speed/compile_seconds", self.compile_seconds)
            if trainer.is_global_zero:
                print(f"compiled the image tower: the first step took {self.compile_seconds:.1f} s longer", flush=True)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """As it was before."""
        self._tower(pl_module)._compiled_call_impl = None
