"""Cheaper adversarial training: phases, warm starts, free replay. What each computes, its limits, its resume."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from aft.attacks import PGD, sample_keys
from aft.clip import ModelSpec, ZeroShotModel
from aft.errors import ConfigError, RunError
from aft.methods import ContrastivePretraining, OptimizerSpec, Phase, TeCoA, WarmStart
from aft.methods.phases import PLAIN, kept_patches, phase_at
from datamodules import Sample
from tests.conftest import Calls, MemoryData, make_trainer
from tests.methods.recipes import RECIPES, build

PGD2 = PGD(eps="8/255", step_size="4/255", steps=2)
FREE = WarmStart(free=True, capacity=64)


def tecoa(**settings: Any) -> TeCoA:
    """TeCoA on the tiny model, at a rate at which everything moves."""
    defaults: dict[str, Any] = {"attack": PGD2, "optimizer": OptimizerSpec(name="sgd", lr=0.1, schedule="constant")}
    return TeCoA(ModelSpec("tiny"), **(defaults | settings))


def sample(**settings: Any) -> Sample:
    """Real photographs with the loader of real runs."""
    return Sample(batch_size=16, holdout=0, train_classes=["cat", "dog", "ship"], **({"augment": "crop_flip"} | settings))


def trained(folder: Path, method: TeCoA, data: L.LightningDataModule, steps: int = 4, **settings: Any) -> dict[str, Tensor]:
    """The weights after so many steps."""
    make_trainer(folder, max_steps=steps, limit_val_batches=0, **settings).fit(method, datamodule=data)
    return {name: value.clone() for name, value in method.model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """To the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- phases ---------------------------------------------------------------------------------------------------------------------------


def test_a_phase_is_a_share_of_the_steps() -> None:
    """Boundaries are whole steps; after the last phase nothing differs."""
    phases = [Phase(until=0.3, clean=True), Phase(until=0.7, attack={"steps": 1})]
    assert [(p := phase_at(phases, step, 10)).until for step in range(10)] == [0.3] * 3 + [0.7] * 4 + [1.0] * 3 and p is PLAIN
    assert phase_at([], 0, 10) is PLAIN


@pytest.mark.parametrize("phases", [[Phase(until=1.0)], [Phase(until=0.5, attack={"steps": 2}), Phase(until=0.75, drop_patches=0.0)],
                                    [Phase(until=1.0, resolution=32)]])  # fmt: skip
def test_phases_that_change_nothing_are_plain_training(phases: list[Phase], tmp_path: Path) -> None:
    """To the bit: the limit of a schedule."""
    plain = trained(tmp_path, tecoa(), sample())
    assert equal(plain, trained(tmp_path, tecoa(phases=phases), sample()))


def test_each_phase_has_its_own_attack(data: MemoryData, tmp_path: Path) -> None:
    """Clean, then one small step, then the method's own: encoder calls and the size of the perturbation in every step."""
    method = tecoa(phases=[Phase(until=0.25, clean=True), Phase(until=0.5, attack={"steps": 1, "eps": "2/255", "step_size": "2.5/255"})])
    calls, seen = Calls(method.model.visual), []

    class Look(L.Callback):
        """After each step."""

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            x = pl_module.last_adversarial_BCHW
            seen.append((calls.count, 0.0 if x is None else round(float((x - batch.images).abs().max()) * 255, 2)))

    trained(tmp_path, method, data, steps=4, max_epochs=-1, callbacks=[Look()])
    assert seen == [(1, 0.0), (3, 2.0), (6, 8.0), (9, 8.0)]


@pytest.mark.parametrize("name", RECIPES)
def test_every_method_takes_every_option(name: str, data: MemoryData, tmp_path: Path) -> None:
    """Clean, weaker, and free steps; fewer patches and pixels where no patch tokens are compared. All trained weights stay finite."""
    less = {} if "tga" in name else {"drop_patches": 0.5, "resolution": 16}
    phases = [Phase(until=0.34, clean=True), Phase(until=0.67, attack={"steps": 1}, **less)]
    method = build(name, ModelSpec("tiny"), phases=phases, warm_start=FREE)
    before = copy.deepcopy(method.model.visual.state_dict())
    after = trained(tmp_path, method, data, steps=3)
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(before[key], after[f"clip.visual.{key}"]) for key in before)


