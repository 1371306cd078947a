"""What FAB and Square must be by their formulas: shortest ways to planes, exact boundaries of linear models, windows and their sizes."""

import math

import pytest
import torch
from torch import nn

from aft.attacks import ClassificationObjective, FABTargeted, Square, sample_keys
from aft.attacks.base import Judged
from aft.attacks.fab import shortest_way
from aft.errors import ConfigError, InputError


def linear(seed: int = 0, classes: int = 4) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """A linear classifier of 3 x 4 x 4 images in float64, images well inside the box, and its own answers as labels."""
    random = torch.Generator().manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, classes)).double()
    with torch.no_grad():
        network[1].weight.copy_(torch.randn(classes, 48, generator=random))
        network[1].bias.zero_()
    images = 0.4 + 0.2 * torch.rand(6, 3, 4, 4, generator=random, dtype=torch.float64)
    return network, images, network(images).argmax(1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_way_is_on_the_plane_in_the_box_and_the_shortest(norm: str) -> None:
    """Against a fine search over t of ``min(t v, room)``, and against random other ways that reach the plane."""
    random = torch.Generator().manual_seed(0)
    x = torch.rand(40, 1, 2, 4, generator=random, dtype=torch.float64)
    normal = torch.randn(40, 1, 2, 4, generator=random, dtype=torch.float64)
    missing = torch.randn(40, generator=random, dtype=torch.float64)
    way = shortest_way(x, normal, missing, norm)
    assert ((x + way) >= -1e-12).all() and ((x + way) <= 1 + 1e-12).all()
    most = (normal.abs() * torch.where(missing[:, None, None, None] * normal > 0, 1 - x, x)).flatten(1).sum(1)
    reached = (normal * way).flatten(1).sum(1)
    torch.testing.assert_close(reached, missing.sign() * torch.minimum(missing.abs(), most), rtol=1e-9, atol=1e-12)
    order = torch.inf if norm == "linf" else 2
    length = torch.linalg.vector_norm(way, ord=order, dim=(1, 2, 3))
    inside = most > missing.abs() * 1.01
    for _ in range(20):  # another point of the plane: go a random way, then come back to the plane by a step along the normal
        other = way + 0.1 * torch.randn(way.shape, generator=random, dtype=torch.float64)
        lack = missing - (normal * other).flatten(1).sum(1)
        other = other + normal * (lack / normal.flatten(1).square().sum(1))[:, None, None, None]
        boxed = ((x + other >= 0) & (x + other <= 1)).flatten(1).all(1) & inside
        assert (torch.linalg.vector_norm(other, ord=order, dim=(1, 2, 3))[boxed] >= length[boxed] - 1e-9).all()


def test_a_zero_normal_gives_no_way() -> None:
    """No NaN where the gradient vanishes."""
    way = shortest_way(torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, 1, 2, 2), torch.ones(1), "l2")
    assert torch.equal(way, torch.zeros_like(way))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_model_breaks_just_beyond_its_margin_and_not_below(norm: str) -> None:
    """The distance to the nearest boundary is known in closed form: ``(z_y - z_t) / |w_y - w_t|`` in the dual norm."""
    network, images, labels = linear()
    weight, logits = network[1].weight, network(images)
    dual = 1 if norm == "linf" else 2
    distances = []
    for row, label in enumerate(labels.tolist()):
        others = [k for k in range(4) if k != label]
        distances.append(min(float((logits[row, label] - logits[row, k]) / torch.linalg.vector_norm(weight[label] - weight[k], ord=dual))
                             for k in others))  # fmt: skip
    keys = sample_keys(0, 0, torch.arange(1))
    for row, distance in enumerate(distances):
        objective = ClassificationObjective(network, labels[row : row + 1], modules=[network])
        attack = {share: FABTargeted(eps=distance * share, norm=norm, steps=20, targets=3) for share in (0.98, 1.06)}
        found = {share: one(objective, images[row : row + 1], keys) for share, one in attack.items()}
        assert bool(found[1.06].broken_B) and not bool(found[0.98].broken_B)


def test_fab_takes_one_gradient_a_step() -> None:
    """With a radius that no step can reach: for each target ``steps`` passes with a gradient, as many without, and one at the end."""
    network, images, labels = linear()
    passes = {True: 0, False: 0}

    def counting(x: torch.Tensor) -> torch.Tensor:
        """Notes how many images come, and whether a gradient is asked for."""
        passes[x.requires_grad] += len(x)
        return network(x)

    found = FABTargeted(eps=1e-9, steps=7, targets=3)(ClassificationObjective(counting, labels), images, sample_keys(0, 0, torch.arange(6)))
    assert not found.broken_B.any() and passes == {True: 6 * 3 * 7, False: 6 * (1 + 3 * (7 + 1))}


