"""Contrastive pre-training: what is true of what, what learns, and the adversarial variant."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from aft.attacks import PGD
from aft.batch import Batch
from aft.clip import ModelSpec
from aft.errors import ConfigError, DataError
from aft.losses import caption_contrast
from aft.methods import ContrastivePretraining, OptimizerSpec
from aft.methods.captions import drawn_captions, given_captions
from aft.methods.distributed import gather_with_gradient, leave_process_group
from tests.conftest import Calls, MemoryData, make_trainer


def pretraining(**settings: Any) -> ContrastivePretraining:
    """From random weights."""
    return ContrastivePretraining(ModelSpec("tiny", "random"), **({"optimizer": OptimizerSpec(lr=2e-3)} | settings))


@pytest.mark.parametrize("per", ["class", "image"])
def test_a_caption_is_true_of_every_class_that_has_its_phrase(data: MemoryData, per: str) -> None:
    """``thing`` is true of all three classes, a name of one; the words of the caption hold the phrase."""
    labels = data.batches()[0].labels
    assert labels is not None
    keys = "0/0" if per == "class" else [f"0/0/{i}" for i in range(len(labels))]
    captions = drawn_captions(data.class_phrases, labels, keys, ("a photo of a {}.", "{}"), 0.3)
    texts, truth = captions.texts, captions.truth_BM
    assert len(texts) == (3 if per == "class" else len(labels)) and truth.shape == (len(labels), len(texts))
    own = labels if per == "class" else torch.arange(len(labels))
    assert truth[torch.arange(len(labels)), own].all()
    for text, column in zip(texts, truth.T, strict=True):
        true_of = {int(y) for y in labels[column]}
        assert true_of == {0, 1, 2} if "thing" in text else len(true_of) == 1
    again = drawn_captions(data.class_phrases, labels, keys, ("a photo of a {}.", "{}"), 0.3)
    assert again.texts == texts  # a function of the keys alone
    if per == "image":  # whoever computes it: half of the images have the same captions as among all
        assert drawn_captions(data.class_phrases, labels[4:], keys[4:], ("a photo of a {}.", "{}"), 0.3).texts == texts[4:]


def test_the_texts_of_a_step_are_encoded_once_and_class_texts_where_they_are_logged(data: MemoryData, tmp_path: Path) -> None:
    """Four steps with a log at every second: four passes over captions, two over class texts, and one when the run begins."""
    method = pretraining(attack=PGD(eps="4/255", step_size="4/255", steps=1))
    calls = Calls(method.model.clip.get_submodule("transformer"))
    trainer = make_trainer(tmp_path, max_steps=4, limit_val_batches=0, log_every_n_steps=2)
    trainer.fit(method, datamodule=data)
    assert calls.count == 7 and 0 <= float(trainer.callback_metrics["train/adversarial_accuracy"]) <= 1


@pytest.mark.parametrize("attack", [None, PGD(eps="4/255", step_size="4/255", steps=2)])
def test_both_towers_and_the_scale_learn_and_the_loss_falls(data: MemoryData, tmp_path: Path, attack: PGD | None) -> None:
    """Clean: one image forward a step; adversarial: k + 1."""
    method = pretraining(attack=attack)
    before, calls = copy.deepcopy(method.model.clip.state_dict()), Calls(method.model.visual)
    losses: list[float] = []
    method.on_train_batch_start = lambda batch, batch_idx: None  # type: ignore[method-assign]
    original = method.training_step
    method.training_step = lambda batch, batch_idx: (losses.append(float((loss := original(batch, batch_idx)).detach())), loss)[1]  # type: ignore[method-assign]
    make_trainer(tmp_path, max_steps=24, limit_val_batches=0).fit(method, datamodule=data)
    after = method.model.clip.state_dict()
    assert not [name for name in before if torch.equal(before[name], after[name]) and name not in ("attn_mask",)]
    assert calls.count == 24 * (1 if attack is None else 3)
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    assert method.recipe == ("none" if attack is None else "adversarial_pretraining")


def test_the_scale_stays_at_100_or_below(data: MemoryData, tmp_path: Path) -> None:
    """As in CLIP."""
    method = pretraining()
    with torch.no_grad():
        method.model.clip.get_parameter("logit_scale").fill_(10.0)
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(method, datamodule=data)
    assert float(method.model.logit_scale.detach()) == pytest.approx(100.0, rel=1e-5)


def test_caption_data_need_no_labels(data: MemoryData, tmp_path: Path) -> None:
    """Image and text pairs train by InfoNCE; equal captions in a batch are no negatives of each other."""
    texts = ["a cat", "a dog", "a cat", "a ship"]
    assert given_captions(texts, torch.device("cpu")).truth_BM.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    batches = [Batch(data.images[:4], torch.arange(4), captions=texts)] * 2
    data.batches = lambda: batches  # type: ignore[method-assign]
    make_trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(pretraining(), datamodule=data)


def test_neither_labels_nor_captions(data: MemoryData, tmp_path: Path) -> None:
    """An image alone teaches no text."""
    data.batches = lambda: [Batch(data.images[:4], torch.arange(4))]  # type: ignore[method-assign]
    with pytest.raises(DataError, match="neither captions nor labels"):
        make_trainer(tmp_path, limit_val_batches=0).fit(pretraining(), datamodule=data)


def test_a_schedule_without_an_end_is_refused(data: MemoryData, tmp_path: Path) -> None:
    """A cosine to nowhere."""
    with pytest.raises(ConfigError, match="needs an end"):
        OptimizerSpec().check_length(math.inf)


def _global_loss(rank: int, world: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{folder}/rendezvous")
    torch.manual_seed(0)
    images, texts = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    weight = torch.eye(4, dtype=torch.float64).requires_grad_(True)
    truth = torch.rand(6, 3) > 0.5
    part = slice(rank * 3, rank * 3 + 3)
    loss = caption_contrast(gather_with_gradient(images[part] @ weight) @ texts.T, gather_with_gradient(truth[part].float()) > 0.5)
    loss.backward()
    assert weight.grad is not None
    torch.distributed.all_reduce(weight.grad)  # DDP's mean
    torch.save((loss.detach(), weight.grad / world), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_program_that_trained_leaves_its_process_group(tmp_path: Path) -> None:
    """Threads of gloo that outlive the interpreter end a good run with exit code -6; without a group nothing happens."""
    leave_process_group()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/rendezvous")
    leave_process_group()
    assert not torch.distributed.is_initialized()


def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    """A loss that couples samples is defined on the global batch: float64, 1e-10."""
    mp.spawn(_global_loss, args=(2, str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    images, texts = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    weight = torch.eye(4, dtype=torch.float64).requires_grad_(True)
    expected = caption_contrast(images @ weight @ texts.T, torch.rand(6, 3) > 0.5)
    expected.backward()
    for rank in range(2):
        loss, gradient = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-10, atol=1e-12)