def test_pretraining_without_an_attack_takes_phases(data: MemoryData, tmp_path: Path) -> None:
    """What sees less needs no attack."""
    method = ContrastivePretraining(ModelSpec("tiny", "random"), phases=[Phase(until=0.5, drop_patches=0.5)])
    make_trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(method, datamodule=data)


@pytest.mark.parametrize(("settings", "words"), [
    ({"until": 0.0}, "outside"), ({"until": 1.5}, "outside"), ({"until": 1.0, "drop_patches": 1.0}, "outside"),
    ({"until": 1.0, "clean": True, "attack": {"steps": 1}}, "one of the two"),
])  # fmt: skip
def test_a_phase_out_of_range(settings: dict[str, Any], words: str) -> None:
    """Named with what is allowed."""
    with pytest.raises(ConfigError, match=words):
        Phase(**settings)


def test_the_record_has_the_radius_that_the_run_ends_with() -> None:
    """A phase that ends before the run does not count, one that lasts to its end does."""
    for phase, eps in [
        (Phase(until=0.9, attack={"eps": "2/255"}), 8 / 255), (Phase(until=1.0, attack={"eps": "2/255"}), 2 / 255),
        (Phase(until=1.0, attack={"steps": 1}), 8 / 255), (Phase(until=1.0, clean=True), None),
    ]:  # fmt: skip
        assert tecoa(phases=[phase]).eps_trained == eps


@pytest.mark.parametrize(("settings", "words"), [
    ({"phases": [Phase(until=0.5), Phase(until=0.5)]}, "later than the one before"),
    ({"phases": [Phase(until=0.5, attack={"step": 1})]}, "did you mean 'steps'"),
    ({"phases": [Phase(until=0.5, attack={"steps": 0})]}, "steps"),
])  # fmt: skip
def test_phases_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    """Refused when the method is built."""
    with pytest.raises(ConfigError, match=words):
        tecoa(**settings)


def test_phases_of_a_run_that_do_not_fit_its_tower_terms_or_end(data: MemoryData, tmp_path: Path) -> None:
    """Refused before the first step."""
    for method, words in [
        (tecoa(phases=[Phase(until=0.5, resolution=20)]), "take one of 8, 16, 24, 32"),
        (build("tga_zsr", ModelSpec("tiny"), phases=[Phase(until=0.5, drop_patches=0.5)]), "compare patch tokens"),
        (tecoa(phases=[Phase(until=0.5, clean=True)]), "set trainer.max_steps"),
    ]:
        with pytest.raises(ConfigError, match=words):
            make_trainer(tmp_path, max_steps=-1, max_epochs=-1, limit_val_batches=0).fit(method, datamodule=data)
    with pytest.raises(ConfigError, match="there is none"):
        ContrastivePretraining(ModelSpec("tiny", "random"), phases=[Phase(until=0.5, attack={"steps": 1})])


# --- a tower that sees less ---------------------------------------------------------------------------------------------------------------


def test_the_attack_sees_what_training_sees_and_the_teacher_sees_all(data: MemoryData, tmp_path: Path) -> None:
    """Tokens of every forward in a step of FARE: two attack forwards and one trained one of 4 kept patches, the teacher's of all 16."""
    method = build("fare", ModelSpec("tiny"), phases=[Phase(until=1.0, drop_patches=0.75)])
    student, teacher = [], []
    method.model.visual.transformer.register_forward_pre_hook(lambda module, inputs: student.append(inputs[0].shape[1]))
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    load = method._load_teacher

    def watched() -> ZeroShotModel:
        """The teacher, with its tokens counted."""
        found = load()
        found.visual.transformer.register_forward_pre_hook(lambda module, inputs: teacher.append(inputs[0].shape[1]))
        return found

    method._load_teacher = watched  # type: ignore[method-assign]
    trainer.fit(method, datamodule=data)
    assert student == [5, 5, 5] and teacher == [17]


