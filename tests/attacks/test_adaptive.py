"""Laws of attacks that know a defence: gradients of the expected loss, the rule for draws, gates, and a defence that hides gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from aft.attacks import APGD, PGD, APGDTargeted, ClassificationObjective, sample_keys
from aft.attacks.adaptive import Evading, Expected, draw_cosines, eot_count, gate_rates, reached_cosine
from aft.attacks.noise import normal
from aft.attacks.sight import DRAWS_AN_ATTACK, Dice, Sight, gated, opaque
from aft.clip.model import Encoding
from aft.clip.stages import Gate, Stage, Stages, encode_in_stages
from aft.errors import ConfigError, InputError

CLASSES, POINTS, WIDTH, SHAPE = 10, 200, 24, (3, 4, 4)
TEMPLATE = functional.normalize(torch.ones(WIDTH, dtype=torch.float64), dim=0)


class Net(nn.Module):
    """A tanh network on 48 pixels whose embeddings stand at about 75 degrees to a template; half precision on request."""

    stages = Stages()

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(5)
        self.into = nn.Parameter(torch.randn(48, 64, generator=random, dtype=torch.float64) / 2)
        self.out = nn.Parameter(torch.randn(64, WIDTH, generator=random, dtype=torch.float64) / 8)
        self.text_KD = functional.normalize(torch.randn(CLASSES, WIDTH, generator=random, dtype=torch.float64), dim=1)
        self.dtype = dtype

    @property
    def undefended(self) -> Net:
        """Itself."""
        return self

    def encode(self, images: Tensor) -> Encoding:
        """Unit vectors, less what they have of the template, plus a quarter of it."""
        low = torch.tanh((images - 0.5).flatten(1).to(self.dtype) @ self.into.to(self.dtype)) @ self.out.to(self.dtype)
        z = low.to(images.dtype)
        across = functional.normalize(z - (z @ TEMPLATE)[:, None] * TEMPLATE, dim=1)
        return Encoding(0.97 * across + 0.25 * TEMPLATE)

    def logits(self, images: Tensor, model: object = None, draw: object = None) -> Tensor:
        """Cosines with ten classes, times 20, through a model's stages."""
        return 20 * encode_in_stages(model or self, images, draw).unit_BD.to(images.dtype) @ self.text_KD.T.to(images.dtype)


@dataclass
class Defended:
    """Stages around a network."""

    stages: Stages
    undefended: Net


def ascent(z: Tensor, images: Tensor, draw: object, graph: bool) -> Tensor:
    """CLIPure-Cos as released, in pairs: ten steps of 30 along the normalised gradient of the cosine; with or without its own graph."""
    parts = []
    for u in z.split(2):
        size = u.norm(dim=1, keepdim=True)
        for _ in range(10):
            unit = u / u.norm(dim=1, keepdim=True)
            along = (unit @ TEMPLATE.to(unit))[:, None]
            g = TEMPLATE.to(unit) - along * unit
            g = g if graph else g.detach()
            moved = unit + 30 * g / (g.norm() if graph else g.norm().detach())
            u = size * moved / moved.norm(dim=1, keepdim=True)
        parts.append(u)
    return torch.cat(parts)


AS_RELEASED, WITH_GRAPH = partial(ascent, graph=False), partial(ascent, graph=True)
RELEASE = Stages(embedding=Stage(AS_RELEASED, differentiable=False, batch_coupled=True, smooth=WITH_GRAPH))
NAIVE = Stages(embedding=Stage(AS_RELEASED, batch_coupled=True))


@pytest.fixture(scope="module")
def net() -> Net:
    """In fp64."""
    return Net()


