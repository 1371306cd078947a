"""The optimisers: which parameters each moves, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from aft.attacks import PGD
from aft.batch import Batch
from aft.clip import ModelSpec, ZeroShotModel
from aft.errors import ConfigError, RunError
from aft.methods import OptimizerSpec, TeCoA
from tests.conftest import MemoryData, make_trainer
from tests.methods.recipes import tecoa


def one_step(model: ZeroShotModel, spec: OptimizerSpec) -> dict[str, torch.Tensor]:
    """What one step adds to each parameter of the image tower, in units of the rate."""
    torch.manual_seed(0)
    named = list(model.visual.named_parameters())
    before = {name: p.detach().clone() for name, p in named}
    optimizer = spec.build(named)
    for _, p in named:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return {name: (p.detach() - before[name]) / spec.lr for name, p in named}


def test_muon_moves_matrices_in_all_directions_alike(model: ZeroShotModel) -> None:
    """Nearly all singular values of an update inside a block are alike, with the root mean square of an AdamW step, 0.2."""
    for name, update in one_step(model, OptimizerSpec(name="muon", lr=1e-3, weight_decay=0.0)).items():
        if update.ndim == 2 and "blocks." in name:
            values = torch.linalg.svdvals(update) / (0.2 * max(update.shape) ** 0.5)
            assert 0.5 < values.quantile(0.1) and values.max() < 1.5, name


def test_muon_leaves_embeddings_projection_and_vectors_to_adamw(model: ZeroShotModel) -> None:
    """Their first step is one rate an element, up or down (Nesterov's correction aside)."""
    outside = {
        name: update
        for name, update in one_step(model, OptimizerSpec(name="muon", lr=1e-3, weight_decay=0.0)).items()
        if update.ndim != 2 or "blocks." not in name
    }
    assert {"proj", "conv1.weight", "positional_embedding", "ln_pre.weight"} <= set(outside)
    for name, update in outside.items():
        assert update.abs().std() < 1e-2 * update.abs().mean(), name


def test_decay_is_of_matrices_alone(model: ZeroShotModel) -> None:
    """Whatever the optimiser."""
    for name in ("adamw", "sgd", "muon"):
        optimizer = OptimizerSpec(name=name, lr=1e-3, weight_decay=0.1).build(model.visual.named_parameters())  # type: ignore[arg-type]
        decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert len(decays) == len(list(model.visual.parameters()))
        assert all((decay > 0) == (p.ndim >= 2) for p, decay in decays.items() if isinstance(p, nn.Parameter))


def test_a_cosine_without_an_end_is_refused_before_the_first_step(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """A run without a last step has no last learning rate."""
    method = TeCoA(tiny, attack=PGD(eps="8/255", step_size="4/255", steps=1))
    trainer = make_trainer(tmp_path, max_steps=-1, max_epochs=-1, max_time={"seconds": 10}, limit_val_batches=0)
    with pytest.raises(ConfigError, match="needs an end"):
        trainer.fit(method, datamodule=data)
    assert trainer.global_step == 0


def test_a_gradient_that_is_not_finite_moves_nothing_and_too_many_end_the_run(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """The weights are as before the step; after ten in a row the error names samples and remedy (R25)."""
    method = TeCoA(tiny, attack=PGD(eps="8/255", step_size="4/255", steps=1))
    method.logit_scale = float("nan")
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    with pytest.warns(UserWarning, match="step is skipped"), pytest.raises(RunError, match="10 steps in a row: lower lr"):
        make_trainer(tmp_path, max_steps=20, limit_val_batches=0).fit(method, datamodule=data)
    assert all(torch.equal(p, before[name]) for name, p in method.named_parameters())


def test_a_skipped_step_is_counted_and_names_the_samples_of_its_bad_part(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """The loss is NaN in the first of three accumulated parts of the first step: the samples are those of that part, not of the last."""
    method = TeCoA(tiny, attack=PGD(eps="8/255", step_size="4/255", steps=1), logit_scale=10.0)
    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=0, accumulate_grad_batches=3, callbacks=[SpoilOnePart()])
    with pytest.warns(UserWarning, match=r"step 1 is not finite \(from samples 0, 1, 2, 3, 4, 5, 6, 7\)"):
        trainer.fit(method, datamodule=data)
    assert (trainer.global_step, trainer.callback_metrics["train/skipped_steps"]) == (2, 1)


class SpoilOnePart(L.Callback):
    """A scale of NaN in the very first part."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Before each part."""
        pl_module.logit_scale = float("nan") if batch_idx == 0 and trainer.global_step == 0 else 10.0


def test_the_rate_follows_the_images_of_a_step_where_it_is_asked_to(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """8 images x 3 accumulated parts are 3 times the 8 that lr is meant for; without lr_for it holds as it is given."""
    for lr_for, expected in ((8, 3e-3), (None, 1e-3), (24, 1e-3)):
        spec = OptimizerSpec(name="sgd", lr=1e-3, schedule="constant", lr_for=lr_for)
        method = TeCoA(tiny, attack=PGD(eps="8/255", step_size="4/255", steps=1), optimizer=spec)
        trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0, accumulate_grad_batches=3)
        trainer.fit(method, datamodule=data)
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected)
        assert trainer.callback_metrics["optimizer/learning_rate"] == pytest.approx(expected)
    with pytest.raises(ConfigError, match="lr_for = 0 is below 1"):
        OptimizerSpec(lr_for=0)


def test_warm_up_then_cosine_counts_optimiser_steps(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Linear to the peak over the warm-up, then a half cosine to zero; also with accumulation (steps, not batches)."""
    spec, rates = OptimizerSpec(name="sgd", lr=1.0, warmup_steps=2), []
    method = tecoa(tiny, optimizer=spec)
    method.on_train_batch_start = lambda batch, batch_idx: rates.append(method.optimizers().param_groups[0]["lr"])  # type: ignore[method-assign,union-attr]
    data.batch_size = 2
    make_trainer(tmp_path, max_steps=6, limit_val_batches=0, accumulate_grad_batches=2).fit(method, datamodule=data)
    expected = [0.5, 1.0] + [0.5 * (1 + torch.cos(torch.tensor(torch.pi * i / 4)).item()) for i in range(4)]
    assert rates == pytest.approx([rate for rate in expected for _ in range(2)], abs=1e-6)
    assert OptimizerSpec(schedule="constant").factor(9, lambda: 1.0) == 1.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 0.0}, "lr = 0.0"),
        ({"warmup_steps": -1}, "warmup_steps = -1"),
        ({"name": "SGD"}, "did you mean .sgd"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_bad_optimiser_settings(settings: dict[str, Any], words: str) -> None:
    """Named with their value."""
    with pytest.raises(ConfigError, match=words):
        OptimizerSpec(**settings)


def test_a_warm_up_longer_than_the_run_warns(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """A small folder under a recipe for ImageNet."""
    with pytest.warns(UserWarning, match="warmup_steps = 9 is not below the run's 2 steps"):
        make_trainer(tmp_path, limit_val_batches=0).fit(tecoa(tiny, optimizer=OptimizerSpec(warmup_steps=9)), datamodule=data)
