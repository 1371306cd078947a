"""Checkpoints: the file alone rebuilds the model, and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aft.attacks import PGD
from aft.clip import ModelSpec, load_model
from aft.errors import DataError, WeightsError
from aft.methods import TeCoA
from tests.conftest import MemoryData, make_trainer


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