@pytest.fixture(scope="module")
def points(net: Net) -> tuple[Tensor, Tensor, Tensor]:
    """Two hundred images, what the network says of them, keys."""
    images = torch.rand(POINTS, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return images, net.logits(images).argmax(1), sample_keys(0, 0, torch.arange(POINTS))


def seen(net: Net, sight: Sight, labels: Tensor, loss: str = "margin") -> ClassificationObjective:
    """The classifier as a sight sees it."""
    return ClassificationObjective(lambda x: net.logits(x, sight), labels, loss)


def expected(net: Net, stages: Stages, labels: Tensor, keys: Tensor, **how: object) -> Expected:
    """An attack through (or around) stages."""
    sight = Sight(Defended(stages, net), how.pop("bpda", ()), hard_forward=how.pop("hard_forward", True))
    return Expected(seen(net, sight, labels), sight, Dice(keys), **how)


ATTACK = PGD(eps=0.4, relative_step_size=0.1, steps=40, random_start=False, keep="best")


def test_a_defence_that_is_the_identity_and_hides_its_gradient_falls_to_every_attack_that_knows_it(net, points):
    """The released CLIPure-Cos on pairs. Through autograd in fp16: all gradients are zero and nothing is broken.

    Against the undefended network (A), with the identity backward (B), and with the true Jacobian (C): everything is broken.
    """
    images, labels, keys = points
    model = Defended(RELEASE, net)
    defended = lambda x: net.logits(x, model).argmax(1)  # noqa: E731
    assert float((defended(images) == labels).double().mean()) > 0.95

    half = Net(torch.float16)
    naive = expected(half, NAIVE, labels, keys)
    hidden = ATTACK(naive, images, keys)
    assert float(naive.meter.dead_B.sum() / naive.meter.taken_B.sum()) > 0.99
    assert float((defended(hidden.x_BCHW) == labels).double().mean()) > 0.95

    a = replace(ATTACK, drop_broken=False)(ClassificationObjective(net.logits, labels, "margin"), images, keys)
    b_objective, c_objective = expected(net, RELEASE, labels, keys, bpda=["embedding"]), expected(net, RELEASE, labels, keys, period=41)
    b, c = ATTACK(b_objective, images, keys), ATTACK(c_objective, images, keys)
    for found in (a, b, c):
        assert float((defended(found.x_BCHW) == labels).double().mean()) < 0.02
    assert int(b_objective.meter.dead_B.sum()) == int(c_objective.meter.dead_B.sum()) == 0


def test_a_tiny_gradient_is_counted_as_none_and_still_followed(net, points):
    """In fp64 the release leaves 1e-13 of the gradient: it is flagged, and scaled to 1 it still breaks the images."""
    images, labels, keys = points
    naive = expected(net, NAIVE, labels, keys)
    found = ATTACK(naive, images, keys)
    assert int(naive.meter.dead_B.sum()) > 0 and float(found.broken_B.double().mean()) > 0.95


def noise_stage(x: Tensor, draw) -> Tensor:
    """Additive."""
    return x + 0.1 * normal(draw.keys_n, draw.count(), x.shape[1:]).to(x)


def counter(x: Tensor, draw, net: Net, sign) -> Tensor:
    """One step away from the embedding of the image, from a random start: a counterattack."""
    with torch.enable_grad():
        at = x + 0.05 * normal(draw.keys_n, draw.count(1), x.shape[1:]).to(x)
        leaf = at if at.requires_grad else at.requires_grad_()
        away = (net.encode(leaf).embedding_BD - net.encode(x).embedding_BD).square().sum()
        (g,) = torch.autograd.grad(away, leaf, create_graph=True)
        return leaf + 0.05 * sign(g)


def soft_sign(g: Tensor) -> Tensor:
    """tanh(g / c)."""
    return torch.tanh(g / g.abs().flatten(1).mean(1)[:, None, None, None])


def drift(x: Tensor, draw) -> Gate:
    """A random gate on brightness."""
    return Gate((x + 0.1 * normal(draw.keys_n, draw.count(2), x.shape[1:]).to(x)).flatten(1).mean(1), 0.5)


def stages_of(name: str, net: Net) -> Stages:
    """Small defences of every kind."""
    second = Stage(lambda z, x, draw: functional.normalize(z, dim=1) + 0.3 * TEMPLATE)
    climb = Stage(lambda x, d: counter(x, d, net, torch.sign), random=True, gate=drift, otherwise=noise_stage, differentiable=False,
                  smooth=lambda x, d: counter(x, d, net, soft_sign))  # fmt: skip
    return {"pixels": Stages(Stage(lambda x, draw: x**2)), "noise": Stages(Stage(noise_stage, random=True)),
            "gate": Stages(Stage(lambda x, draw: 1 - x, gate=lambda x, draw: Gate(x.flatten(1).mean(1), 0.5))),
            "both": Stages(Stage(noise_stage, random=True), second), "counterattack": Stages(climb),
            "release": RELEASE}[name]  # fmt: skip


@pytest.mark.parametrize("name", ["pixels", "noise", "gate", "both", "counterattack", "release"])
def test_the_gradient_of_c_is_that_of_the_expected_loss(name, net, points):
    """Against central differences of the mean over the same draws, of the forward that C differentiates (soft gates): 1e-3 relative."""
    images, labels, keys = (part[:4] for part in points)
    objective = expected(net, stages_of(name, net), labels, keys, hard_forward=False, draws=3)
    objective.sight.temperature = 0.1
    rows, draws = torch.arange(4), Dice(keys).throw(torch.arange(4), 3)
    leaf = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective.value(leaf, rows, draws).sum(), leaf)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (objective.value(images + sign * step * direction, rows, draws).sum() for sign in (1, -1))
    assert float((ahead - behind) / (2 * step)) == pytest.approx(float((slope * direction).sum()), rel=1e-3)
    scaled = images.clone().requires_grad_()
    (given,) = torch.autograd.grad(objective(scaled, rows).loss_n.sum(), scaled)
    assert torch.allclose(given, slope / slope.flatten(1).abs().amax(1)[:, None, None, None], rtol=1e-9)


