"""Terms over methods: one from outside, any over any, by name or dotted path, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from aft.attacks import PGD
from aft.clip import ModelSpec
from aft.errors import ConfigError
from aft.methods import AdversarialFineTuning, Ramp, Term, terms
from aft.methods.targets import Targets
from aft.methods.views import Views
from tests.conftest import Calls, MemoryData, make_trainer
from tests.methods.recipes import tecoa


@dataclass(eq=False)
class Closeness(Term):
    """A term from outside the package: stay near the teacher."""

    scale: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset({"teacher_clean"})

    def __call__(self, targets: Targets, views: Views) -> Tensor:
        """Mean squared distance to the teacher's clean embedding."""
        return self.scale * (views.adversarial.embedding_BD - targets.teacher_clean.embedding_BD).square().sum(1).mean()


class Dummy(AdversarialFineTuning):
    """A method from outside the package."""

    method: ClassVar[str] = "dummy"
    default_terms: ClassVar[dict[str, Term]] = {"closeness": Closeness()}


def test_a_method_from_outside_trains(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """One class and one term are enough; k + 1 student forwards, one teacher forward; the teacher is in no checkpoint."""
    method = Dummy(tiny, attack=PGD(eps="8/255", step_size="4/255", steps=2))
    student = Calls(method.model.visual)
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0, enable_checkpointing=True)
    trainer.fit(method, datamodule=data)
    assert student.count == 3 and method.teacher is not None and not method.teacher.training
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert not any("teacher" in key for key in saved["state_dict"]) and saved["aft"]["model"]["method"] == "dummy"


def test_any_term_lies_over_any_method(tiny: ModelSpec) -> None:
    """By registered name or dotted path, with its settings; null takes a term out."""
    method = tecoa(
        tiny,
        terms={
            "tests.methods.test_composition.Closeness": {"weight": {"start": 0, "end": 1, "steps": 4}, "scale": 2.0},
            "alignment": {"weight": 0.5},
        },
    )
    assert method.terms["alignment"].weight == 0.5 and "teacher_clean" in method.needs
    closeness = method.terms["tests.methods.test_composition.Closeness"]
    assert [closeness.weight_at(step) for step in (0, 2, 4, 9)] == [0.0, 0.5, 1.0, 1.0]
    with pytest.raises(ConfigError, match="no loss term is left"):
        tecoa(tiny, terms={"alignment": None})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"alignmnt": {}}, "unknown term 'alignmnt': did you mean 'alignment'"),
        ({"alignment": {"wieght": 1}}, "unknown setting of term 'alignment' 'wieght': did you mean 'weight'"),
        ({"os.path.join": {}}, "unknown term 'os.path.join'"),
        ({"alignmnt": None}, "did you mean 'alignment'"),
        ({"alignment": 3}, "give settings such as"),
        ({"alignment": {"weight": "abc"}}, "not a finite number"),
        ({"alignment": {"weight": float("nan")}}, "not a finite number"),
        ({"alignment": {"weight": {"start": 0, "ende": 1}}}, "exactly the keys start, end, steps"),
    ],
)
def test_unknown_terms_and_settings_list_near_matches(tiny: ModelSpec, overrides: dict[str, Any], words: str) -> None:
    """Nothing is ignored."""
    with pytest.raises(ConfigError, match=words):
        tecoa(tiny, terms=overrides)


def test_a_term_with_an_unknown_need_is_refused() -> None:
    """A need that nobody meets would be a crash in the first step."""

    class Odd(Term):
        needs: ClassVar[frozenset[str]] = frozenset({"tockens"})

    with pytest.raises(ConfigError, match="did you mean 'tokens'"):
        terms.register_term("odd", Odd)


def test_an_unknown_text_bank_is_named(tiny: ModelSpec, data: MemoryData, tmp_path: Path) -> None:
    """A typing error in a term's bank."""
    with pytest.raises(ConfigError, match="did you mean 'class'"):
        make_trainer(tmp_path).fit(tecoa(tiny, terms={"alignment": {"bank": "clas"}}), datamodule=data)


def test_a_ramp_is_a_line() -> None:
    """And stays at its end."""
    assert [Ramp(1.0, 3.0, 2).at(step) for step in range(4)] == [1.0, 2.0, 3.0, 3.0]
