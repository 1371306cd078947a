"""callbacks.Compiled: the same step, by compiled graphs of the attack and of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from aft.attacks import PGD
from aft.clip import ModelSpec
from aft.errors import ConfigError
from aft.methods import OptimizerSpec, TeCoA
from callbacks import Compiled
from tests.conftest import MemoryData, make_trainer


class Graphs:
    """A backend that compiles nothing, and notes for each graph whether a weight in it learns."""

    def __init__(self) -> None:
        self.learns: list[bool] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        """Runs it as it is."""
        self.learns.append(any(isinstance(value, nn.Parameter) and value.requires_grad for value in inputs))
        return graph.forward


def gradients(tiny: ModelSpec, data: MemoryData, folder: Path, *callbacks: L.Callback) -> tuple[TeCoA, dict[str, Tensor]]:
    """What five steps of plain descent took from the weights, float64."""
    plain = OptimizerSpec(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant")
    method = TeCoA(tiny, attack=PGD(eps="8/255", step_size="4/255", steps=2), optimizer=plain)
    before = {name: p.detach().double().clone() for name, p in method.model.visual.named_parameters()}
    trainer = make_trainer(folder, max_steps=5, max_epochs=-1, limit_val_batches=0, precision="64-true", callbacks=[*callbacks])
    trainer.fit(method, datamodule=data)
    return method, {name: before[name] - p.detach() for name, p in method.model.visual.named_parameters()}


def test_compiled_steps_are_eager_steps(tiny: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every weight that learns moves, as without the callback; the attack's graph has no weight that learns, training's has."""
    torch._dynamo.reset()
    graphs, data = Graphs(), MemoryData(dtype=torch.float64)
    callback = Compiled(backend=graphs)
    _, eager = gradients(tiny, data, tmp_path)
    method, compiled = gradients(tiny, data, tmp_path, callback)
    largest = max(float(value.abs().max()) for value in eager.values())
    for name, value in eager.items():
        assert float(value.abs().max()) > 0 and float((compiled[name] - value).abs().max()) < 1e-10 * largest, name
    assert set(graphs.learns) == {False, True}
    assert callback.compile_seconds is not None and "compiled the image tower" in capsys.readouterr().out
    assert not any("_orig_mod" in name for name in method.state_dict()) and method.model.visual._compiled_call_impl is None


def test_gradients_of_compiled_graphs_are_eager_ones(tiny: ModelSpec, tmp_path: Path) -> None:
    """By graphs whose backward pass is made when they are compiled (no compiler is needed): one made while weights are frozen, in the
    attack, and used again for training would leave every weight where it is."""
    torch._dynamo.reset()
    data = MemoryData(dtype=torch.float64)
    _, eager = gradients(tiny, data, tmp_path)
    _, compiled = gradients(tiny, data, tmp_path, Compiled(backend="aot_eager"))
    largest = max(float(value.abs().max()) for value in eager.values())
    for name, value in eager.items():
        assert float(value.abs().max()) > 0 and float((compiled[name] - value).abs().max()) < 1e-10 * largest, name


def test_what_has_no_image_tower_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no image tower"):
        Compiled().on_fit_start(make_trainer(tmp_path), L.LightningModule())
