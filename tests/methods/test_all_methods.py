"""What holds for every method: cost of a step, what its attack and its terms do, a whole run with resume and evaluation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import eval as eval_command
from aft.attacks import PGD, sample_keys
from aft.clip import ModelSpec, cost, load_model
from aft.clip.text_transform import TextTransformSpec
from aft.clip.weights import describe
from aft.methods import AdversarialFineTuning, ContrastivePretraining, OptimizerSpec
from aft.methods.targets import Targets
from aft.methods.views import Views
from tests.conftest import Calls, MemoryData, make_trainer
from tests.methods.recipes import RECIPES, build
from tests.towers import register

every_method = pytest.mark.parametrize("name", RECIPES)


def ready(name: str, clip: ModelSpec, data: MemoryData, folder: Path, **settings: object) -> AdversarialFineTuning:
    """A method that is set up but does not train."""
    method = build(name, clip, **settings)
    method._trainer = make_trainer(folder)
    method._trainer.datamodule = data  # type: ignore[attr-defined]
    method.setup("fit")
    method.on_fit_start()
    return method


def opened(method: AdversarialFineTuning, data: MemoryData) -> tuple[Targets, Views]:
    """One batch after the method's own attack."""
    targets = method.targets(data.batches()[0])
    views = method.views(targets)
    adversarial = method.perturb(targets)
    assert adversarial is not None
    targets.adversarial_BCHW = adversarial.x_BCHW
    views.open(targets.images, targets.adversarial_BCHW)
    return targets, views


def settings_of(method: AdversarialFineTuning) -> dict[str, object]:
    """What makes a method what it is, as far as its constructor decides."""
    terms = {name: (type(term), dataclasses.asdict(term)) for name, term in method.terms.items()}
    own = {name: value for name, value in vars(method).items() if isinstance(value, (str, int, float, list))}
    text, specs = type(method.model.text_transform), (method.optimizer_spec, method.trainable_spec)
    return {"terms": terms, "text": text, "specs": specs, **own}


@pytest.mark.parametrize("kind", sorted({recipe.kind for recipe in RECIPES.values()} | {ContrastivePretraining}, key=lambda k: k.__name__))
def test_a_name_alone_in_yaml_is_the_method(kind: type[AdversarialFineTuning]) -> None:
    """Parsed as train.py parses it, with nothing else set: what Python's constructor makes, its defaults among them."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(AdversarialFineTuning, "model")
    attack = "{class_path: aft.attacks.PGD, init_args: {eps: 8/255, step_size: 4/255, steps: 2}}"
    given = f"{{class_path: aft.methods.{kind.__name__}, init_args: {{clip: {{name: tiny}}, attack: {attack}}}}}"
    parsed = parser.instantiate_classes(parser.parse_args([f"--model={given}"])).model
    assert settings_of(parsed) == settings_of(kind(ModelSpec("tiny"), attack=PGD(eps="8/255", step_size="4/255", steps=2)))


@every_method
@pytest.mark.parametrize("steps", [1, 3])
def test_encoder_calls_of_a_step(name: str, steps: int, tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """DESIGN section 10, in two steps of a real run: k + trained + frozen forwards of image towers a step, the teacher's among them.

    The text tower runs once for each list of texts, at the start, and once a step where captions are drawn: never inside the attack.
    """
    method = build(name, tiny, attack=PGD(eps="8/255", step_size="4/255", steps=steps))
    student, texts, teachers, begin = Calls(method.model.visual), Calls(method.model.clip.transformer), list[Calls](), method.on_fit_start

    def watched() -> None:
        begin()
        teachers.extend(Calls(teacher.visual) for teacher in method._teacher)

    method.on_fit_start = watched  # type: ignore[method-assign]
    make_trainer(tmp_path, limit_val_batches=0).fit(method, datamodule=data)
    recipe = RECIPES[name]
    teacher = sum(calls.count for calls in teachers)
    assert student.count + teacher == 2 * (steps + recipe.forwards) and student.rows == 8 * student.count
    assert teacher == (2 if "teacher_clean" in method.needs or "teacher_adversarial" in method.needs else 0)
    assert texts.count == {"comp_tga": 2, "saft": 2, "advflyp": 3}.get(name, 1)


@every_method
def test_flops_of_a_step_are_those_of_the_cost_model(
    name: str, data: MemoryData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 2 % on MiniCLIP-32: no hidden forward, no weight gradient in the attack, none in teachers."""
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)  # the counter does not know fused attention
    method = ready(name, ModelSpec("miniclip32"), data, tmp_path)
    images = 2
    batch = data.batches()[0]
    batch.images, batch.index, batch.labels = batch.images[:images], batch.index[:images], batch.labels[:images]  # type: ignore[index]
    data.batches = lambda: [batch]  # type: ignore[method-assign]
    _ = list(method.targets(batch).text.values())  # texts are encoded before the count
    captions = method.captions(batch)
    if captions is not None:
        captions.embed(method.model)
        method.captions = lambda batch: captions  # type: ignore[method-assign]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        targets, views = opened(method, data)
        loss = torch.stack([term.weight_at(0) * term(targets, views) for term in method.terms.values()]).sum()
        loss.backward()
    recipe = RECIPES[name]
    expected = images * cost.vit_cost(describe("miniclip32", None).config).fine_tuning_step(2, recipe.trained, recipe.frozen)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


