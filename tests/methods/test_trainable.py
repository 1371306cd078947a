"""Training with every choice of what learns: what moves, what is called how often, what a checkpoint gives back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import train
from aft.attacks import PGD, ClassificationObjective, sample_keys
from aft.clip import ModelSpec, TrainableSpec, load_model
from aft.errors import ConfigError, WeightsError
from aft.methods import ContrastivePretraining, OptimizerSpec, TeCoA
from datamodules import Sample
from tests.conftest import Calls, MemoryData, make_trainer

OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "first": {"name": "first"},
    "last": {"name": "last"},
    "lora": {"name": "lora", "rank": 2},
    "border": {"name": "prompts", "pad": 3, "tokens": 0},
    "prompts": {"name": "prompts", "pad": 3, "tokens": 4},
    "deep": {"name": "prompts", "pad": 0, "tokens": 4, "deep": True},
}
every_option = pytest.mark.parametrize("option", OPTIONS)


def tecoa(clip: ModelSpec, option: str, **settings: Any) -> TeCoA:
    """TeCoA of this option, with a two-step attack and a rate at which everything moves."""
    defaults: dict[str, Any] = {
        "attack": PGD(eps="8/255", step_size="4/255", steps=2),
        "optimizer": OptimizerSpec(name="sgd", lr=0.1, schedule="constant"),
    }
    return TeCoA(clip, trainable=TrainableSpec(**OPTIONS[option]), **(defaults | settings))


def fit(method: TeCoA, data: MemoryData, folder: Path, **settings: Any) -> Path:
    """Two steps; returns the checkpoint."""
    trainer = make_trainer(folder, limit_val_batches=0, enable_checkpointing=True, **settings)
    trainer.fit(method, datamodule=data)
    trainer.save_checkpoint(folder / "x.ckpt")
    return folder / "x.ckpt"


@every_option
def test_what_learns_moves_and_nothing_else(option: str, tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Bit-equal where frozen; k + 1 image forwards and one of text a run, also with prompts; no gradient is missing (R20)."""
    method = tecoa(tiny, option)
    image, text = Calls(method.model.visual), Calls(method.model.clip.transformer)
    learns = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    missing: list[str] = []
    method.on_before_optimizer_step = lambda optimizer: missing.extend(  # type: ignore[method-assign]
        name for name, p in method.named_parameters() if (p.grad is None) == (name in learns)
    )
    before = copy.deepcopy(method.state_dict())
    fit(method, data, tmp_path)
    assert (image.count, text.count) == (6, 1) and not missing
    assert {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])} == learns


@every_option
def test_only_what_learns_is_in_the_optimiser(option: str, tiny: ModelSpec) -> None:
    """Each parameter once."""
    method = tecoa(tiny, option)
    held = [id(p) for group in method.optimizer_spec.build(method.named_parameters()).param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in method.parameters() if p.requires_grad)


def test_frozen_parts_are_in_eval_mode_and_learning_ones_in_training_mode(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """R17: block by block, in every training forward; the attack has all in eval mode."""
    method, seen = tecoa(tiny, "last"), []
    blocks = method.model.visual.transformer.resblocks
    method.model.visual.register_forward_pre_hook(lambda module, inputs: seen.append([part.training for part in (module, *blocks)]))
    fit(method, data, tmp_path, max_steps=2)
    assert seen == [[False, False, False], [False, False, False], [True, False, True]] * 2


@every_option
def test_the_step_s_gradient_is_that_of_the_loss_at_the_attack_s_images(option: str, tiny: ModelSpec, tmp_path: Path) -> None:
    """A plain loop over the same model, in float64 to 1e-10: the attack sees prompts and updates, and leaves no gradient behind."""
    data = MemoryData(count=8, dtype=torch.float64)
    method = tecoa(tiny, option).double()
    batch, model = data.batches()[0], copy.deepcopy(method.model).eval()
    text = model.text_bank(data.class_lists["train"], data.templates)
    assert method.attack is not None and batch.labels is not None
    objective = ClassificationObjective(lambda x: model(x, text), batch.labels, modules=(model,))
    x = method.attack(objective, batch.images, sample_keys(0, 0, batch.index)).x_BCHW
    torch.nn.functional.cross_entropy(model(x, text), batch.labels).backward()
    seen: dict[str, Tensor] = {}
    method.on_before_optimizer_step = lambda optimizer: seen.update(  # type: ignore[method-assign]
        {name: p.grad.clone() for name, p in method.model.named_parameters() if p.grad is not None}
    )
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0, precision="64-true").fit(method, datamodule=data)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert seen.keys() == expected.keys() and seen
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)


