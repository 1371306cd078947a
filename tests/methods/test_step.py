"""The one step: what it computes, what it leaves alone, and exactly how often it calls the encoders."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from aft.attacks import PGD, ClassificationObjective, sample_keys
from aft.batch import Batch
from aft.clip import ModelSpec, cost, load_model, weights
from aft.errors import AftError, ConfigError, DataError
from aft.methods import ContrastivePretraining, TeCoA, terms
from aft.methods.targets import Targets
from aft.methods.views import Views
from tests.conftest import Calls, MemoryData, make_trainer
from tests.methods.recipes import tecoa


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_tecoa_step_makes_k_plus_1_image_forwards_and_no_text_forward(
    tiny: ModelSpec, data: MemoryData, tmp_path: Path, steps: int
) -> None:
    """DESIGN section 10; the text tower runs once, for the bank, however many steps there are (trap 4)."""
    method = tecoa(tiny, attack=PGD(eps="8/255", step_size="4/255", steps=steps))
    image, text = Calls(method.model.visual), Calls(method.model.clip.transformer)
    make_trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(method, datamodule=data)
    assert image.count == 3 * (steps + 1) and image.rows == image.count * data.batch_size
    assert text.count == 1


def reference_gradients(method: TeCoA, batch: Batch, data: MemoryData) -> dict[str, Tensor]:
    """TeCoA written as a plain loop over pixels and weights, without the framework."""
    model = copy.deepcopy(method.model).eval()
    text = model.text_bank(data.class_lists["train"], data.templates)
    objective = ClassificationObjective(lambda x: model(x, text), batch.labels, modules=(model,))
    assert method.attack is not None
    x = method.attack(objective, batch.images, sample_keys(0, 0, batch.index)).x_BCHW
    loss = torch.nn.functional.cross_entropy(model(x, text), batch.labels)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_is_that_of_the_loss_alone(tiny: ModelSpec, tmp_path: Path, accumulate: int) -> None:
    """In float64 to 1e-10, also when two batches accumulate: no attack gradient ends up in the weights (trap 1)."""
    data = MemoryData(count=16, dtype=torch.float64)
    method = tecoa(tiny).double()
    expected = [reference_gradients(method, batch, data) for batch in data.batches()[:accumulate]]
    seen: dict[str, Tensor] = {}
    method.on_before_optimizer_step = lambda optimizer: seen.update(  # type: ignore[method-assign]
        {n: p.grad.clone() for n, p in method.model.named_parameters() if p.grad is not None} if not seen else {}
    )
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0, accumulate_grad_batches=accumulate, precision="64-true").fit(
        method, datamodule=data
    )
    assert seen.keys() == expected[0].keys() and len(seen) > 10
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, sum(e[name] for e in expected) / accumulate, rtol=1e-10, atol=1e-12)


def test_only_the_image_tower_learns(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Every text weight and the logit scale are bit-equal after training; every image weight has moved."""
    method = tecoa(tiny)
    before = copy.deepcopy(method.model.clip.state_dict())
    make_trainer(tmp_path, limit_val_batches=0).fit(method, datamodule=data)
    moved = {name for name, value in method.model.clip.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("visual.")}


