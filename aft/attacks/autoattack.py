"""AutoAttack's own code under our contract: the four attacks of the package ``pyautoattack``, one at a time.

The package repackages the authors' repository (fra31/auto-attack, MIT) so that it can be installed by name.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from aft.attacks.base import Adversarial, Attack, Objective
from aft.attacks.objectives import ClassificationObjective
from aft.attacks.pgd import need_at_least_one
from aft.attacks.search import value
from aft.attacks.threat_model import Norm
from aft.errors import ConfigError, InputError, unknown_name

StockName = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"]
MODULES = {
    "apgd-ce": "autopgd_base",
    "apgd-dlr": "autopgd_base",
    "apgd-t": "autopgd_base",
    "fab-t": "fab_pt",
    "square": "square",
}


@dataclass(frozen=True, kw_only=True)
class StockAttack(Attack):
    """One attack of AutoAttack, run by the authors' code on the images of a batch; its answer is cut to the ball and judged afresh.

    Its random numbers come from torch's global generator, which is seeded for it and then put back; so, unlike our own attacks, an
    image's result may depend on its neighbours in the batch.

    Args:
        eps: radius in units of the pixel range, such as ``4/255``.
        attack: its name in AutoAttack.
        norm: ``linf`` or ``l2``.
        steps: iterations; queries of ``square``.
        targets: wrong classes that ``apgd-t`` and ``fab-t`` aim at.
        eot: forward passes over which a gradient is averaged, for random models (APGD alone).
        seed: of the generator.

    Raises:
        ConfigError: a setting is out of range, or the package is missing.
        InputError: the objective is no classifier.

    Reference:
        Croce and Hein, arXiv 2003.01690; package pyautoattack.
    """

    name: ClassVar[str] = "autoattack"

    eps: float | str
    attack: StockName
    norm: Norm = "linf"
    steps: int = 100
    targets: int = 9
    eot: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", self.threat.radius)
        need_at_least_one(steps=self.steps, targets=self.targets, eot=self.eot)
        if self.attack not in MODULES:
            raise ConfigError(unknown_name("attack of AutoAttack", str(self.attack), MODULES))
        if self.norm == "l1":
            raise ConfigError("norm = 'l1': AutoAttack has other settings there, which are not made here; use PGD and APGD for l1.")

    def describe(self) -> dict[str, Any]:
        """The settings as a plain dictionary, for result cards."""
        told = {"name": self.name, "attack": self.attack, "norm": self.norm, "eps": self.threat.radius, "steps": self.steps,
                "step_size": "adaptive", "restarts": 1, "keep": "best", "eot": self.eot, "seed": self.seed}  # fmt: skip
        return {**told, "targets": self.targets} if self.attack.endswith("-t") else told

    def search(self, objective: Objective, x_BCHW: Tensor, keys_B: Tensor) -> Adversarial:
        """The package's ``perturb``; see :class:`StockAttack`."""
        if not isinstance(objective, ClassificationObjective):
            raise InputError(f"{type(objective).__name__} is no classifier: AutoAttack needs logits and labels.")
        module, logits = package(MODULES[self.attack]), objective.logits
        devices = [x_BCHW.device] if x_BCHW.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            found_BCHW = self._stock(module, lambda x: logits(x).float(), str(x_BCHW.device)).perturb(x_BCHW.clone(), objective.labels_B)
        rows_B = torch.arange(len(x_BCHW), device=x_BCHW.device)
        cut_BCHW = self.threat.project(found_BCHW.detach().to(x_BCHW).nan_to_num(0), x_BCHW)
        first, seen = value(objective, x_BCHW, rows_B), value(objective, cut_BCHW, rows_B)
        return Adversarial(cut_BCHW, seen.loss_n, seen.broken_n, seen.loss_n - first.loss_n, first.finite_n & seen.finite_n)

    def _stock(self, module: ModuleType, logits: Any, device: str) -> Any:
        """The package's attack with the settings that ``standard`` gives it."""
        shared = {"eps": self.threat.radius, "norm": {"linf": "Linf", "l2": "L2"}[self.norm], "seed": self.seed, "verbose": False,
                  "device": device}  # fmt: skip
        if self.attack == "square":
            return module.SquareAttack(logits, p_init=0.8, n_queries=self.steps, n_restarts=1, resc_schedule=False, **shared)
        if self.attack == "fab-t":
            fab = module.FABAttack_PT(logits, n_restarts=1, n_iter=self.steps, targeted=True, **shared)
            fab.n_target_classes = self.targets
            return fab
        rest = {"n_restarts": 1, "n_iter": self.steps, "eot_iter": self.eot, "rho": 0.75, **shared}
        if self.attack == "apgd-t":
            return module.APGDAttack_targeted(logits, n_target_classes=self.targets, **rest)
        return module.APGDAttack(logits, loss=self.attack.removeprefix("apgd-"), **rest)


def package(module: str) -> ModuleType:
    """A module of ``pyautoattack``.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        found = __import__(f"pyautoattack.{module}", fromlist=[module])
    except ImportError as error:
        raise ConfigError(f"AutoAttack needs the package pyautoattack ({error}): pip install 'aft[eval]'.") from error
    assert isinstance(found, ModuleType)
    return found
