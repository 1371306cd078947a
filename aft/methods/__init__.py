"""Training methods: one LightningModule a paper, over one step and one attack generator."""

from aft.methods.advflyp import AdvFLYP
from aft.methods.agft import AGFT
from aft.methods.base import AdversarialFineTuning
from aft.methods.fare import FARE
from aft.methods.laat import LAAT
from aft.methods.lore import LORE
from aft.methods.optim import OptimizerSpec
from aft.methods.perturbations import WarmStart
from aft.methods.phases import Phase
from aft.methods.pmg_aft import PMGAFT
from aft.methods.pretrain import ContrastivePretraining
from aft.methods.saft import SAFT
from aft.methods.sim_clip import SimCLIP
from aft.methods.tecoa import TeCoA
from aft.methods.terms import Ramp, Term, register_term
from aft.methods.tga_zsr import TGAZSR
from aft.methods.tima import TIMA
from aft.methods.trades import TRADES

__all__ = [
    "AGFT",
    "FARE",
    "LAAT",
    "LORE",
    "PMGAFT",
    "SAFT",
    "TGAZSR",
    "TIMA",
    "TRADES",
    "AdvFLYP",
    "AdversarialFineTuning",
    "ContrastivePretraining",
    "OptimizerSpec",
    "Phase",
    "Ramp",
    "SimCLIP",
    "TeCoA",
    "Term",
    "WarmStart",
    "register_term",
]