def test_modes_in_every_step(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """The student trains in training mode, also after validation; frozen towers and the attack are in eval mode (trap 6)."""
    method, seen = tecoa(tiny), []
    method.model.visual.register_forward_pre_hook(
        lambda module, inputs: seen.append((module.training, method.model.clip.transformer.training))
    )
    make_trainer(tmp_path, max_steps=2, val_check_interval=1, limit_val_batches=0).fit(method, datamodule=data)
    assert seen == [(False, False), (False, False), (True, False)] * 2
    seen.clear()
    method.eval()
    make_trainer(tmp_path, max_steps=2, val_check_interval=1, limit_val_batches=1).fit(method, datamodule=data)
    step, validation = [(False, False), (False, False), (True, False)], [(False, False)]
    assert seen == (step + validation) * 2


def test_validate_with_default_flags_still_attacks(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Lightning validates under inference mode unless told otherwise; the attack leaves it (trap 7)."""
    attack = PGD(eps=1.0, step_size=0.25, steps=5, keep="best")
    plain, attacked = tecoa(tiny), tecoa(tiny, val_attack=attack)
    (clean,) = make_trainer(tmp_path).validate(plain, datamodule=data, verbose=False)
    (robust,) = make_trainer(tmp_path).validate(attacked, datamodule=data, verbose=False)
    assert set(clean) == {"val/clean_accuracy"} and robust["val/clean_accuracy"] == clean["val/clean_accuracy"] > 0
    assert robust["val/robust_accuracy"] == 0.0  # the whole pixel range is the ball


def test_validation_attacks_the_model_as_it_will_be_used(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """At the model's own logit scale, whatever that of training: recipes at scale 1 or 180 are chosen by the same attack as all others."""
    attack, seen = PGD(eps="8/255", step_size="4/255", steps=2, keep="best"), []

    def watched(objective: Any, x: Tensor, keys: Tensor) -> Any:
        seen.append(objective(x, torch.arange(len(x))).loss_n.detach())
        return attack(objective, x, keys)

    for scale in (None, 1.0, 180.0):
        method = tecoa(tiny, logit_scale=scale, val_attack=watched)
        make_trainer(tmp_path, limit_val_batches=1).validate(method, datamodule=data, verbose=False)
    assert len(seen) == 3 and torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_validation_counts_each_sample_once_with_uneven_batches(tiny: ModelSpec, tmp_path: Path) -> None:
    """7 images in batches of 3: the accuracy is a count over 7, not a mean of batch means."""
    data, method = MemoryData(count=7, batch_size=3), tecoa(tiny)
    (logged,) = make_trainer(tmp_path).validate(method, datamodule=data, verbose=False)
    text = method.model.text_bank(data.class_lists["train"], data.templates)
    expected = (method.model(data.images, text).argmax(1) == data.labels).float().mean()
    assert logged["val/clean_accuracy"] == pytest.approx(float(expected), abs=1e-7)


@pytest.mark.parametrize(("name", "steps"), [("ViT-B-32", 2), ("ViT-B-16", 3), ("miniclip32", 2)])
def test_flops_of_a_step_are_those_of_the_cost_model(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 2 %, counted on the meta device: no hidden forward, no weight gradient inside the attack."""
    config = weights.describe(name, None).config
    with torch.device("meta"):
        clip = weights.build_clip(config)
    model = load_model(ModelSpec("tiny"))
    model.clip, model.record = clip, dataclasses.replace(model.record, resolution=config["vision_cfg"]["image_size"])
    model = model.to("meta").train()
    for parameter in model.text_parameters:
        parameter.requires_grad_(False)
    batch = Batch(torch.rand(2, 3, 32, 32, device="meta"), torch.arange(2, device="meta"), torch.zeros(2, dtype=torch.long, device="meta"))
    text = {"class": torch.rand(10, config["embed_dim"], device="meta")}
    targets = Targets(batch, student=model, text=text)
    views = Views(model, text={}, fixed=text)
    objective = ClassificationObjective(lambda x: model.logits(model.encode(x), text["class"]), targets.labels, modules=(model,))
    with FlopCounterMode(display=False) as counter:
        x = PGD(eps="1/255", step_size="1/255", steps=steps)(objective, batch.images, batch.index).x_BCHW
        views.open(batch.images, x)
        terms.Alignment()(targets, views).backward()
    expected = 2 * cost.vit_cost(config).fine_tuning_step(steps)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


def test_the_random_start_is_another_one_each_epoch_and_the_same_after_a_restart(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Counted noise: a function of seed, epoch and sample, not of how often the run was started (trap 16)."""
    seen: list[Tensor] = []

    def watched(epochs: int, checkpoint: str | None) -> None:
        method = tecoa(tiny)
        attack = method.attack
        assert attack is not None
        method.attack = lambda objective, x, keys: (seen.append(keys), attack(objective, x, keys))[1]  # type: ignore[assignment]
        trainer = make_trainer(tmp_path, max_steps=-1, max_epochs=epochs, limit_val_batches=0, enable_checkpointing=True)
        trainer.fit(method, datamodule=data, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "x.ckpt")

    watched(2, None)
    first, second = seen[:3], seen[3:]
    assert len(second) == 3 and not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    seen.clear()
    watched(1, None)
    watched(2, str(tmp_path / "x.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(first + second, seen, strict=True))


def test_a_view_touched_inside_the_attack_raises(model: Any) -> None:
    """Views learn; they open after the attack."""
    views = Views(model, text={"class": lambda: torch.rand(3, 16)}, fixed={})
    for touch in (lambda: views.adversarial, lambda: views.clean, lambda: views.text("class")):
        with pytest.raises(ConfigError, match="inside the attack"):
            touch()


def test_targets_have_no_graph_and_are_computed_once(model: Any, data: MemoryData) -> None:
    """A teacher's encoding is lazy, fp32 and detached; the adversarial one exists after the attack only."""
    teacher = copy.deepcopy(model)
    calls, batch = Calls(teacher.visual), data.batches()[0]
    targets = Targets(batch, student=model, text={}, teacher=teacher)
    assert calls.count == 0
    assert targets.teacher_clean is targets.teacher_clean and calls.count == 1
    assert not targets.teacher_clean.embedding_BD.requires_grad
    with pytest.raises(ConfigError, match="before the attack"):
        _ = targets.teacher_adversarial
    model.train()
    assert not targets.student_clean.embedding_BD.requires_grad and model.visual.training
    with pytest.raises(ConfigError, match="no term declares it"):
        _ = Targets(batch, student=model, text={}).teacher_clean


def test_labels_outside_the_class_list(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Data and class list that do not belong together stop at the first batch."""
    data.labels = data.labels + 2
    with pytest.raises(DataError, match=r"labels \[3, 4.* are outside the class list of 3 names"):
        make_trainer(tmp_path).fit(tecoa(tiny), datamodule=data)


def test_a_run_without_class_names(tiny: ModelSpec, tmp_path: Path) -> None:
    """A bare loader has no class names."""
    with pytest.raises(DataError, match="no class names"):
        make_trainer(tmp_path).fit(tecoa(tiny), train_dataloaders=MemoryData().train_dataloader())


def test_tecoa_without_an_attack_is_refused(tiny: ModelSpec) -> None:
    """Clean fine-tuning under an adversarial name would be a wrong result."""
    with pytest.raises(ConfigError, match="trains on adversarial images"):
        TeCoA(tiny)


def test_out_of_memory_names_batch_size_and_attack_steps(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """In the training forward as in the attack; weights are trainable again afterwards."""
    method, calls = tecoa(tiny), []

    def full(module: Any, inputs: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    method.model.visual.register_forward_pre_hook(full)
    with pytest.raises(AftError, match="2 attack steps on a batch of 8 images"):
        make_trainer(tmp_path).fit(method, datamodule=data)
    assert all(p.requires_grad for p in method.model.visual.parameters())


def test_a_coupled_loss_refuses_accumulation(data: MemoryData, tmp_path: Path) -> None:
    """It is defined on the whole batch."""
    with pytest.raises(ConfigError, match="accumulate_grad_batches = 2, but terms.caption_contrast is defined on the whole batch"):
        make_trainer(tmp_path, accumulate_grad_batches=2).fit(ContrastivePretraining(ModelSpec("tiny", "random")), datamodule=data)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_pixels_in_16_bits_are_refused(precision: str, tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """With what to take instead."""
    with pytest.raises(ConfigError, match=f"precision = '{precision}'.*take '{precision.replace('true', 'mixed')}'"):
        make_trainer(tmp_path, max_steps=1, precision=precision).fit(tecoa(tiny), datamodule=data)