@every_method
def test_every_term_has_a_gradient_under_its_own_attack(name: str, tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """The frozen-view fault: a term that compares constants trains nothing."""
    method = ready(name, tiny, data, tmp_path)
    targets, views = opened(method, data)
    learned = [p for _, p in method.named_parameters() if p.requires_grad]
    with torch.no_grad():  # a student that has moved away from its teacher
        for p in method.model.visual.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    if name == "tima":
        with torch.no_grad():
            method.model.text_transform.up.weight.fill_(0.01)  # type: ignore[union-attr]
    for term_name, term in method.terms.items():
        gradients = torch.autograd.grad(term(targets, views), learned, allow_unused=True, retain_graph=True)
        assert any(g is not None and bool(g.abs().max() > 0) for g in gradients), term_name


@every_method
def test_the_attack_raises_the_methods_own_objective(name: str, tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Over the mean of random points of the ball; and per sample: an image's objective does not depend on its neighbours (float64)."""
    method = ready(name, tiny, data, tmp_path, attack=PGD(eps="8/255", step_size="1/255", steps=12))
    targets = method.targets(data.batches()[0])
    objective, attack = method.objective(targets), method.attack
    rows, keys = torch.arange(8), sample_keys(1, 0, torch.arange(8))
    assert attack is not None
    found = attack(objective, targets.images, keys).x_BCHW
    start = attack.threat.random_start(targets.images, keys, 0)
    with torch.no_grad():
        before, after = objective(start, rows).loss_n, objective(found, rows).loss_n
        alone = torch.cat([objective(found[i : i + 1], rows[i : i + 1]).loss_n for i in rows])
    assert float((after - before).mean()) > 0 and int((after > before).sum()) >= 7
    torch.testing.assert_close(alone, after, rtol=1e-4, atol=1e-5)


@every_method
def test_fit_resume_validate_evaluate(name: str, tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """An epoch and another one are two epochs to the bit; the checkpoint validates, and eval.py measures it."""
    val_attack = PGD(eps="2/255", step_size="1/255", steps=2, keep="best")

    def fit(epochs: int, folder: str, checkpoint: str | None = None) -> AdversarialFineTuning:
        trainer = make_trainer(tmp_path, max_steps=-1, max_epochs=epochs, enable_checkpointing=True, limit_val_batches=0)
        method = build(name, tiny, val_attack=val_attack)
        trainer.fit(method, datamodule=MemoryData(count=16), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / folder / "last.ckpt")
        return method

    whole, half = fit(2, "whole"), fit(1, "half")
    resumed = fit(2, "resumed", str(tmp_path / "half" / "last.ckpt"))
    assert half.global_step == 2 and resumed.global_step == whole.global_step == 4
    for (key, expected), (_, value) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(value, expected), key
    (logged,) = make_trainer(tmp_path).validate(resumed, datamodule=data, verbose=False)
    assert 0 <= logged["val/robust_accuracy"] <= logged["val/clean_accuracy"] <= 1
    checkpoint = tmp_path / "resumed" / "last.ckpt"
    assert load_model(ModelSpec(pretrained=str(checkpoint))).record.method == RECIPES[name].kind.method
    settings = {"weights": checkpoint, "n": 20, "eps": "[2/255]", "protocols": "[pgd]", "steps": 2, "out": tmp_path / "eval"}
    told = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    eval_command.main(["-c", "configs/data/sample.yaml", *told])
    (card,) = (json.loads(path.read_text()) for path in (tmp_path / "eval" / "cards").rglob("*.json"))
    assert card["model"]["method"] == RECIPES[name].kind.method and card["status"] == "complete"


@every_method
def test_every_method_trains_a_resnet(name: str, data: MemoryData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch tokens through the attention pool's value and output projections; BatchNorm's statistics stay."""
    register(monkeypatch, tmp_path)
    method = build(name, ModelSpec("resnet", "random"), optimizer=OptimizerSpec(name="sgd", lr=1e-3, schedule="constant"))
    before = {key: value.clone() for key, value in method.model.visual.state_dict().items()}
    make_trainer(tmp_path, limit_val_batches=0).fit(method, datamodule=data)
    after = method.model.visual.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(value, before[key]) for key, value in after.items())
    assert all(torch.equal(value, before[key]) for key, value in after.items() if "running" in key or "num_batches" in key)


@pytest.mark.parametrize(("name", "taken"), [
    ("pmg_aft", ["teacher_distillation", "clean_consistency"]),
    ("tga_zsr", ["attention_refinement", "attention_constraint"]),
    ("comp_tga", ["attention_refinement", "attention_constraint"]),
    ("laat", ["smoothness"]),
])  # fmt: skip
def test_what_extends_tecoa_is_tecoa_without_its_terms(
    name: str, taken: list[str], tiny: ModelSpec, data: MemoryData, tmp_path: Path
) -> None:
    """With weight 0 and with the terms taken out: TeCoA's weights after two steps, to the bit.

    LAAT: with the identity for its texts, too, and at its own scale of 1."""
    scale = {"logit_scale": 1.0} if name == "laat" else {}
    settings: dict[str, object] = {**scale, "text_transform": TextTransformSpec()} if scale else {}

    def after_two_steps(which: str, **more: object) -> dict[str, Tensor]:
        method = build(which, tiny, **more)
        make_trainer(tmp_path, limit_val_batches=0).fit(method, datamodule=data)
        return method.model.clip.state_dict()

    expected = after_two_steps("tecoa", **scale)
    for terms in ({term: None for term in taken}, {term: {"weight": 0.0} for term in taken}):
        found = after_two_steps(name, terms=terms, **settings)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not all(torch.equal(value, expected[key]) for key, value in after_two_steps(name, **settings).items())