@every_option
def test_the_file_alone_gives_the_fine_tuned_model(option: str, tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Low-rank updates merged (1e-5), everything else to the bit; plain types and tensors only; and it can be trained further."""
    method = tecoa(tiny, option)
    path = fit(method, data, tmp_path)
    loaded = load_model(ModelSpec("miniclip32", str(path)))
    bank = loaded.text_bank(data.class_lists["train"], data.templates)
    close = {"rtol": 1e-5, "atol": 1e-5} if option == "lora" else {"rtol": 0.0, "atol": 0.0}
    with torch.no_grad():
        torch.testing.assert_close(loaded(data.images, bank), method.model.eval()(data.images, bank), **close)
        assert not torch.allclose(loaded(data.images, bank), load_model(tiny)(data.images, bank), atol=1e-3)
    contents = torch.load(path, weights_only=True)
    assert contents["aft"]["model"]["trainable"] == TrainableSpec(**OPTIONS[option]).settings() == loaded.record.trainable
    plain = load_model(tiny).clip.state_dict().keys()
    added = {name for name in loaded.clip.state_dict() if name not in plain}
    assert bool(added) == ("prompts" in TrainableSpec(**OPTIONS[option]).name) and all("visual.prompts." in name for name in added)
    again = tecoa(ModelSpec(pretrained=str(path)), "lora")
    (tmp_path / "again").mkdir()
    second = load_model(ModelSpec(pretrained=str(fit(again, data, tmp_path / "again"))))
    with torch.no_grad():
        torch.testing.assert_close(second(data.images, bank), again.model.eval()(data.images, bank), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", ["last", "lora", "prompts", "deep"])
def test_interrupted_is_uninterrupted(option: str, tiny: ModelSpec, tmp_path: Path) -> None:
    """Four steps, and the same with two stops, end in the same weights, to the bit."""

    def run(folder: str, stops: list[int]) -> dict[str, Tensor]:
        checkpoint = None
        for stop in stops:
            method = tecoa(tiny, option, optimizer=OptimizerSpec(lr=1e-3, schedule="constant"))
            data = Sample(batch_size=16, holdout=0, train_classes=["cat", "dog", "ship"], augment="crop_flip")
            saver = ModelCheckpoint(tmp_path / folder, filename=str(stop), every_n_train_steps=stop)
            trainer = make_trainer(tmp_path / folder, max_steps=stop, limit_val_batches=0, enable_checkpointing=True, callbacks=[saver])
            trainer.fit(method, datamodule=data, ckpt_path=checkpoint)
            checkpoint = str(tmp_path / folder / f"{stop}.ckpt")
        return {name: value.clone() for name, value in method.model.state_dict().items()}

    whole, parts = run("whole", [4]), run("parts", [1, 3, 4])
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(("before", "now"), [("all", "last"), ("lora", "all"), ("all", "prompts"), ("prompts", "deep")])
def test_going_on_with_another_choice_is_refused(before: str, now: str, tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Both are named; so is a validation under another choice that has other tensors."""
    path = fit(tecoa(tiny, before), data, tmp_path, max_steps=1)
    names = [TrainableSpec(**OPTIONS[option]).name for option in (before, now)]
    words = rf"the checkpoint has trainable = \{{'name': '{names[0]}'.*this run has \{{'name': '{names[1]}'"
    with pytest.raises(WeightsError, match=words):
        make_trainer(tmp_path, max_steps=3).fit(tecoa(tiny, now), datamodule=data, ckpt_path=str(path))
    if {"lora", "prompts"} & set(names):
        with pytest.raises(WeightsError, match=words):
            make_trainer(tmp_path).validate(tecoa(tiny, now), datamodule=data, ckpt_path=str(path), verbose=False)


def test_a_checkpoint_from_before_there_was_a_choice_goes_on_with_all(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Its header says nothing of what learned: all did."""
    path = fit(tecoa(tiny, "all"), data, tmp_path, max_steps=1)
    contents = torch.load(path, weights_only=True)
    for key in ("trainable", "prompts"):
        del contents["aft"]["model"][key]
    torch.save(contents, path)
    assert load_model(ModelSpec(pretrained=str(path))).record.prompts is None
    make_trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(tecoa(tiny, "all"), datamodule=data, ckpt_path=str(path))


@pytest.mark.parametrize("option", ["last", "lora", "prompts"])
def test_contrastive_pre_training_takes_the_same_choice(option: str, data: MemoryData, tmp_path: Path) -> None:
    """Of the image tower; its text tower learns as ever."""
    spec = TrainableSpec(**OPTIONS[option])
    method = ContrastivePretraining(ModelSpec("tiny", "random"), trainable=spec, optimizer=OptimizerSpec(name="sgd", lr=0.1))
    before = copy.deepcopy(method.state_dict())
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(method, datamodule=data)
    image = {name for name, p in method.named_parameters() if p.requires_grad and ".visual." in name}
    moved = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    assert image and {name for name in moved if ".visual." in name} == image
    assert "model.clip.token_embedding.weight" in moved


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.init_args.trainable.name=lorra"], "unknown value of trainable.name 'lorra': did you mean 'lora'"),
        (["--model.init_args.trainable.targets=[atention]"], "unknown value of trainable.targets 'atention': did you mean 'attention'"),
        (["--model.init_args.trainable={nme: lora}"], "unknown setting 'nme': did you mean 'name'"),
        (["--model.init_args.trainable.rnk=8"], "did you mean '.*rank'"),
        (["--model.init_args.trainable={name: lora, pad: 3}"], "trainable.pad = 3 belongs to prompts, not to lora"),
    ],
)
def test_mistakes_on_the_command_line_are_named(arguments: list[str], words: str) -> None:
    """With near matches."""
    with pytest.raises(ConfigError, match=words):
        train.main(["fit", "-c", str(train.HERE / "configs" / "quickstart.yaml"), *arguments])


def test_the_command_line_chooses(tmp_path: Path) -> None:
    """One option is enough."""
    arguments = ["--model.init_args.trainable.name", "lora", "--model.init_args.trainable.rank", "4", "--trainer.max_steps", "1"]
    arguments += ["--model.init_args.clip.name", "tiny", "--trainer.default_root_dir", str(tmp_path), "--trainer.limit_val_batches", "0"]
    arguments += ["--checkpoint.monitor", "null", "--data.init_args.batch_size", "16", "--trainer.accelerator", "cpu"]
    made = train.main(["fit", "-c", str(train.HERE / "configs" / "quickstart.yaml"), *arguments])
    assert made.model.trainable_spec == TrainableSpec("lora", rank=4) and made.trainer.global_step == 1
