"""What single methods promise: versions of PMG-AFT, worked limits of FARE, LORE, AGFT, SAFT, TRADES, AdvFLYP, and what they refuse."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import save_file
from torch.nn import functional

import train
from aft.attacks import FGSM, PGD
from aft.batch import Batch
from aft.clip import ModelSpec, weights
from aft.errors import AftError, ConfigError, DataError, WeightsError
from aft.methods import AGFT, FARE, LORE, PMGAFT, SAFT, TGAZSR, TRADES, AdvFLYP, OptimizerSpec, SimCLIP, TeCoA
from aft.methods.distillation import CleanConsistency, TeacherDistillation
from aft.methods.lore import CleanConstraint
from aft.methods.saft import own_descriptions
from aft.methods.tga_zsr import AttentionRefinement
from datamodules import Sample
from tests.conftest import TINY, MemoryData, make_trainer
from tests.methods.recipes import build
from tests.methods.test_all_methods import opened, ready

ATTACK = PGD(eps="8/255", step_size="4/255", steps=2)


def test_three_versions_of_pmg_aft(tiny: ModelSpec, tmp_path: Path) -> None:
    """Paper (from memory), released, and AGFT's port, from plain tensors in float64."""
    data = MemoryData(dtype=torch.float64)
    method = ready("pmg_aft", tiny, data, tmp_path).double()
    method._teacher = (method._teacher[0].double(),)
    targets, views = opened(method, data)
    text = targets.text["class"]
    with torch.no_grad():
        for p in method.model.visual.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))

    def log_p(encoding: torch.Tensor, scale: float) -> torch.Tensor:
        return (scale * functional.normalize(encoding, dim=1) @ text.T).log_softmax(1)

    scale = float(method.model.logit_scale)
    adversarial, clean, teacher = (e.embedding_BD for e in (views.adversarial, views.clean, targets.teacher_adversarial))
    for other, kind in ((teacher, TeacherDistillation), (clean, CleanConsistency)):
        a, o = log_p(adversarial, scale), log_p(other, scale)
        paper = sum(float((a[i].exp() * (a[i] - o[i])).sum()) for i in range(8)) / 8
        assert float(kind()(targets, views).detach()) == pytest.approx(paper, rel=1e-10)
        port = float(functional.kl_div(a, o, reduction="batchmean", log_target=True))
        assert float(kind(direction="adversarial_second")(targets, views).detach()) == pytest.approx(port, rel=1e-10)
        summed = kind(direction="adversarial_second", reduction="sum")
        assert float(summed(targets, views).detach()) == pytest.approx(8 * port, rel=1e-10)
        cool = float(functional.kl_div(log_p(adversarial, scale / 2), log_p(other, scale / 2), reduction="batchmean", log_target=True))
        assert float(kind(direction="adversarial_second", temperature=2.0)(targets, views).detach()) == pytest.approx(cool, rel=1e-10)


