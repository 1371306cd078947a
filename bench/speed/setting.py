"""What is measured on: models, images made up in memory, a method in Lightning's trainer, and a clock for two sides.

Shapes: B images, C channels, H rows, W columns, K classes, D embedding width.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from aft.batch import Batch
from aft.clip import ModelSpec
from aft.clip.weights import EMBEDDED
from aft.methods import AdversarialFineTuning
from bench.speed.row import Effort, Found, ratios

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TINY, TINY_RESNET = "bench_tiny", "bench_tiny_resnet"
#: Steps before the first that counts: the first ones allocate, and choose algorithms.
WARM = 2

MINI = ModelSpec("miniclip32")
BASE = ModelSpec("ViT-B-32", "random")  # speed does not need good weights


def tiny() -> ModelSpec:
    """A CLIP with random weights: 0.02 GFLOP an image of 32 x 32, a prompt 0.68 of that, as in ViT-B/32 (``tiny/``)."""
    EMBEDDED[TINY] = HERE / "tiny"
    return ModelSpec(TINY, "random")


def tiny_resnet() -> ModelSpec:
    """A CLIP with random weights whose image tower is a ResNet: four blocks, images of 32 x 32 (``tiny_resnet/``)."""
    EMBEDDED[TINY_RESNET] = HERE / "tiny_resnet"
    return ModelSpec(TINY_RESNET, "random")


class MadeUp(L.LightningDataModule):
    """One batch of random images, again and again, and K classes to tell apart; nothing is augmented.

    Args:
        batch_size: B.
        side: H and W, pixels.
        classes: K.
    """

    augment = "none"

    def __init__(self, batch_size: int, side: int = 32, classes: int = 10) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(0)
        labels_B = torch.arange(batch_size) % classes
        self.batch = Batch(torch.rand(batch_size, 3, side, side, generator=noise), torch.arange(batch_size), labels_B)
        self.batch_size = batch_size
        names = tuple(f"thing number {place}" for place in range(classes))
        self.class_lists, self.val_class_lists = {"train": names}, ()
        self.templates = ("This is a photo of a {}",)
        self.class_phrases = tuple((name, f"{name} of some kind") for name in names)

    def train_dataloader(self) -> DataLoader[Batch]:
        """The batch, more often than any row asks for."""
        return DataLoader([self.batch] * 1000, batch_size=None)  # type: ignore[arg-type]


class SideBySide(L.Callback):
    """Times each training step, and on the same batch what it is compared with: before the step and after it in turn.

    ``seconds["step"]`` is the whole step with all that the trainer does until the next one (writing its log, fetching the batch),
    ``seconds["arithmetic"]`` of it all up to the end of the backward pass (so without the optimiser), then one list for each of the
    others. The first steps are not kept.

    Args:
        others: what to run on the batch, by name.
        device: whose work is waited for.
    """

    def __init__(self, others: Mapping[str, Callable[[Batch], object]], device: torch.device) -> None:
        self.others, self.device = others, device
        self.seconds: dict[str, list[float]] = {name: [] for name in ("step", "arithmetic", *others)}
        self.cpu_seconds: dict[str, list[float]] = {name: [] for name in self.seconds}
        self.left: tuple[float, float] | None = None

    def clock(self) -> tuple[float, float]:
        """Seconds on the wall, and of this process's CPUs, once the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()

    def _note(self, name: str, began: tuple[float, float]) -> None:
        wall, cpu = self.clock()
        self.seconds[name].append(wall - began[0])
        self.cpu_seconds[name].append(cpu - began[1])

    def _add_what_came_between(self) -> None:
        """Since the last step, to that step."""
        if self.left is not None:
            wall, cpu = self.clock()
            self.seconds["step"][-1] += wall - self.left[0]
            self.cpu_seconds["step"][-1] += cpu - self.left[1]
            self.left = None

    def _run_others(self, batch: Batch) -> None:
        for name, other in self.others.items():
            began = self.clock()
            other(batch)
            self._note(name, began)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Every second time the others come first."""
        self._add_what_came_between()
        if batch_idx % 2:
            self._run_others(batch)
        self.began = self.clock()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The gradient is there."""
        self._note("arithmetic", self.began)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """The weights have moved."""
        self._note("step", self.began)
        if not batch_idx % 2:
            self._run_others(batch)
        self.left = self.clock()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The last step is logged."""
        self._add_what_came_between()

    def found(self, above: str, below: str | Sequence[str], told: Mapping[str, Any]) -> Found:
        """The ratio of two sides, repeat by repeat, without the first steps; of several below, their sum counts.

        ``told["median_of_cpu_time"]`` is the same of this process's CPU time, which other programs on the machine disturb less; waiting
        is not in it.
        """
        names = [below] if isinstance(below, str) else below

        def ratio(seconds: Mapping[str, list[float]]) -> list[float]:
            """By one clock."""
            return ratios(seconds[above], [sum(parts) for parts in zip(*(seconds[name] for name in names), strict=True)])

        wall, cpu = ({name: values[WARM:] for name, values in one.items()} for one in (self.seconds, self.cpu_seconds))
        told = {**told, "median_of_cpu_time": statistics.median(ratio(cpu))}
        return Found(ratio(wall), {name: wall[name] for name in (above, *names)}, dict(told))


def trainer(effort: Effort, steps: int, callbacks: list[L.Callback], **settings: Any) -> L.Trainer:
    """A trainer of ``steps`` steps that writes nothing, but where ``settings`` bring a logger."""
    usual: dict[str, Any] = {"gradient_clip_val": 1.0, "default_root_dir": tempfile.gettempdir(), "logger": False}
    return L.Trainer(
        accelerator="gpu" if effort.device == "cuda" else "cpu", devices=1, max_steps=steps, max_epochs=-1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
        use_distributed_sampler=False, callbacks=callbacks, **(usual | settings),
    )  # fmt: skip


def beside(
    method: AdversarialFineTuning, data: MadeUp, others: Mapping[str, Callable[[Batch], object]], effort: Effort, wanted: int,
    also: Sequence[L.Callback] = (), **settings: Any,
) -> SideBySide:  # fmt: skip
    """Times the method's steps and ``others``, one number a repeat.

    Args:
        method: trains on ``data``.
        data: one batch.
        others: each runs once beside each step.
        effort: may cut down the repeats.
        wanted: repeats.
        also: callbacks whose work belongs to the step.
        settings: of the trainer.
    """
    watch = SideBySide(others, effort.on)
    trainer(effort, effort.repeats(wanted) + WARM, [*also, watch], **settings).fit(method, datamodule=data)
    return watch
