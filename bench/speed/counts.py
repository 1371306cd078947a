"""What is counted, not timed: what an attack holds in memory, and how often a step calls encoders. The same on every machine.

Shapes: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from aft.attacks import Objective, sample_keys
from aft.clip import ModelSpec
from aft.methods import (
    AGFT,
    FARE,
    LAAT,
    LORE,
    PMGAFT,
    SAFT,
    TGAZSR,
    TIMA,
    TRADES,
    AdversarialFineTuning,
    AdvFLYP,
    ContrastivePretraining,
    SimCLIP,
    TeCoA,
)
from bench.speed.row import Effort, Found
from bench.speed.setting import MadeUp, tiny, trainer
from bench.speed.training import ADAMW, attack_of

#: Forwards of image towers in a step beside the attack's k, by method; none of the text tower but for what is said.
BESIDE_THE_ATTACK: dict[type[AdversarialFineTuning], int] = {
    TeCoA: 1, PMGAFT: 3, TGAZSR: 3, LAAT: 2, TIMA: 2, FARE: 2, SimCLIP: 3, LORE: 3, AGFT: 2, AdvFLYP: 3, SAFT: 1, TRADES: 3,
    ContrastivePretraining: 1,
}  # fmt: skip
#: Those that draw captions for each batch encode them once a step.
TEXTS_A_STEP = {AdvFLYP: 1, ContrastivePretraining: 1}


class Held:
    """Bytes that autograd holds while it is open: each storage once, those of weights left out."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = {value.untyped_storage().data_ptr() for value in [*module.parameters(), *module.buffers()]}
        self.storages: dict[int, Tensor] = {}  # the tensors are kept, so that no address is used twice
        self.hooks = saved_tensors_hooks(self._pack, lambda saved: saved)

    def _pack(self, saved: Tensor) -> Tensor:
        place = saved.untyped_storage().data_ptr()
        if place not in self.weights:
            self.storages[place] = saved
        return saved

    @property
    def bytes(self) -> int:
        """In all."""
        return sum(saved.untyped_storage().nbytes() for saved in self.storages.values())

    def __enter__(self) -> Held:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)


def held_by_attack(clip: ModelSpec, batch_size: int) -> Callable[[Effort], Found]:
    """Bytes held in a step of our attack over those of the same forward and loss with weights that keep their gradients on."""

    def measure(effort: Effort) -> Found:
        """On the CPU, whatever device the other rows are on: bytes are the same."""
        method = TeCoA(clip, attack=attack_of(1), optimizer=ADAMW)
        data = MadeUp(batch_size, method.model.record.resolution)
        text_KD = method.model.text_bank(data.class_lists["train"], data.templates)
        assert data.batch.labels is not None and method.attack is not None
        objective: Objective = method._class_objective(text_KD, data.batch.labels, None)
        with Held(method.model) as ours:
            method.attack(objective, data.batch.images, sample_keys(0, 0, data.batch.index))
        method.model.visual.requires_grad_(True)
        with Held(method.model) as trainable:
            leaf_BCHW = data.batch.images.clone().requires_grad_(True)
            loss_B = objective(leaf_BCHW, data.batch.index).loss_n
            torch.autograd.grad(loss_B.sum(), leaf_BCHW)
        parts = {"frozen_bytes": [float(ours.bytes)], "trainable_bytes": [float(trainable.bytes)]}
        return Found([ours.bytes / trainable.bytes], parts, {"model": clip.name, "batch_size": batch_size})

    return measure


class Counted(L.Callback):
    """Forwards of image towers and of the text tower since the second step began: the first one also encodes the class texts."""

    def __init__(self) -> None:
        self.calls = {"image": 0, "text": 0}

    def _watch(self, tower: nn.Module, which: str) -> None:
        def seen(*_: object) -> None:
            """One forward more."""
            self.calls[which] += 1

        tower.register_forward_pre_hook(seen)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Watches all towers from the second step on."""
        assert isinstance(pl_module, AdversarialFineTuning)
        if batch_idx == 1:
            self._watch(pl_module.model.visual, "image")
            self._watch(pl_module.model.clip.get_submodule("transformer"), "text")
            if pl_module.teacher is not None:
                self._watch(pl_module.teacher.visual, "image")


def encoder_calls(effort: Effort) -> Found:
    """Calls that are too many or too few, in a step of every method."""
    steps, told, off = 2, {}, 0
    for kind, beside in BESIDE_THE_ATTACK.items():
        counted = Counted()
        method = kind(tiny(), attack=attack_of(steps), optimizer=ADAMW)
        trainer(Effort(), 2, [counted]).fit(method, datamodule=MadeUp(4))
        expected = {"image": steps + beside, "text": TEXTS_A_STEP.get(kind, 0)}
        told[kind.__name__] = {"calls": counted.calls, "expected": expected}
        off += sum(abs(counted.calls[which] - expected[which]) for which in expected)
    return Found([float(off)], {}, {"attack_steps": steps, "methods": told})
