"""A zoo of broken models, each flagged by the check that is meant for it; and no sound model flagged, over five seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2.functional import gaussian_blur

from aft.attacks import PGD
from aft.defenses.clipure import released, slerp
from aft.defenses.geometry import split
from aft.evaluation.case import Case
from aft.evaluation.doubts import CHEAP, DEAR, doubted, each_loss, operations
from tests.gratings import gratings, trained

EPS = 6 / 255
Wrap = Callable[[nn.Module], Callable[[Tensor], Tensor]]


class Rounded(torch.autograd.Function):
    """The identity, whose gradient goes through fp16."""

    @staticmethod
    def forward(context, value: Tensor) -> Tensor:
        """As it is."""
        return value.clone()

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        """Rounded to what fp16 can hold of a mean over a large batch."""
        return (gradient * 1e-9).half().float() * 1e9


def huge_temperature(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Cross-entropy saturates."""
    return lambda x: 1e4 * network(x)


def quantised_input(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Rounding has no gradient."""
    return lambda x: network((x * 15).round() / 15)


def stop_gradient(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Detached."""
    return lambda x: network(x.detach())


def random_resize(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Another size at every call."""
    def look(x: Tensor) -> Tensor:
        """Shrunk and blown up again."""
        side = int(torch.randint(11, 16, ()))
        return network(functional.interpolate(functional.interpolate(x, size=side, mode="bilinear"), size=16, mode="bilinear"))

    return look


def whole_batch_statistics(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The mean of the batch is taken off."""
    return lambda x: network(x - x.mean(0) + 0.5)


def dropout_left_on(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """In evaluation too."""
    return lambda x: network(functional.dropout(x, 0.1, training=True))


def labels_leak(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The logits are drawn far beyond those of the nearest image of the test set, whose labels it knows."""
    known, labels = gratings(120, seed=3)
    memory = functional.one_hot(labels, 6).float()
    return lambda x: network(x) + 1e3 * memory[torch.cdist(x.flatten(1), known.flatten(1)).argmin(1)]


def gradient_through_fp16(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Small gradients become zero."""
    return lambda x: network(Rounded.apply(x))


def probabilities(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """After the softmax."""
    return lambda x: network(x).softmax(1)


def optimises(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Moves the image uphill in its own confidence before it answers."""
    def look(x: Tensor) -> Tensor:
        """Three steps."""
        moved = x
        with torch.enable_grad():
            for _ in range(3):
                leaf = moved.detach().requires_grad_()
                (slope,) = torch.autograd.grad(network(leaf).logsumexp(1).sum(), leaf)
                moved = moved + 0.01 * slope.sign()
        return network(moved)

    return look


def searches(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Looks for a neighbour that it is surer of, without any gradient."""
    def look(x: Tensor) -> Tensor:
        """The surest of three."""
        looks = torch.stack([network((x + shift).clamp(0, 1)) for shift in (0, 0.01, -0.01)])
        return looks.gather(0, looks.logsumexp(2).argmax(0)[None, :, None].expand(1, *looks.shape[1:]))[0]

    return look


def features_of(network: nn.Module) -> tuple[nn.Module, nn.Module, Tensor]:
    """The network in two, and the direction of its mean feature in the place of a blank template's."""
    assert isinstance(network, nn.Sequential)
    body, head = network[:-1], network[-1]
    with torch.no_grad():
        return body, head, functional.normalize(body(gratings(60, seed=9)[0]).mean(0), dim=0)


def clipure_release(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """CLIPure-Cos as released, on features that went through half precision."""
    body, head, blank = features_of(network)
    return lambda x: head(released(Rounded.apply(body(x)), blank, eta=30.0, steps=10))


def quantised_then_defended(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Grey levels as of a stored image, and only then a low-pass filter."""
    return lambda x: network(low_pass((x * 15).round() / 15))


def gate_on_one_draw(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Blurred where the answer to one noisy copy is another than to the image: the dice are thrown anew at each look."""
    def look(x: Tensor) -> Tensor:
        """One draw a look."""
        clean, noisy = network(x), network(x + 0.05 * torch.randn_like(x))
        return torch.where((clean.argmax(1) != noisy.argmax(1))[:, None], network(low_pass(x)), noisy)

    return look


def defended_by_the_batch(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Features are moved to the mean of their batch."""
    body, head, _ = features_of(network)
    return lambda x: head(0.5 * body(x) + 0.5 * body(x).mean(0))


def low_pass(x: Tensor) -> Tensor:
    """A Gaussian blur, as the defence ``low_pass``."""
    return gaussian_blur(x, [5, 5], [0.5, 0.5]).clamp(0, 1)


def low_passed(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """A sound model: the filter is differentiable and the same for every image."""
    return lambda x: network(low_pass(x))


def clipure_closed(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """A sound model: CLIPure-Cos in its closed form, ten degrees."""
    body, head, blank = features_of(network)

    def look(x: Tensor) -> Tensor:
        """Features turned towards the blank direction; their lengths stay."""
        size, unit = split(body(x))
        return head(size * slerp(unit, blank, 0.17, 0.9))

    return look


ZOO: dict[str, tuple[Wrap, str]] = {
    "huge temperature": (huge_temperature, "E11"), "quantised input": (quantised_input, "E10"), "stop-gradient": (stop_gradient, "E9"),
    "random resize": (random_resize, "E6"), "whole-batch statistics": (whole_batch_statistics, "E8"),
    "dropout left on": (dropout_left_on, "E6"), "labels leak": (labels_leak, "E21"),
    "gradient through fp16": (gradient_through_fp16, "E10"), "probabilities": (probabilities, "E5"), "optimises": (optimises, "E25"),
    "searches": (searches, "E25"), "CLIPure as released": (clipure_release, "E8"),
    "quantise, then defend": (quantised_then_defended, "E10"), "gate on one draw": (gate_on_one_draw, "E6"),
    "defence by batch statistics": (defended_by_the_batch, "E8"),
}  # fmt: skip


def case_of(logits: Callable[[Tensor], Tensor], network: nn.Module) -> Case:
    """Those of 120 test images that the model gets right."""
    images, labels = gratings(120, seed=3)
    with torch.no_grad():
        right = logits(images).argmax(1) == labels
    return Case(logits, images[right], labels[right], EPS, modules=[network], undefended=network)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Trained on adversarial images."""
    return trained(attack=PGD(eps=EPS / 2, relative_step_size=0.5, steps=3))


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    """The zoo's own random numbers start alike, and move nobody else's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("name", ZOO)
def test_every_broken_model_is_flagged(name: str, network: nn.Module) -> None:
    """By the check that is meant for it."""
    wrap, check = ZOO[name]
    assert check in doubted(case_of(wrap(network), network), {check: (CHEAP | DEAR)[check]})


@pytest.mark.parametrize(("seed", "adversarial"), [*((seed, True) for seed in range(5)), (0, False), (1, False)])
def test_no_sound_model_is_flagged(seed: int, adversarial: bool) -> None:
    """Trained on clean or on adversarial images."""
    network = trained(seed, PGD(eps=EPS / 2, relative_step_size=0.5, steps=3) if adversarial else None)
    found = doubted(case_of(network, network), CHEAP | DEAR)
    assert found == {}, found


def test_the_released_clipure_is_flagged_by_more_than_its_batch(network: nn.Module) -> None:
    """Images made against the undefended network break more than those made through it (E19)."""
    found = doubted(case_of(clipure_release(network), network), {name: (CHEAP | DEAR)[name] for name in ("E8", "E19")})
    assert set(found) == {"E8", "E19"}, found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("wrap", [low_passed, clipure_closed])
def test_no_sound_defence_is_flagged(wrap: Wrap, seed: int) -> None:
    """A low-pass filter and the closed CLIPure around networks trained on adversarial images."""
    network = trained(seed, PGD(eps=EPS / 2, relative_step_size=0.5, steps=3))
    found = doubted(case_of(wrap(network), network), CHEAP | DEAR)
    assert found == {}, found


def test_images_of_a_sibling_show_a_masked_gradient(network: nn.Module) -> None:
    """E19: the quantised model's own gradient finds nothing, its sibling's does; a model's own images are no news to it."""
    masked, plain = case_of(quantised_input(network), network), case_of(network, network)
    assert "E19" in doubted(replace(masked, siblings=[network]), {"E19": DEAR["E19"]})
    assert doubted(replace(plain, siblings=[network]), {"E19": DEAR["E19"]}) == {}


def test_a_part_in_training_mode_is_flagged(network: nn.Module) -> None:
    """E7: dropout, and BatchNorm's statistics."""
    network.train()
    try:
        assert "E7" in doubted(case_of(network, network), CHEAP)
    finally:
        network.eval()


def test_every_loss_is_reported_beside_their_union(network: nn.Module) -> None:
    """E24: with a scale of 1e4 cross-entropy leaves more than DLR, which no scale touches; a model without gradients has no figures."""
    sound, saturated = (each_loss(case_of(wrap, network)) for wrap in (network, huge_temperature(network)))
    assert set(sound) == {"ce", "dlr", "dlr_targeted", "union"} and sound["union"] <= min(sound.values())
    assert saturated["ce"] > saturated["union"] and abs(saturated["dlr"] - sound["dlr"]) < 0.1, (sound, saturated)
    assert each_loss(case_of(stop_gradient(network), network)) == {}


def test_operations_are_those_of_the_formula() -> None:
    """Two a multiply-add: 2 n D K of a matrix product."""
    layer = nn.Linear(12, 5)
    assert operations(lambda x: layer(x.flatten(1)), torch.zeros(3, 3, 2, 2)) == 2 * 3 * 12 * 5
