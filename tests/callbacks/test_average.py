"""The average of the weights: its formula, and that it disturbs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from aft.attacks import PGD
from aft.clip import ModelSpec, load_model
from aft.errors import ConfigError
from aft.methods import OptimizerSpec, TeCoA
from callbacks import AveragedWeights
from callbacks.average import trained
from datamodules import Sample
from tests.conftest import MemoryData, make_trainer


def tecoa(tiny: ModelSpec) -> TeCoA:
    """TeCoA with a one-step attack."""
    return TeCoA(tiny, attack=PGD(eps="8/255", step_size="4/255", steps=1), optimizer=OptimizerSpec(lr=1e-3, schedule="constant"))


class Watch(L.Callback):
    """The weights around each validation, and after each step."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []
        self.in_validation: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """After a step."""
        self.steps.append(vector(pl_module))

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """What is validated."""
        self.in_validation.append(vector(pl_module))


def vector(module: torch.nn.Module) -> torch.Tensor:
    """All that is trained, as one vector."""
    return torch.cat([p.detach().flatten().clone() for _, p in trained(module)])


def test_the_average_is_what_is_validated_saved_and_loaded(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Its formula in float64; training sees nothing of it: the weights are bit-equal to a run without."""
    plain, watch, method = tecoa(tiny), Watch(), tecoa(tiny)
    start = vector(method)
    make_trainer(tmp_path, max_steps=4, val_check_interval=2).fit(plain, datamodule=data)
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer = make_trainer(
        tmp_path, max_steps=4, val_check_interval=2, enable_checkpointing=True, callbacks=[AveragedWeights(0.5), watch, saver]
    )
    trainer.fit(method, datamodule=data)
    assert torch.equal(vector(method), vector(plain)) and len(watch.in_validation) >= 2
    expected = start.double()
    for t, weights in enumerate(watch.steps):
        decay = min(0.5, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * weights.double()
    trainer.save_checkpoint(tmp_path / "average.ckpt")
    saved = load_model(ModelSpec(pretrained=str(tmp_path / "average.ckpt")))
    saved.requires_grad_(True)
    average = torch.cat([p.detach().flatten() for p in saved.visual.parameters()])
    assert torch.allclose(average.double(), expected, atol=1e-6) and not torch.allclose(average, vector(method), atol=1e-6)


def test_a_resumed_average_is_that_of_an_uninterrupted_run(tiny: ModelSpec, tmp_path: Path) -> None:
    """To the bit, stopped twice in mid-epoch: average and training weights."""

    def run(folder: str, stops: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        checkpoint = None
        for stop in stops:
            method, average = tecoa(tiny), AveragedWeights(0.5)
            saver = ModelCheckpoint(tmp_path / folder, filename=str(stop), every_n_train_steps=stop)
            trainer = make_trainer(
                tmp_path / folder, max_steps=stop, limit_val_batches=0, enable_checkpointing=True, callbacks=[average, saver]
            )
            sample = Sample(batch_size=16, holdout=0, train_classes=["cat", "dog", "ship"])
            trainer.fit(method, datamodule=sample, ckpt_path=checkpoint)
            checkpoint = str(tmp_path / folder / f"{stop}.ckpt")
        return vector(method), average.average

    (whole, whole_average), (parts, parts_average) = run("whole", [4]), run("parts", [1, 3, 4])
    assert torch.equal(whole, parts)
    assert all(torch.equal(value, parts_average[name]) for name, value in whole_average.items())


def test_a_checkpoint_without_an_average_begins_one(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """So it can be switched on at a resume."""
    first = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    first.fit(tecoa(tiny), datamodule=data)
    first.save_checkpoint(tmp_path / "plain.ckpt")
    average = AveragedWeights(0.5)
    make_trainer(tmp_path, max_steps=4, limit_val_batches=0, callbacks=[average]).fit(
        tecoa(tiny), datamodule=data, ckpt_path=str(tmp_path / "plain.ckpt")
    )
    assert average.steps == 3


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    """Named with its value."""
    with pytest.raises(ConfigError, match="decay"):
        AveragedWeights(decay)
