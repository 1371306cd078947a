"""callbacks.ActivationCheckpointing: the same gradient, recomputed in training forwards and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from aft.attacks import PGD
from aft.clip import ModelSpec
from aft.clip.trainable import TrainableSpec
from aft.errors import ConfigError
from aft.methods import OptimizerSpec, Phase, TeCoA
from callbacks import ActivationCheckpointing, Probe
from tests.conftest import Calls, MemoryData, make_trainer
from tests.towers import register


def trained(spec: ModelSpec, data: MemoryData, folder: Path, trainable: TrainableSpec, *callbacks: L.Callback) -> tuple[TeCoA, int]:
    """One step of TeCoA with two attack steps: the method, and how often its first block ran."""
    plain = OptimizerSpec(name="sgd", lr=1.0)
    method = TeCoA(spec, attack=PGD(eps="8/255", step_size="4/255", steps=2), optimizer=plain, trainable=trainable)
    calls = Calls(next(iter(method.model.visual.transformer.resblocks)))
    make_trainer(folder, max_steps=1, limit_val_batches=0, callbacks=[*callbacks]).fit(method, datamodule=data)
    return method, calls.count


@pytest.mark.parametrize("trainable", [TrainableSpec(), TrainableSpec(name="prompts", pad=4, tokens=2), TrainableSpec(name="lora")],
                         ids=lambda spec: spec.name)  # fmt: skip
def test_only_the_training_forward_is_computed_again(
    trainable: TrainableSpec, tiny: ModelSpec, data: MemoryData, tmp_path: Path
) -> None:
    """k + 1 forwards of the block become k + 2, and the weights after the step are the same; also where the block itself is frozen."""
    torch.manual_seed(0)
    plain, forwards = trained(tiny, data, tmp_path, trainable)
    torch.manual_seed(0)
    less, with_it = trained(tiny, data, tmp_path, trainable, ActivationCheckpointing())
    assert (forwards, with_it) == (3, 4)
    pairs = zip(plain.parameters(), less.parameters(), strict=True)
    assert all(torch.allclose(one, other, atol=1e-7) for one, other in pairs)


def test_a_tower_that_cannot_is_named(monkeypatch: pytest.MonkeyPatch, data: MemoryData, tmp_path: Path) -> None:
    """Convolutions are no blocks of a transformer."""
    register(monkeypatch, tmp_path)
    method = TeCoA(ModelSpec("resnet", pretrained="random"), attack=PGD(eps="8/255", step_size="4/255", steps=1), optimizer=OptimizerSpec())
    with pytest.raises(ConfigError, match="ResNet cannot recompute activations"):
        make_trainer(tmp_path, callbacks=[ActivationCheckpointing()]).fit(method, datamodule=data)


def probed(tiny: ModelSpec, folder: Path, **settings: Any) -> dict[str, Any]:
    """What a probe of four steps says of a run."""
    import json

    method = TeCoA(tiny, attack=PGD(eps="8/255", step_size="4/255", steps=1), optimizer=OptimizerSpec(schedule="constant"))
    trainer = make_trainer(folder, **{"limit_val_batches": 0, "callbacks": [Probe(4, 2)], **settings})
    trainer.fit(method, datamodule=MemoryData(count=24, batch_size=4))
    assert trainer.global_step == 4
    return dict(json.loads((folder / "probe.json").read_text()))


def test_a_probe_ends_early_and_knows_the_whole_run(tiny: ModelSpec, tmp_path: Path) -> None:
    """Four steps are made of the 100 that were asked for; of ten epochs it knows their 60 steps."""
    told = probed(tiny, tmp_path, max_steps=100, max_epochs=-1)
    assert told["steps"] == 100 and told["fixed"] and told["images"] == 4 and told["timed"] == 2 and told["seconds"] > 0
    told = probed(tiny, tmp_path, max_steps=-1, max_epochs=10)
    assert told["steps"] == 60 and not told["fixed"]
    with pytest.raises(ConfigError, match="skip at least one"):
        Probe(4, 4)


def test_a_probe_times_steps_at_full_strength(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """All of its steps lie in the first phase, whose price is not that of the run: here no attack, in place of one step of it."""
    method = TeCoA(tiny, attack=PGD(eps="8/255", step_size="4/255", steps=1), phases=[Phase(until=0.9, clean=True)])
    calls = Calls(method.model.visual)
    make_trainer(tmp_path, max_steps=100, max_epochs=-1, limit_val_batches=0, callbacks=[Probe(4, 2)]).fit(method, datamodule=data)
    assert calls.count == 4 * 2
