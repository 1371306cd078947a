"""The defences by their ids, and how a setting becomes a defended model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from aft.clip.model import ZeroShotModel
from aft.clip.stages import Draw
from aft.defenses.anti_adversary import AntiAdversary
from aft.defenses.aom import AOM
from aft.defenses.base import Defended
from aft.defenses.baselines import LowPass, RandomNoise, ViewEnsemble
from aft.defenses.clipure import CLIPureCosClosed, CLIPureCosRelease, CLIPureCosSane
from aft.defenses.clipure_diff import CLIPureDiff
from aft.defenses.ttc import TTC
from aft.errors import ConfigError, unknown_name

#: Every defence by its id on cards.
DEFENSES: dict[str, type[Defended]] = {
    kind.name: kind
    for kind in (
        RandomNoise, LowPass, ViewEnsemble, AntiAdversary, TTC, AOM, CLIPureCosRelease, CLIPureCosSane, CLIPureCosClosed, CLIPureDiff,
    )
}  # fmt: skip


@dataclass(frozen=True)
class DefenseSpec:
    """Which defence at test time, and its settings.

    Args:
        name: noise, low_pass, tte, anti_adversary, ttc, aom, clipure_cos_release, clipure_cos_sane, clipure_cos_closed or clipure_diff.
        settings: of the defence, as its class has them (docs/defenses.md); lengths in units of the pixel range, such as 4/255.

    Raises:
        ConfigError: an unknown name or setting; values are checked when it is built.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in DEFENSES:
            raise ConfigError(unknown_name("defence", str(self.name), DEFENSES))
        known = settings_of(self.name)
        for key in self.settings:
            if key not in known:
                raise ConfigError(unknown_name(f"setting of {self.name}", str(key), known))

    def build(self, model: ZeroShotModel) -> Defended:
        """The model behind this defence.

        Raises:
            ConfigError: a value out of range, or one of another kind.
        """
        try:
            return DEFENSES[self.name](model, **self.settings)
        except TypeError as error:
            raise ConfigError(f"a setting of {self.name} is of the wrong kind ({error}): given {self.settings}.") from error


def settings_of(name: str) -> dict[str, Any]:
    """The settings of a defence with their defaults."""
    parameters = inspect.signature(DEFENSES[name]).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}


def defend(model: ZeroShotModel, name: str, **settings: Any) -> Defended:
    """A model behind a defence.

    Args:
        model: any plain model of the project.
        name: id of the defence.
        **settings: of the defence.

    Raises:
        ConfigError: an unknown name or setting (near matches are named), a value out of range, or a model that is defended already.

    Example:
        >>> from aft.clip import load_model
        >>> defend(load_model("miniclip32"), "low_pass", sigma=1.0).defense
        {'name': 'low_pass', 'settings': {'sigma': 1.0}}
    """
    return DefenseSpec(name, settings).build(model)


def open_gates(model: ZeroShotModel, images_nCHW: Tensor, draw: Draw | None = None) -> dict[str, Tensor]:
    """On which images each gate of a defence lets it act, bool ``[n]`` by the name of the stage; empty where there is no gate."""
    stages = model.stages
    if stages.pixels is not None and stages.embedding is not None:
        raise ConfigError("open_gates looks at one stage alone: the images that the second one sees depend on the first.")
    return {name: stage.gate(images_nCHW, draw).open_n for name, stage in stages.declared.items() if stage.gate is not None}
