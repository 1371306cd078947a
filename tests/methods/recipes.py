"""Every method with small settings: what the tests of all methods go through."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from aft.attacks import PGD
from aft.clip import ModelSpec
from aft.methods import (
    AGFT,
    FARE,
    LAAT,
    LORE,
    PMGAFT,
    SAFT,
    TGAZSR,
    TIMA,
    TRADES,
    AdversarialFineTuning,
    AdvFLYP,
    OptimizerSpec,
    SimCLIP,
    TeCoA,
)


@dataclass(frozen=True)
class Recipe:
    """A method and what a step of it costs: forwards beside the attack's, with a weight gradient and without."""

    kind: type[AdversarialFineTuning]
    trained: int = 1
    frozen: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def forwards(self) -> int:
        """Beyond the k of the attack: DESIGN's table."""
        return self.trained + self.frozen


COMPLEMENT = {"attention_refinement": {"weight": 0.1, "complement": True}, "attention_constraint": {"weight": 0.07, "complement": True}}
OVER_TOKENS = {name: {"axis": "token", "size": 48} for name in ("attention_refinement", "attention_constraint")}
RELEASED = {"siamese_cosine": None, "teacher_cosine": {"weight": 0.5}}
SUMMED = {name: {"direction": "adversarial_second", "reduction": "sum"} for name in ("teacher_distillation", "clean_consistency")}
RECIPES = {
    "tecoa": Recipe(TeCoA),
    "pmg_aft": Recipe(PMGAFT, trained=2, frozen=1),
    "pmg_aft_released": Recipe(PMGAFT, trained=2, frozen=1, settings={"logit_scale": 1.0, "terms": SUMMED}),
    "tga_zsr": Recipe(TGAZSR, trained=2, frozen=1),
    "tga_zsr_released": Recipe(TGAZSR, trained=2, frozen=1, settings={"terms": OVER_TOKENS}),
    "comp_tga": Recipe(TGAZSR, trained=2, frozen=1, settings={"terms": COMPLEMENT}),
    "laat": Recipe(LAAT, trained=2),
    "tima": Recipe(TIMA, frozen=1),
    "fare": Recipe(FARE, frozen=1),
    "sim_clip": Recipe(SimCLIP, trained=2, frozen=1),
    "sim_clip_released": Recipe(SimCLIP, frozen=1, settings={"terms": RELEASED, "away_from": "teacher"}),
    "lore": Recipe(LORE, trained=2, frozen=1),
    "lore_scalar": Recipe(LORE, trained=2, frozen=1, settings={"terms": {"clean_constraint": {"dual": "scalar"}}}),
    "agft": Recipe(AGFT, frozen=1),
    "advflyp": Recipe(AdvFLYP, trained=2, frozen=1),
    "saft": Recipe(SAFT),
    "trades": Recipe(TRADES, trained=2, frozen=1),
}


def build(name: str, clip: ModelSpec, **settings: Any) -> AdversarialFineTuning:
    """The method on this model, with a two-step attack and a rate at which everything moves."""
    defaults: dict[str, Any] = {
        "attack": PGD(eps="8/255", step_size="4/255", steps=2),
        "optimizer": OptimizerSpec(name="sgd", lr=0.1, schedule="constant"),
    }
    return RECIPES[name].kind(clip, **(defaults | RECIPES[name].settings | settings))


def tecoa(tiny: ModelSpec, **settings: Any) -> TeCoA:
    """TeCoA on the tiny model, with a two-step attack."""
    defaults: dict[str, Any] = {"attack": PGD(eps="8/255", step_size="4/255", steps=2), "optimizer": OptimizerSpec(name="sgd", lr=0.1)}
    return TeCoA(tiny, **(defaults | settings))