def test_fab_ends_a_sample_once_it_is_broken(classifier, batch, objective_of, watch) -> None:
    """The second target is shown the samples that the first has not broken."""
    images, labels, keys = batch
    runs = []

    class Noting(watch):
        def towards(self, targets, loss="dlr_targeted"):
            runs.append(super().towards(targets, loss))
            return runs[-1]

    found = FABTargeted(eps="8/255", steps=30, targets=2)(Noting(objective_of(classifier, labels)), images, keys)
    assert 3 < int(found.broken_B.sum()) < 12
    first = FABTargeted(eps="8/255", steps=30, targets=1)(objective_of(classifier, labels), images, keys)
    assert runs[0].sizes[0] == 12 > runs[0].sizes[-1] and runs[1].sizes[0] == 12 - int(first.broken_B.sum())


def test_fab_needs_an_objective_that_can_be_aimed(batch) -> None:
    """And enough classes."""
    images, labels, keys = batch

    class Plain:
        modules = ()

        def __call__(self, x, rows):
            return Judged(x.flatten(1).sum(1))

    with pytest.raises(InputError, match="cannot be aimed"):
        FABTargeted(eps=0.1)(Plain(), images, keys)
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 6))
    with pytest.raises(InputError, match="9 targets need 10 classes"):
        FABTargeted(eps=0.1)(ClassificationObjective(network, labels, modules=[network]), images, keys)


def test_windows_shrink_by_the_schedule() -> None:
    """Side ``round(sqrt(p H W))``: p = 0.8 halved after 10, 50, 200 ... of 10,000 steps; at least one pixel."""
    attack = Square(eps=0.1, steps=10_000)
    sides = {step: attack.side(step, (32, 32)) for step in (0, 10, 11, 51, 201, 8001)}
    halved = {0: 0, 10: 0, 11: 1, 51: 2, 201: 3, 8001: 9}
    assert sides == {step: max(1, round(math.sqrt(0.8 / 2**times) * 32)) for step, times in halved.items()}
    assert Square(eps=0.1, steps=100).side(99, (32, 32)) == sides[8001] and Square(eps=0.1).side(0, (4, 64)) == 4


def test_square_starts_at_stripes_and_moves_one_square(batch) -> None:
    """Every point it asks about differs from the best one so far in one square of 2 eps, cut to the ball."""
    images = torch.full((1, 3, 16, 16), 0.5)
    asked = []

    class Watching:
        modules = ()

        def __call__(self, x, rows):
            asked.append(x.clone())
            return Judged(-torch.ones(len(x)) * len(asked), torch.zeros(len(x), dtype=torch.bool))  # only the start is the best

    Square(eps=0.1, steps=30)(Watching(), images, sample_keys(0, 0, torch.arange(1)))
    start = asked[0]
    assert torch.equal(start, start[:, :, :1].expand_as(start)) and torch.allclose((start - 0.5).abs(), torch.tensor(0.1))
    places = set()
    for step, tried in enumerate(asked[1:]):
        changed = ((tried - start).abs() > 1e-6).any(1)[0].nonzero()
        if len(changed):
            side = Square(eps=0.1, steps=30).side(step, (16, 16))
            assert (changed.amax(0) - changed.amin(0) < side).all()
            places.add(tuple(changed.amin(0).tolist()))
    assert len(places) > 5


def test_square_takes_no_gradient_and_keeps_what_raises_the_loss(classifier, batch, objective_of) -> None:
    """The kept loss never falls with more steps; the model may be without gradient."""
    images, labels, keys = batch

    def without_gradient(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return classifier(x)

    objective = ClassificationObjective(without_gradient, labels, "margin")
    few, many = (Square(eps="6/255", steps=steps)(objective, images, keys) for steps in (5, 60))
    assert (many.gain_B >= 0).all() and int(many.broken_B.sum()) >= int(few.broken_B.sum())


@pytest.mark.parametrize(("kind", "settings", "message"), [
    (Square, {"norm": "l2"}, "the Square attack is here for linf"), (Square, {"share": 0.0}, "share = 0.0 is outside"),
    (Square, {"steps": 0}, "steps = 0"), (FABTargeted, {"targets": 0}, "targets = 0"), (FABTargeted, {"eps": 8}, "eps = 8"),
])  # fmt: skip
def test_wrong_settings_are_named(kind, settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**{"eps": 0.1, **settings})