def test_detach_holds_the_clean_distribution(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """With it the clean encoding gets no gradient; the released code has none."""
    method = ready("pmg_aft", tiny, data, tmp_path)
    targets, views = opened(method, data)
    for detach in (False, True):
        value = CleanConsistency(detach=detach)(targets, views)
        (gradient,) = torch.autograd.grad(value, views.clean.embedding_BD, retain_graph=True, allow_unused=True, materialize_grads=True)
        assert bool(gradient.any()) is not detach


def test_a_sum_is_over_the_whole_optimiser_step(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Two batches that accumulate give the loss of one of twice the size: Lightning divides by two, the sum counts both."""
    method = ready("pmg_aft", tiny, data, tmp_path)
    method._trainer = make_trainer(tmp_path, accumulate_grad_batches=2)
    method._trainer.datamodule = data  # type: ignore[attr-defined]
    assert method.targets(data.batches()[0]).samples_per_step == 16


def test_fare_is_zero_for_the_teacher_itself_without_attack(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """The limit case; and the loss is the formula's, summed over the width."""
    method = ready("fare", tiny, data, tmp_path)
    targets = method.targets(data.batches()[0])
    views = method.views(targets)
    views.open(targets.images, None)
    method.eval()
    assert float(method.terms["embedding_distance"](targets, views).detach()) < 1e-9  # fused attention in the teacher rounds otherwise
    targets, views = opened(method, data)
    expected = (views.adversarial.embedding_BD - targets.teacher_clean.embedding_BD).pow(2).sum(1).mean()
    torch.testing.assert_close(method.terms["embedding_distance"](targets, views), expected)


def test_methods_without_labels_train_on_captions_alone(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """FARE, Sim-CLIP and LORE ask for images only; TeCoA says that it needs classes."""
    data.batches = lambda: [Batch(data.images[:4], torch.arange(4), captions=["a", "b", "c", "d"])] * 2  # type: ignore[method-assign]
    for name in ("fare", "sim_clip", "lore", "advflyp"):
        make_trainer(tmp_path, limit_val_batches=0).fit(build(name, tiny), datamodule=data)
    with pytest.raises(DataError, match="no labels"):
        make_trainer(tmp_path, limit_val_batches=0).fit(build("tecoa", tiny), datamodule=data)


@pytest.mark.parametrize("dual", ["network", "scalar"])
def test_lores_multiplier_rises_while_the_constraint_is_violated(dual: str, tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Dual ascent by its own plain step: up while violated, down when kept, only every K-th step, whatever the tower's optimiser."""

    def run(rho: float, every: int) -> list[float]:
        """The mean multiplier of the batch in each of six steps."""
        method = build("lore", tiny, terms={"clean_constraint": {"dual": dual, "rho": rho, "every": every, "lr": 0.05}},
                       optimizer=OptimizerSpec(name="sgd", lr=1e-4, schedule="constant"))  # fmt: skip
        with torch.no_grad():  # the student has left its teacher
            for p in method.model.visual.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        term, seen = method.terms["clean_constraint"], []
        inner = term.after_step
        term.after_step = lambda step: (seen.append(float(term.figures["multiplier"])), inner(step))[1]  # type: ignore[method-assign]
        make_trainer(tmp_path, max_steps=6, limit_val_batches=0).fit(method, datamodule=MemoryData(count=8))
        return seen

    rising, falling, rare = run(1e-6, 1), run(1.0, 1), run(1e-6, 3)
    assert rising[0] == falling[0] == pytest.approx(1.0)
    assert all(later > earlier for earlier, later in pairwise(rising))
    assert all(later < earlier for earlier, later in pairwise(falling)) and min(falling) > 0
    assert rare[0] == rare[1] == rare[2] < rare[3] == rare[4] == rare[5]


def test_lores_multiplier_of_a_resumed_run_lacks_no_step(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """A callback's checkpoint of a step holds the multiplier after it: stopped after one step and resumed, it is to the bit the same."""

    def run(folder: str, stops: list[int]) -> dict[str, torch.Tensor]:
        checkpoint = None
        for stop in stops:
            method = build("lore", tiny, terms={"clean_constraint": {"dual": "scalar", "rho": 0.01, "every": 1, "lr": 0.05}})
            saver = ModelCheckpoint(tmp_path / folder, filename=str(stop), every_n_train_steps=stop)
            trainer = make_trainer(tmp_path, max_steps=stop, limit_val_batches=0, enable_checkpointing=True, callbacks=[saver])
            trainer.fit(method, datamodule=Sample(batch_size=16, holdout=0, augment="none"), ckpt_path=checkpoint)
            checkpoint = str(tmp_path / folder / f"{stop}.ckpt")
        return {name: p.detach() for name, p in method.named_parameters() if p.requires_grad}

    whole, parts = run("whole", [2]), run("parts", [1, 2])
    assert any("clean_constraint" in name for name in whole)
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


def test_lores_multiplier_is_saved_and_outside_the_towers_optimiser(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """A huge rate and decay of the tower's optimiser leave it alone; a checkpoint has it; its value at the start is ``start``."""
    method = build("lore", tiny, terms={"clean_constraint": {"start": 2.5}})
    term = method.terms["clean_constraint"]
    assert isinstance(term, CleanConstraint)
    torch.testing.assert_close(term.multiplier(torch.randn(4, 16)), torch.full((4,), 2.5))
    held = {id(p) for _, p in method.optimised()}
    assert not any(id(p) in held for p in term.parameters()) and any("clean_constraint" in key for key in method.state_dict())


def test_sim_clip_holds_each_side_constant_in_turn(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Each side gets the gradient of its own half: with nothing held it would be twice that; with both, none."""
    method = ready("sim_clip", tiny, data, tmp_path)
    targets, views = opened(method, data)
    adversarial, clean = views.adversarial.embedding_BD, views.clean.embedding_BD
    for side, other in ((adversarial, clean), (clean, adversarial)):
        (found,) = torch.autograd.grad(method.terms["siamese_cosine"](targets, views), side, retain_graph=True)
        half = -functional.cosine_similarity(side, other.detach()).mean() / 2
        torch.testing.assert_close(found, torch.autograd.grad(half, side, retain_graph=True)[0])


def test_lores_value_is_the_lagrangian(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Towards the tower ``m c``, towards the multiplier ``-c``: by finite differences of the two parts."""
    method = ready("lore_scalar", tiny, data, tmp_path)
    term = method.terms["clean_constraint"]
    targets, views = opened(method, data)
    assert isinstance(term, CleanConstraint)
    value = term(targets, views)
    clean, teacher = views.clean.embedding_BD, targets.teacher_clean.embedding_BD
    c = (clean - teacher).square().sum(1) - term.rho * teacher.square().sum(1)
    (to_tower,) = torch.autograd.grad(value, clean, retain_graph=True)
    (expected,) = torch.autograd.grad(c.mean(), clean, retain_graph=True)
    torch.testing.assert_close(to_tower, expected * term.start)
    (to_multiplier,) = torch.autograd.grad(value, term.bias)
    torch.testing.assert_close(to_multiplier, (-c.mean() * torch.sigmoid(term.bias)).detach())


def test_agft_with_certain_soft_labels_is_tecoa_on_the_teachers_answers(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """As the teacher's scale grows its labels become one-hot: TeCoA's loss and objective with the teacher's predictions as labels."""
    method = ready("agft", tiny, data, tmp_path, terms={"soft_alignment": {"scale_ratio": 1e6}})
    targets, views = opened(method, data)
    labels = targets.logits(targets.teacher_clean).argmax(1)
    logits = views.logits(views.adversarial)
    torch.testing.assert_close(method.terms["soft_alignment"](targets, views), functional.cross_entropy(logits, labels))
    judged = method.objective(targets)(targets.images, torch.arange(8)).loss_n
    usual = method._class_objective(targets.text["class"], labels, method.logit_scale)(targets.images, torch.arange(8)).loss_n
    torch.testing.assert_close(judged, usual)


def test_saft_with_one_description_of_names_is_tecoa(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """n = 1 takes the names; more than a class has of its own go round; the loss is the mean over descriptions."""
    one, tecoa = ready("saft", tiny, data, tmp_path, descriptions=1), ready("tecoa", tiny, data, tmp_path)
    assert torch.equal(one.targets(data.batches()[0]).text["descriptions"][:, 0], tecoa.class_bank("train"))
    many = ready("saft", tiny, data, tmp_path, descriptions=4)
    targets, views = opened(many, data)
    bank = targets.text["descriptions"]
    assert bank.shape == (3, 4, 16) and torch.equal(bank[:, 0], bank[:, 2]) and not torch.equal(bank[:, 0], bank[:, 1])
    each = [functional.cross_entropy(views.logits_over(views.adversarial, bank[:, j]), targets.labels) for j in range(4)]
    torch.testing.assert_close(many.terms["description_alignment"](targets, views), sum(each) / 4)


def test_descriptions_are_of_one_class_alone_and_the_gloss_is_among_them() -> None:
    """A broader term of two classes would be two rows that nothing tells apart; glosses come last in the data and second here."""
    phrases = [
        ("pug", "a", "b", "c", "dog", "vessel", "gloss of a pug"), ("urn", "vessel", "gloss of an urn"), ("jar", "vessel", "gloss of a jar")
    ]  # fmt: skip
    own = own_descriptions(phrases)
    assert own == [["pug", "gloss of a pug", "a", "b", "c", "dog"], ["urn", "gloss of an urn"], ["jar", "gloss of a jar"]]
    assert own_descriptions([("crane", "gloss 1"), ("crane", "gloss 2"), ("x",), ("x",)]) == [["gloss 1"], ["gloss 2"], ["x"], ["x"]]


def test_advflyp_holds_every_equal_caption_true(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Classes draw captions; ``thing`` fits all three; the loss is CLIP's with several truths."""
    method = ready("advflyp", tiny, data, tmp_path, name_share=0.2)
    targets, views = opened(method, data)
    assert targets.captions is not None and targets.text["captions"].shape == (8, 16)
    assert bool(targets.caption_truth_BM.diagonal().all())
    assert float(method.terms["caption_contrast"](targets, views).detach()) > 0


def test_comp_tga_is_not_tga(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """The complement multiplies the map by one minus the map of the negation."""
    method = ready("comp_tga", tiny, data, tmp_path)
    targets, views = opened(method, data)
    plain, complement = AttentionRefinement(), AttentionRefinement(complement=True)
    assert not torch.allclose(plain(targets, views), complement(targets, views))
    map_BS = complement._map(targets.teacher_clean, targets)
    assert float(map_BS.min()) >= 0 and float(map_BS.max()) <= 1


COMBINATIONS = {
    "TGA-ZSR over low-rank updates with expanded texts":
        "{class_path: aft.methods.TGAZSR, init_args: {trainable: {name: lora, rank: 2}, text_transform: {name: expansion}}}",
    "FARE with attention refinement":
        "{class_path: aft.methods.FARE, init_args: {terms: {attention_refinement: {weight: 0.5}}}}",
    "AGFT with a constraint and smoothness on the last block":
        "{class_path: aft.methods.AGFT, init_args: {trainable: {name: last}, terms: {clean_constraint: {dual: scalar}, "
        "smoothness: {weight: {start: 0.1, end: 0.0, steps: 9}}}}}",
}  # fmt: skip


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_combinations_that_no_paper_has_train_from_yaml_alone(combination: str, tmp_path: Path) -> None:
    """Any term over any method, any trainable, any text transformation, through train.py; every term has a finite value."""
    model = yaml.safe_load(COMBINATIONS[combination])
    attack = {"class_path": "aft.attacks.PGD", "init_args": {"eps": "8/255", "step_size": "4/255", "steps": 2}}
    model["init_args"] |= {"clip": {"name": "tiny"}, "attack": attack}
    trainer = {"max_steps": 2, "accelerator": "cpu", "limit_val_batches": 0, "default_root_dir": str(tmp_path / "run")}
    data = {"class_path": "datamodules.Sample", "init_args": {"batch_size": 8, "holdout": 0}}
    settings = {"model": model, "data": data, "trainer": trainer, "checkpoint": {"monitor": None}}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(settings))
    done = train.main(["fit", "-c", str(tmp_path / "mix.yaml")])
    assert done.trainer.global_step == 2 and len(done.model.terms) >= 2
    for term in done.model.terms:
        assert torch.isfinite(done.trainer.callback_metrics[f"train/{term}"])


@pytest.mark.parametrize(("term", "settings", "message"), [
    ("teacher_distillation", {"weight": -1.0}, "weight = -1.0 is negative"),
    ("teacher_distillation", {"temperature": 0.0}, "temperature = 0.0 is not above 0"),
    ("teacher_distillation", {"direction": "backwards"}, "direction"),
    ("clean_consistency", {"reduction": "median"}, "reduction"),
    ("attention_refinement", {"axis": "patch"}, "axis"),
    ("attention_refinement", {"size": 0}, "size = 0"),
    ("margin_alignment", {"function": "rising"}, "margin function"),
    ("margin_alignment", {"margin": -1.0}, "margin = -1.0 is negative"),
    ("soft_alignment", {"scale_ratio": -0.4}, "scale_ratio = -0.4"),
    ("clean_constraint", {"rho": 0.0}, "rho = 0.0"),
    ("clean_constraint", {"dual": "vector"}, "dual = 'vector'"),
    ("clean_constraint", {"every": 0}, "every = 0"),
    ("alignment", {"image": "blurred"}, "image"),
    ("alignment", {"weight": {"start": 1.0, "end": -1.0, "steps": 9}}, "is negative"),
    ("margin_alignment", {"margin": "big"}, "terms.margin_alignment.margin = 'big': give a finite number"),
    ("margin_alignment", {"margin": float("inf")}, "margin = inf: give a finite number"),
    ("clean_consistency", {"detach": "false"}, "terms.clean_consistency.detach = 'false': give true or false"),
    ("attention_refinement", {"size": 7.5}, "size = 7.5: give a whole number or null"),
    ("attention_refinement", {"complement": 1}, "complement = 1: give true or false"),
    ("clean_constraint", {"lr": True}, "lr = True: give a finite number"),
    ("text_energy", {"power": -2.0}, "terms.text_energy: power = -2.0 is not above 0"),
    ("smoothnes", {}, "smoothness"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(term: str, settings: dict[str, Any], message: str, tiny: ModelSpec) -> None:
    """Naming argument and value, with near matches where a name is wrong."""
    with pytest.raises(ConfigError, match=message):
        TeCoA(tiny, attack=ATTACK, terms={term: settings})


@pytest.mark.parametrize("make", [
    lambda tiny: TeCoA(tiny, attack=ATTACK, logit_scale=0.0),
    lambda tiny: TRADES(tiny, attack=FGSM(eps="8/255")),
    lambda tiny: SimCLIP(tiny, attack=ATTACK, away_from="parent"),
    lambda tiny: SAFT(tiny, attack=ATTACK, descriptions=0),
    lambda tiny: AdvFLYP(tiny, attack=ATTACK, name_share=2.0),
    *[lambda tiny, kind=kind: kind(tiny) for kind in (TeCoA, PMGAFT, FARE, LORE, SimCLIP, AGFT, AdvFLYP)],
])  # fmt: skip
def test_methods_refuse_what_cannot_be(make: Any, tiny: ModelSpec) -> None:
    """A scale of zero, TRADES without a random start, unknown names, no attack where one is needed."""
    with pytest.raises(ConfigError):
        make(tiny)


def test_a_teacher_of_another_width_is_refused(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """With both widths."""
    config = json.loads(json.dumps(TINY))
    config["model_cfg"]["embed_dim"] = 24
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "open_clip_config.json").write_text(json.dumps(config))
    save_file(weights.build_clip(config["model_cfg"]).state_dict(), tmp_path / "wide" / "open_clip_model.safetensors")
    method = build("pmg_aft", tiny, teacher=ModelSpec(pretrained=str(tmp_path / "wide")))
    with pytest.raises(ConfigError, match="width 24, tiny of 16"):
        make_trainer(tmp_path, limit_val_batches=0).fit(method, datamodule=data)


def test_a_resume_with_another_teacher_is_refused(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """The teacher is rebuilt, not stored: its sha256 is."""
    trainer = make_trainer(tmp_path, limit_val_batches=0, enable_checkpointing=True)
    trainer.fit(build("fare", tiny), datamodule=data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = build("fare", tiny, teacher=ModelSpec("tiny", "random"))
    with pytest.raises(WeightsError, match="teacher of sha256"):
        make_trainer(tmp_path, max_steps=4, limit_val_batches=0).fit(other, datamodule=data, ckpt_path=str(tmp_path / "x.ckpt"))


def test_what_the_data_or_the_trainer_cannot_give_is_refused(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Captions of data without phrases, captions asked by a term of a method that makes none, accumulation over a coupled loss."""
    for settings, trainer, message in (
        ({"name": "advflyp"}, {}, "no phrases"),
        ({"name": "saft"}, {}, "no phrases"),
        ({"name": "tecoa", "terms": {"caption_contrast": {}}}, {}, "terms.caption_contrast needs captions, and TeCoA makes none"),
        ({"name": "advflyp"}, {"accumulate_grad_batches": 2}, "accumulate_grad_batches = 2, but terms.caption_contrast"),
    ):
        data.class_phrases = ()
        method = build(**{"clip": tiny, **settings})  # type: ignore[arg-type]
        with pytest.raises(AftError, match=message):
            make_trainer(tmp_path, limit_val_batches=0, **trainer).fit(method, datamodule=data)


def test_tokens_of_a_tower_without_any_are_refused(data: MemoryData, tmp_path: Path) -> None:
    """A ConvNeXt pools before it projects; the error names the tower."""
    method = TGAZSR(ModelSpec("convnext_base", "random"), attack=ATTACK)
    trainer = make_trainer(tmp_path, limit_val_batches=0)
    method._trainer, trainer.datamodule = trainer, data  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="terms.attention_refinement needs patch tokens: image tower ConvNeXt of timm"):
        method.setup("fit")  # before the first step


def test_lores_multiplier_goes_on_where_it_stopped(tiny: ModelSpec, tmp_path: Path) -> None:
    """With accumulated gradients: a resume makes no step of half a gradient. To the bit."""

    def fit(epochs: int, folder: str, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
        trainer = make_trainer(tmp_path, max_steps=-1, max_epochs=epochs, limit_val_batches=0, accumulate_grad_batches=2)
        method = build("lore_scalar", tiny)
        trainer.fit(method, datamodule=MemoryData(count=32), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / folder)
        return {key: value.clone() for key, value in method.state_dict().items()}

    whole, _ = fit(2, "whole"), fit(1, "half")
    resumed = fit(2, "resumed", tmp_path / "half")
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_lores_multiplier_does_not_see_the_factor_of_fp16(tiny: ModelSpec, tmp_path: Path) -> None:
    """A gradient scaler multiplies the loss: the multiplier's step is that of an unscaled run; one that overflows makes none."""

    def multiplier(**settings: Any) -> float:
        method = build("lore_scalar", tiny, optimizer=OptimizerSpec(name="sgd", lr=1e-6, schedule="constant"))
        make_trainer(tmp_path, max_steps=2, limit_val_batches=0, **settings).fit(method, datamodule=MemoryData(count=16))
        return float(method.terms["clean_constraint"].bias.detach())

    def scaled(by: float) -> list[MixedPrecision]:
        return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=by))]

    plain, start = multiplier(), float(torch.tensor(1.0).expm1().log())
    assert abs(plain - start) > 1e-3
    assert multiplier(plugins=scaled(256.0)) == pytest.approx(plain, abs=1e-2 * abs(plain - start))
    assert multiplier(plugins=scaled(2.0**126)) == start
