"""Training methods: one LightningModule a paper, over one step and one attack generator."""

from aft.methods.base import AdversarialFineTuning
from aft.methods.optim import OptimizerSpec
from aft.methods.pretrain import ContrastivePretraining
from aft.methods.tecoa import TeCoA
from aft.methods.terms import Ramp, Term, register_term

__all__ = ["AdversarialFineTuning", "ContrastivePretraining", "OptimizerSpec", "Ramp", "TeCoA", "Term", "register_term"]