def test_kept_patches_are_counted_noise(model: ZeroShotModel) -> None:
    """A function of seed and step; every patch has its turn; no global generator is moved."""
    phase, before = Phase(until=1.0, drop_patches=0.75), torch.get_rng_state()
    chosen = [kept_patches(phase, model.visual, 0, step) for step in range(200)]
    assert all(c is not None and len(c) == 4 and (c.diff() > 0).all() for c in chosen)
    assert torch.equal(before, torch.get_rng_state())
    counts = torch.stack([c for c in chosen if c is not None]).flatten().bincount(minlength=16)
    assert counts.min() > 25 and counts.max() < 80  # 50 each on average, standard deviation 6
    again = kept_patches(phase, model.visual, 0, 7)
    assert again is not None and torch.equal(again, chosen[7]) and not torch.equal(again, kept_patches(phase, model.visual, 1, 7))  # type: ignore[arg-type]
    assert kept_patches(Phase(until=1.0), model.visual, 0, 7) is None
    tiniest = kept_patches(Phase(until=1.0, drop_patches=0.999), model.visual, 0, 7)
    assert tiniest is not None and len(tiniest) == 1


# --- free -------------------------------------------------------------------------------------------------------------------------------


def test_free_is_one_pass_and_the_step_that_its_gradient_tells(data: MemoryData, tmp_path: Path) -> None:
    """One forward a step. By hand: descend on the weights at the perturbed images, ascend on the images by the same gradient."""
    method = tecoa(warm_start=FREE, optimizer=OptimizerSpec(name="sgd", lr=0.05, momentum=0.0, weight_decay=0.0, schedule="constant"))
    model, batch = copy.deepcopy(method.model), data.batches()[0]
    data.batches = lambda: [batch] * 3  # type: ignore[method-assign]  # a replay
    text = model.text_bank(data.class_lists["train"], data.templates)
    keys, learning = sample_keys(0, 0, batch.index), [p for p in model.visual.parameters()]
    x = PGD2.start(batch.images, keys)
    for _ in range(3):
        leaf = x.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(model(leaf, text), batch.labels)  # type: ignore[arg-type]
        *slopes, uphill = torch.autograd.grad(loss, [*learning, leaf])
        with torch.no_grad():
            for weight, slope in zip(learning, slopes, strict=True):
                weight -= 0.05 * slope
            change = (batch.images + (leaf - batch.images) + 4 / 255 * uphill.sign() - batch.images).clamp(-8 / 255, 8 / 255)
            x = (batch.images + ((batch.images + change).clamp(0, 1) - batch.images).half()).clamp(0, 1)
    calls = Calls(method.model.visual)
    after = trained(tmp_path, method, data, steps=3)
    assert calls.count == 3
    for name, value in model.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=1e-3, atol=1e-5)


def test_free_perturbations_grow_in_the_ball(tmp_path: Path) -> None:
    """Over replays of a batch, for L-inf and L2: inside ball and box, and the loss at the perturbed images rises above the clean one."""
    for attack in (PGD2, PGD(eps=0.5, relative_step_size=0.5, steps=1, norm="l2")):
        method = tecoa(attack=attack, warm_start=FREE, optimizer=OptimizerSpec(name="sgd", lr=1e-9, schedule="constant"))
        seen: list[Tensor] = []

        class Look(L.Callback):
            """After each step."""

            def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, seen=seen) -> None:
                x = pl_module.last_adversarial_BCHW
                assert not x.requires_grad and x.min() >= 0 and x.max() <= 1
                change = (x - batch.images).flatten(1).double()
                order = float("inf") if pl_module.attack.norm == "linf" else 2
                assert torch.linalg.vector_norm(change, order, dim=1).max() <= pl_module.attack.eps * (1 + 1e-6)
                seen.append(outputs["loss"])

        trained(tmp_path, method, sample(replay=4), steps=4, callbacks=[Look()])
        assert seen[0] < seen[1] < seen[3]


