"""Tuned and expanded class texts under any method: what learns is read, what is trained on is what is measured, or it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from aft.attacks import PGD
from aft.batch import Batch
from aft.clip import ModelSpec, load_model
from aft.clip.text_transform import TextTransformSpec
from aft.errors import ConfigError, DataError
from aft.losses import rival_margins
from aft.methods import TRADES, AdvFLYP, Phase, TeCoA
from tests.conftest import MemoryData, make_trainer
from tests.methods.recipes import RECIPES, build
from tests.methods.test_all_methods import ready

ATTACK = PGD(eps="8/255", step_size="4/255", steps=1)
RESIDUAL = TextTransformSpec("residual")
#: Terms that read class texts or captions as they are tuned.
TUNES = {"tecoa", "pmg_aft", "tga_zsr", "comp_tga", "laat", "tima", "agft", "advflyp", "trades"}


@pytest.mark.parametrize("name", RECIPES)
def test_tuned_texts_move_or_are_refused(name: str, tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """A residual that no term reads would be saved as tuned, and would be the one that it was."""
    method = build(name, tiny, text_transform=RESIDUAL)
    before = {key: value.clone() for key, value in method.model.text_transform.state_dict().items()}
    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=0)
    if name not in TUNES | {other for other in RECIPES if other.removesuffix("_released") in TUNES}:
        with pytest.raises(ConfigError, match="text_transform = residual is to learn, and no term of this run reads tuned texts"):
            trainer.fit(method, datamodule=data)
        return
    trainer.fit(method, datamodule=data)
    after = method.model.text_transform.state_dict()
    assert any(not torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("name", ["advflyp", "tecoa", "saft"])
def test_expanded_texts_are_trained_on_as_they_are_measured(name: str, tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Captions and descriptions go through the transformation that class texts go through."""
    method = ready(name, tiny, data, tmp_path, text_transform=TextTransformSpec("expansion"))
    targets = method.targets(data.batches()[0])
    bank = {"advflyp": "captions", "saft": "descriptions", "tecoa": "class"}[name]
    names = data.class_lists["train"]
    texts = targets.captions.texts if targets.captions is not None else [data.templates[0].format(one) for one in names]
    raw = method.model.encode_text(texts).detach()
    seen = targets.text[bank][:, 0] if bank == "descriptions" else targets.text[bank]
    torch.testing.assert_close(seen, method.model.text_transform(raw), atol=1e-5, rtol=0)
    assert not torch.allclose(seen, raw, atol=1e-2)


@pytest.mark.parametrize("term", ["text_energy", "image_aware_distillation"])
def test_terms_on_frozen_texts_are_refused(term: str, tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """They would be constants: a summand that trains nothing."""
    with pytest.raises(ConfigError, match=f"terms.{term} depends on nothing that learns.*residual"):
        make_trainer(tmp_path, limit_val_batches=0).fit(TeCoA(tiny, attack=ATTACK, terms={term: {}}), datamodule=data)
    tuned = TeCoA(tiny, attack=ATTACK, terms={term: {}}, text_transform=RESIDUAL)
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(tuned, datamodule=data)


def test_parts_of_a_step_that_a_callback_asks_for_are_refused_too(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """At the start the trainer has one part; the schedule makes them two in the second epoch."""
    trainer = make_trainer(tmp_path, max_epochs=3, max_steps=-1, limit_val_batches=0, callbacks=[GradientAccumulationScheduler({1: 2})])
    with pytest.raises(ConfigError, match="accumulate_grad_batches = 2, but terms.caption_contrast is defined on the whole batch"):
        trainer.fit(build("advflyp", tiny), datamodule=data)
    assert trainer.current_epoch == 1


def test_divergences_over_captions_couple_the_batch(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Also without the contrast: captions are those of all images."""
    method = AdvFLYP(tiny, attack=ATTACK, terms={"caption_contrast": None})
    with pytest.raises(ConfigError, match="terms.teacher_distillation is defined on the whole batch"):
        make_trainer(tmp_path, accumulate_grad_batches=2, limit_val_batches=0).fit(method, datamodule=data)


def test_what_is_asked_of_the_wrong_method_or_data_is_said(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """Descriptions of a method that makes none; captions of a batch without captions or labels; margins between one class."""
    with pytest.raises(ConfigError, match="terms.description_alignment needs descriptions, and TeCoA makes none: use SAFT"):
        make_trainer(tmp_path, limit_val_batches=0).fit(TeCoA(tiny, attack=ATTACK, terms={"description_alignment": {}}), datamodule=data)
    bare = Batch(data.images[:2], torch.arange(2))
    with pytest.raises(DataError, match="neither captions nor labels"):
        ready("advflyp", tiny, data, tmp_path).captions(bare)
    with pytest.raises(ConfigError, match="captions_per"):
        AdvFLYP(tiny, attack=ATTACK, captions_per="photo")
    with pytest.raises(ConfigError, match="margins between 1 class"):
        rival_margins(torch.ones(1, 4), 1.0)


def test_a_teacher_without_tokens_is_named(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """The student has them; the teacher's tower pools before it projects."""
    method = ready("tga_zsr", tiny, data, tmp_path)
    blind = load_model(tiny)
    blind.visual.pool_type = "avg"
    method._teacher, method._load_teacher = (), lambda: blind  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="teacher = tiny is asked for patch tokens"):
        method.setup("fit")


def test_numbers_that_are_none_are_refused(tiny: ModelSpec) -> None:
    """An infinite scale, and true in the place of a weight."""
    with pytest.raises(ConfigError, match="logit_scale = inf"):
        TeCoA(tiny, attack=ATTACK, logit_scale=float("inf"))
    with pytest.raises(ConfigError, match="weight = True"):
        TeCoA(tiny, attack=ATTACK, terms={"alignment": {"weight": True}})


def test_trades_starts_at_random_in_every_phase(tiny: ModelSpec) -> None:
    """A phase may not take the random start away."""
    with pytest.raises(ConfigError, match=r"random_start = false.*every phase"):
        TRADES(tiny, attack=ATTACK, phases=[Phase(until=0.5, attack={"random_start": False})])
