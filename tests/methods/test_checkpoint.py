"""Checkpoints: the file alone rebuilds the model, and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from aft.attacks import PGD
from aft.clip import ModelSpec, load_model
from aft.errors import DataError, WeightsError
from aft.methods import OptimizerSpec, TeCoA
from datamodules import Sample
from tests.conftest import MemoryData, make_trainer
from tests.methods.recipes import tecoa


@pytest.fixture
def checkpoint(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> tuple[TeCoA, Path]:
    """Two steps of TeCoA, saved."""
    method = TeCoA(tiny, attack=PGD(eps="2/255", step_size="2/255", steps=1))
    trainer = make_trainer(tmp_path, limit_val_batches=0, enable_checkpointing=True)
    trainer.fit(method, datamodule=data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    return method.eval(), tmp_path / "x.ckpt"


def test_the_file_alone_rebuilds_the_model(checkpoint: tuple[TeCoA, Path], data: MemoryData) -> None:
    """Bit-equal logits, whatever name it is loaded under, and a record of where it came from."""
    method, path = checkpoint
    loaded = load_model(ModelSpec("miniclip32", str(path)))
    bank = loaded.text_bank(data.class_lists["train"], data.templates)
    torch.testing.assert_close(loaded(data.images, bank), method.model(data.images, bank), rtol=0, atol=0)
    record = loaded.record
    assert (record.name, record.layout, record.method, record.eps_trained) == ("tiny", "aft", "tecoa", pytest.approx(2 / 255))
    assert record.base_sha256 == load_model(ModelSpec("tiny")).record.sha256 != record.sha256


def test_it_holds_tensors_and_plain_types_only(checkpoint: tuple[TeCoA, Path]) -> None:
    """``weights_only=True`` reads every checkpoint of ours."""
    contents = torch.load(checkpoint[1], weights_only=True)
    assert contents["aft"]["schema"] == "aft.checkpoint/1" and "hyper_parameters" not in contents


def test_another_schema_is_refused(checkpoint: tuple[TeCoA, Path], tmp_path: Path) -> None:
    """A file of a later version is not read by guess."""
    contents = torch.load(checkpoint[1], weights_only=True)
    contents["aft"]["schema"] = "aft.checkpoint/9"
    torch.save(contents, tmp_path / "later.ckpt")
    with pytest.raises(WeightsError, match="aft.checkpoint/9"):
        load_model(ModelSpec("tiny", str(tmp_path / "later.ckpt")))


def test_going_on_with_other_classes_is_refused(checkpoint: tuple[TeCoA, Path], tiny: ModelSpec, tmp_path: Path) -> None:
    """Labels would mean something else; a new run from the weights, and validation, are free to have other classes."""
    other = MemoryData(names=("cat", "ship", "dog"))
    method = TeCoA(tiny, attack=PGD(eps="2/255", step_size="2/255", steps=1))
    with pytest.raises(DataError, match=r"trained on 3 classes \(cat, dog, ship .* the data has 3 \(cat, ship, dog"):
        make_trainer(tmp_path, max_steps=3).fit(method, datamodule=other, ckpt_path=str(checkpoint[1]))
    make_trainer(tmp_path).validate(method, datamodule=other, ckpt_path=str(checkpoint[1]), verbose=False)
    make_trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(method, datamodule=MemoryData(), ckpt_path=str(checkpoint[1]))


def test_a_resume_takes_this_start_s_optimiser_settings(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Not those that the checkpoint's optimiser state brings along (R8); moments stay."""
    first = make_trainer(tmp_path, max_steps=2, limit_val_batches=0, enable_checkpointing=True)
    first.fit(tecoa(tiny, optimizer=OptimizerSpec(lr=1e-3, weight_decay=0.1, schedule="constant")), datamodule=data)
    first.save_checkpoint(tmp_path / "x.ckpt")
    again = make_trainer(tmp_path, max_steps=3, limit_val_batches=0)
    spec = OptimizerSpec(lr=5e-4, weight_decay=0.2, betas=(0.5, 0.5), schedule="constant")
    again.fit(tecoa(tiny, optimizer=spec), datamodule=data, ckpt_path=str(tmp_path / "x.ckpt"))
    group = again.optimizers[0].param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (5e-4, 0.2, (0.5, 0.5))
    assert int(next(iter(again.optimizers[0].state.values()))["step"]) == 3


def test_interrupted_is_uninterrupted(tiny: ModelSpec, tmp_path: Path) -> None:
    """Four steps, and the same with two stops in the middle of an epoch, end in the same weights, to the bit."""

    def run(folder: str, stops: list[int]) -> dict[str, Tensor]:
        checkpoint = None
        for stop in stops:
            method = tecoa(tiny, optimizer=OptimizerSpec(lr=1e-3, schedule="constant"))
            data = Sample(batch_size=16, holdout=0, train_classes=["cat", "dog", "ship"], augment="crop_flip")
            saver = ModelCheckpoint(
                tmp_path / folder, filename=str(stop), every_n_train_steps=stop
            )  # in the epoch, as a killed run leaves it
            trainer = make_trainer(tmp_path / folder, max_steps=stop, limit_val_batches=0, enable_checkpointing=True, callbacks=[saver])
            trainer.fit(method, datamodule=data, ckpt_path=checkpoint)
            checkpoint = str(tmp_path / folder / f"{stop}.ckpt")
        return {name: value.clone() for name, value in method.model.state_dict().items()}

    whole, parts = run("whole", [4]), run("parts", [1, 3, 4])
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_another_architecture_is_refused_on_resume(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Named, not a list of torch's keys."""
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0, enable_checkpointing=True)
    trainer.fit(tecoa(tiny), datamodule=data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match="the checkpoint has config"):
        make_trainer(tmp_path).fit(tecoa(ModelSpec("miniclip32", "random")), datamodule=data, ckpt_path=str(tmp_path / "x.ckpt"))
