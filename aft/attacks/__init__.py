"""The shared generator of adversarial examples: ``attack(objective, x_BCHW, keys_B) -> Adversarial``. Knows nothing of Lightning."""

from aft.attacks.apgd import APGD, APGDTargeted
from aft.attacks.autoattack import StockAttack
from aft.attacks.base import Adversarial, Attack, Judged, Objective, Targetable
from aft.attacks.fab import FABTargeted
from aft.attacks.guards import undisturbed
from aft.attacks.noise import normal, sample_keys, uniform
from aft.attacks.objectives import ClassificationObjective, ce, dlr, dlr_targeted, margin, margin_targeted
from aft.attacks.pgd import FGSM, PGD
from aft.attacks.search import value, value_and_gradient
from aft.attacks.square import Square
from aft.attacks.threat_model import L1, L2, Linf, ThreatModel, pixel_fraction, threat_model

__all__ = [
    "APGD", "APGDTargeted", "Adversarial", "Attack", "ClassificationObjective", "FABTargeted", "FGSM", "Judged", "L1", "L2", "Linf",
    "Objective", "PGD", "Square", "StockAttack", "Targetable", "ThreatModel", "ce", "dlr", "dlr_targeted", "margin", "margin_targeted",
    "normal", "pixel_fraction", "sample_keys", "threat_model", "undisturbed", "uniform", "value", "value_and_gradient",
]  # fmt: skip