@pytest.mark.parametrize(("cosine", "draws"), [(1.0, 1), (0.9, 1), (0.5, 9), (0.3, 21), (0.1, 81), (0.05, 171)])
def test_draws_by_the_rule_reach_a_cosine_of_nine_tenths(cosine, draws):
    """``n = ceil(9 (1 - c) / c)``; also for simulated gradients: a common part and noise of which two single ones have that cosine."""
    assert eot_count(cosine, 1000) == draws and reached_cosine(cosine, draws) >= 0.9 - 1e-9
    random = torch.Generator().manual_seed(0)
    common = functional.normalize(torch.randn(4000, generator=random, dtype=torch.float64), dim=0)
    size = ((1 - cosine) / cosine / 4000) ** 0.5
    means = [common + size * torch.randn(draws, 4000, generator=random, dtype=torch.float64).mean(0) for _ in range(2)]
    assert float(functional.cosine_similarity(*means, dim=0)) == pytest.approx(reached_cosine(cosine, draws), abs=0.03)


def test_draws_are_capped_and_the_cosine_that_is_reached_is_said():
    """Also where no draw agrees with another."""
    assert eot_count(0.05, 9) == 9 and reached_cosine(0.05, 9) == pytest.approx(9 * 0.05 / (9 * 0.05 + 0.95))
    assert eot_count(0.0, 128) == eot_count(-0.3, 128) == eot_count(float("nan"), 128) == 128 and reached_cosine(-0.3, 128) == 0


def test_cosines_of_draws_are_one_for_a_model_without_randomness(net, points):
    """And below one for a random one."""
    images, labels, keys = points
    assert draw_cosines(expected(net, Stages(Stage(lambda x, d: x)), labels, keys), images).min() > 1 - 1e-9
    assert float(draw_cosines(expected(net, stages_of("noise", net), labels, keys), images).median()) < 0.97


def test_draws_are_new_at_each_call_and_never_those_of_another_attack(net, points):
    """Numbers of throws: steps + 1 calls of n draws for each start; another attack's begin far away."""
    images, labels, keys = (part[:3] for part in points)
    numbers: list[int] = []

    def noted(x: Tensor, draw) -> Tensor:
        numbers.append(draw.number)
        return noise_stage(x, draw)

    objective = expected(net, Stages(Stage(noted, random=True)), labels, keys, draws=4)
    found = PGD(eps=0.1, relative_step_size=0.5, steps=3, restarts=2, keep="best")(objective, images, keys)
    assert len(numbers) == len(set(numbers)) == 2 * (3 + 1) * 4 and found.broken_B is None
    later = Dice(keys, 1).throw(torch.arange(3), 1)[0].number
    assert later - min(numbers) == DRAWS_AN_ATTACK and max(numbers) < later