def test_free_without_a_term_that_looks_at_adversarial_images(data: MemoryData, tmp_path: Path) -> None:
    """Said, not silently clean training."""
    method = tecoa(warm_start=FREE, terms={"alignment": {"image": "clean"}})
    with pytest.raises(ConfigError, match="no term looks at the adversarial images"):
        trained(tmp_path, method, data)


# --- resume -------------------------------------------------------------------------------------------------------------------------------

CHEAP: dict[str, Callable[[], tuple[dict[str, Any], dict[str, Any]]]] = {
    "phases": lambda: (
        {"phases": [Phase(until=0.3, clean=True), Phase(until=0.6, attack={"steps": 1}, drop_patches=0.5, resolution=24)]}, {}),
    "warm_start": lambda: ({"warm_start": WarmStart(capacity=32), "attack": PGD(eps="8/255", step_size="4/255", steps=1)}, {"replay": 2}),
    "free": lambda: ({"warm_start": FREE}, {"replay": 3}),
}  # fmt: skip


class StopAfter(L.Callback):
    """Ends a run after so many steps, without changing how long it is meant to be."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Where it is time."""
        trainer.should_stop = trainer.global_step >= self.step


@pytest.mark.parametrize("kind", CHEAP)
def test_interrupted_is_uninterrupted(kind: str, tmp_path: Path) -> None:
    """Eight steps, and the same with stops in the middle of a phase and of a replay, end in the same weights, to the bit."""

    def run(folder: str, stops: list[int]) -> dict[str, Tensor]:
        checkpoint = None
        for stop in stops:
            method_settings, data_settings = CHEAP[kind]()
            method = tecoa(**method_settings)
            saver = ModelCheckpoint(tmp_path / folder, filename=str(stop), every_n_train_steps=stop)
            trainer = make_trainer(tmp_path / folder, max_steps=8, limit_val_batches=0, enable_checkpointing=True,
                                   callbacks=[saver, StopAfter(stop)])  # fmt: skip
            trainer.fit(method, datamodule=sample(**data_settings), ckpt_path=checkpoint)
            assert trainer.global_step == stop
            checkpoint = str(tmp_path / folder / f"{stop}.ckpt")
        return {name: value.clone() for name, value in method.model.state_dict().items()}

    assert equal(run("whole", [8]), run("parts", [1, 4, 8]))


def test_replay_1_is_off_and_replay_repeats_each_batch(tmp_path: Path) -> None:
    """The same batches with the same augmentation, each so often; the length of a pass says so; the loader goes on inside a replay."""
    plain, once, thrice = (sample(**settings).train_dataloader() if not sample(**settings).setup("fit") else None
                           for settings in ({}, {"replay": 1}, {"replay": 3}))  # fmt: skip
    assert plain is not None and once is not None and thrice is not None
    first, same, repeated = list(plain), list(once), list(thrice)
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, same, strict=True)) and plain.state_dict() == once.state_dict()
    assert len(repeated) == len(thrice) == 3 * len(first)
    assert all(torch.equal(repeated[place].images, first[place // 3].images) for place in range(len(repeated)))
    going = iter(thrice)
    for _ in range(4):
        next(going)
    state = thrice.state_dict()
    other = sample(replay=3)
    other.setup("fit")
    resumed = other.train_dataloader()
    resumed.load_state_dict(state)
    rest = list(resumed)
    assert len(rest) == len(repeated) - 4 and all(torch.equal(a.images, b.images) for a, b in zip(rest, repeated[4:], strict=True))
    changed = sample(replay=2)
    changed.setup("fit")
    loader = changed.train_dataloader()
    loader.load_state_dict(state)
    with pytest.raises(RunError, match="replay"):
        next(iter(loader))
