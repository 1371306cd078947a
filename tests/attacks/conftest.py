"""A small classifier with a real, non-trivial robust accuracy, and what the attack tests share."""

import copy

import pytest
import torch
from torch import nn

from aft.attacks import APGD, FGSM, PGD, APGDTargeted, ClassificationObjective, FABTargeted, Square, sample_keys
from tests.gratings import gratings, trained


@pytest.fixture(scope="session")
def classifier() -> nn.Module:
    """The trained network, in eval mode, fp32."""
    return trained()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small run ten times slower on threads that other work holds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture()
def network(classifier) -> nn.Module:
    """A copy in fp32 that a test may change, as training leaves it: weights that learn, train mode."""
    return copy.deepcopy(classifier).requires_grad_(True).train()


@pytest.fixture(scope="session")
def precise(classifier) -> nn.Module:
    """The trained network in fp64, for laws about exactness."""
    return copy.deepcopy(classifier).double()


@pytest.fixture(scope="session")
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Twelve test images, their labels and noise keys."""
    images, labels = gratings(12, seed=2)
    return images, labels, sample_keys(0, 0, torch.arange(12))


@pytest.fixture(scope="session")
def many() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """300 test images, their labels and noise keys, for figures."""
    images, labels = gratings(300, seed=3)
    return images, labels, sample_keys(0, 0, torch.arange(300))


ATTACKS = {
    "pgd_last": PGD(eps="8/255", relative_step_size=0.25, steps=4),
    "pgd_best": PGD(eps="8/255", step_size="3/255", steps=4, restarts=2, keep="best"),
    "pgd_l2": PGD(eps=0.5, relative_step_size=0.3, steps=4, norm="l2", momentum=0.75),
    "pgd_l1": PGD(eps=8, relative_step_size=0.3, steps=6, norm="l1", keep="best"),
    "apgd_l1": APGD(eps=6, steps=8, norm="l1"),
    "apgd_targeted_l1": APGDTargeted(eps=8, steps=5, targets=3, norm="l1"),
    "fgsm": FGSM(eps="8/255"),
    "apgd": APGD(eps="8/255", steps=8),
    "apgd_l2": APGD(eps=0.5, steps=8, norm="l2"),
    "apgd_targeted": APGDTargeted(eps="8/255", steps=5, targets=3),
    "fab_targeted": FABTargeted(eps="8/255", steps=5, targets=3),
    "fab_targeted_l2": FABTargeted(eps=0.5, steps=5, targets=2, norm="l2"),
    "square": Square(eps="32/255", steps=40),
}


@pytest.fixture(params=ATTACKS.values(), ids=ATTACKS.keys())
def attack(request):
    """Every attack of the room."""
    return request.param


@pytest.fixture(scope="session")
def objective_of():
    """Makes the objective of a network: ``objective_of(network, labels, loss="ce")``."""
    return lambda network, labels, loss="ce": ClassificationObjective(network, labels, loss, modules=[network])


class Watched:
    """An objective over another one: notes the sizes of its calls; from call ``at_call`` on, ``act(judged, rows)`` may change its word."""

    def __init__(self, inner, at_call=0, act=None):
        self.inner, self.modules, self.at_call, self.act, self.sizes = inner, inner.modules, at_call, act, []

    def __call__(self, x, rows):
        self.sizes.append(len(x))
        judged = self.inner(x, rows)
        return self.act(judged, rows) if self.act and len(self.sizes) >= self.at_call else judged

    def wrong_classes(self, x, rows, count):
        return self.inner.wrong_classes(x, rows, count)

    def towards(self, targets, loss="dlr_targeted"):
        return Watched(self.inner.towards(targets, loss), self.at_call, self.act)


@pytest.fixture(scope="session")
def watch() -> type[Watched]:
    """``watch(objective, at_call=0, act=None)``."""
    return Watched