def test_a_targeted_attack_shares_dice_and_meter(net, points):
    """APGD-T aims the expectation itself."""
    images, labels, keys = (part[:5] for part in points)
    objective = expected(net, stages_of("noise", net), labels, keys, draws=2)
    APGDTargeted(eps=0.1, steps=4, targets=2)(objective, images, keys)
    assert objective.meter.taken_B.tolist() == [2 * 5] * 5
    with pytest.raises(InputError, match="cannot be aimed"):
        Expected(Evading(objective.inner, objective.sight), objective.sight, Dice(keys)).towards(labels)


def bright(x: Tensor, draw) -> Gate:
    """A gate that opens on bright images."""
    return Gate(x.flatten(1).mean(1), 0.52)


def test_gate_evasion_shuts_the_gate_and_a_weight_too_large_forgets_the_class(net, points):
    """The stage gives a constant image, so where the gate is open nothing can be broken: a sweep has a best weight between the ends.

    The verdict of an evasion counts only where every gate is shut.
    """
    images, labels, keys = points
    stages = Stages(Stage(lambda x, draw: torch.full_like(x, 0.5), gate=bright))
    model = Defended(stages, net)
    assert gated(stages) and float(gate_rates(model, images, [None]).mean()) < 0.6

    def run(weight):
        sight = Sight(model, closed=True)
        objective = Expected(Evading(seen(net, sight, labels), sight, weight), sight, Dice(keys), period=41)
        return ATTACK(objective, images, keys)

    free, pushed, alternating = run(0.0), run(10.0), run(None)
    rates = [float(gate_rates(model, found.x_BCHW, [None]).mean()) for found in (free, pushed, alternating)]
    broken = [float((net.logits(found.x_BCHW, model).argmax(1) != labels).double().mean()) for found in (free, pushed, alternating)]
    assert rates[0] > 0.05 and max(rates[1:]) < 0.02 and broken[2] >= broken[0] > 0.5
    for found in (free, pushed, alternating):
        wrong, shut = net.logits(found.x_BCHW).argmax(1) != labels, ~bright(found.x_BCHW, None).open_n
        assert torch.equal(found.broken_B, wrong & shut)


def test_a_closed_sight_sees_what_a_shut_gate_leaves(net, points):
    """``otherwise``, for the draw that was set; what the gate says is asked of the same draw."""
    images, _, keys = (part[:6] for part in points)
    (draw,) = Dice(keys).throw(torch.arange(6), 1)
    sight = Sight(Defended(stages_of("counterattack", net), net), closed=True)
    sight.draw = draw
    assert torch.equal(net.logits(images, sight), net.logits(noise_stage(images, draw)))
    assert torch.equal(sight.excess(images)[0], (drift(images, draw).statistic_n - 0.5) / 0.5)


def test_neighbours_change_no_bit_of_an_attack_on_a_random_model(net, points):
    """Alone or among others, in float64."""
    images, labels, keys = (part[:6] for part in points)
    attack, stages, one = APGD(eps=0.1, steps=6, restarts=2), stages_of("both", net), slice(4, 5)
    whole = attack(expected(net, stages, labels, keys, draws=3), images, keys)
    alone = attack(expected(net, stages, labels[one], keys[one], draws=3), images[one], keys[one])
    assert torch.allclose(whole.x_BCHW[4:5], alone.x_BCHW, atol=1e-12) and torch.allclose(whole.loss_B[4:5], alone.loss_B, rtol=1e-10)


def test_what_cannot_be_differentiated_is_named():
    """Opaque: neither differentiable nor with a smooth form."""
    hard, soft = Stage(torch.round, differentiable=False), Stage(torch.round, differentiable=False, smooth=torch.tanh)
    assert opaque(Stages(hard, soft)) == ["pixels"] and opaque(Stages(soft)) == []
    with pytest.raises(ConfigError, match="one draw or more"):
        sight = Sight(Defended(Stages(hard), Net()))
        Expected(seen(Net(), sight, torch.tensor([0])), sight, Dice(torch.tensor([1])), draws=0)
