"""Test-time defences: each wraps a model, is one, and declares its stages, so that attacks can know it."""

from aft.defenses.anti_adversary import AntiAdversary
from aft.defenses.aom import AOM
from aft.defenses.base import Defended
from aft.defenses.baselines import LowPass, RandomNoise, ViewEnsemble
from aft.defenses.clipure import CLIPureCosClosed, CLIPureCosRelease, CLIPureCosSane
from aft.defenses.clipure_diff import CLIPureDiff
from aft.defenses.prior import LatentDiffusionPrior, load_prior
from aft.defenses.registry import DEFENSES, DefenseSpec, defend, open_gates, settings_of
from aft.defenses.ttc import TTC

__all__ = [
    "AOM", "AntiAdversary", "CLIPureCosClosed", "CLIPureCosRelease", "CLIPureCosSane", "CLIPureDiff", "DEFENSES", "Defended", "DefenseSpec",
    "LatentDiffusionPrior", "LowPass", "RandomNoise", "TTC", "ViewEnsemble", "defend", "load_prior", "open_gates", "settings_of",
]  # fmt: skip
