"""Laws of every defence, on towers of three kinds: no trace, no neighbours, any mode, honest cost, a gradient for attacks."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from aft.clip.model import state_hash
from aft.clip.stages import encode_in_stages
from aft.defenses import defend, open_gates
from aft.errors import ConfigError, InputError
from aft.evaluation.judge import Cost
from tests.conftest import Calls
from tests.defenses.made import EVERY, NAMES, TEMPLATES, draw_of, make

pytestmark = pytest.mark.filterwarnings("ignore:.*class texts lie farther from the mean direction")


@pytest.mark.parametrize("name", EVERY)
def test_it_is_a_model_around_the_same_weights(name, vit, tmp_path):
    """Same parts, texts and record; its settings are plain values for a card; a plain model has no defence."""
    defended = make(name, vit, tmp_path)
    assert defended.undefended is vit and defended.visual is vit.visual and defended.record is vit.record
    assert torch.equal(defended.text_bank(NAMES, TEMPLATES), vit.text_bank(NAMES, TEMPLATES))
    assert defended.defense["name"] == name and json.loads(json.dumps(defended.defense)) == defended.defense
    assert vit.defense is None and not vit.stages.declared and (vit.forwards_per_image, vit.backwards_per_image) == (1, 0)
    assert list(defended.stages.declared) and not defended.training


@pytest.mark.parametrize("name", EVERY)
def test_it_leaves_no_trace(name, precise, images, keys, tmp_path):
    """Weights, statistics, modes, ``.grad``, ``requires_grad`` and torch's generator are as before, also where an outer graph is made."""
    defended = make(name, precise, tmp_path)
    learned = next(precise.visual.parameters())
    learned.grad = torch.ones_like(learned)
    flags = [module.training for module in defended.modules()]
    learning = [parameter.requires_grad for parameter in defended.parameters()]
    before, stream = state_hash(precise), torch.get_rng_state()
    for graph in (False, True):
        defended.encode(images.clone().requires_grad_(graph), draw=draw_of(keys))
    assert state_hash(precise) == before and torch.equal(torch.get_rng_state(), stream)
    assert [module.training for module in defended.modules()] == flags
    assert [parameter.requires_grad for parameter in defended.parameters()] == learning and any(learning)
    assert torch.equal(learned.grad, torch.ones_like(learned))
    assert sum(parameter.grad is not None for parameter in defended.parameters()) == 1


@pytest.mark.parametrize("name", EVERY)
def test_no_image_sees_its_neighbours(name, precise, images, keys, tmp_path):
    """Batches of 1, 3, 3 and of 7 agree; of the released CLIPure they must not, and it says so."""
    defended = make(name, precise, tmp_path)
    text_KD = defended.text_bank(NAMES, TEMPLATES)
    with torch.no_grad():
        whole = defended(images, text_KD, draw_of(keys))
        parts = torch.cat([defended(images[r], text_KD, draw_of(keys[r])) for r in (slice(0, 1), slice(1, 4), slice(4, 7))])
    stage = next(iter(defended.stages.declared.values()))
    assert torch.allclose(whole, parts, rtol=1e-9, atol=1e-9) != stage.batch_coupled
    assert stage.batch_coupled == (name == "clipure_cos_release")


@pytest.mark.parametrize("name", EVERY)
def test_it_works_in_any_mode_and_gives_the_same_bits(name, vit, images, keys, tmp_path):
    """In single precision: under ``no_grad``, under ``inference_mode`` and with a graph the stage's own result has the same bits."""
    defended = make(name, vit.float(), tmp_path)
    x, draw = images.float(), draw_of(keys)
    (stage,) = defended.stages.declared.values()
    z = vit.encode(x).embedding_BD.detach() if defended.stages.embedding else None

    def result(graph: bool) -> torch.Tensor:
        """Of the stage and of its gate."""
        at = x.clone().requires_grad_(graph)
        given = (at, draw) if z is None else (z.clone().requires_grad_(graph), at, draw)
        statistic = stage.gate(at, draw).statistic_n.flatten() if stage.gate else at.new_zeros(0)
        return torch.cat([stage.run(*given).flatten(), statistic]).detach()

    with torch.no_grad():
        first = result(False)
    with torch.inference_mode():
        second = result(False).clone()
    assert torch.equal(first, second) and torch.equal(first, result(True)) and torch.equal(first, result(False))
    with torch.inference_mode():
        logits = defended(x, defended.text_bank(NAMES, TEMPLATES), draw)
    assert logits.shape == (7, 3) and logits.isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_it_costs_what_it_says(name, vit, images, keys, tmp_path):
    """Forwards and backwards of the tower for one look at one image."""
    defended = make(name, vit, tmp_path)
    calls = Calls(vit.visual)
    with Cost(vit.visual) as cost, torch.no_grad():
        defended.encode(images[:1], draw=draw_of(keys[:1]))
    assert calls.rows == cost.forwards == defended.forwards_per_image
    assert cost.backwards == defended.backwards_per_image


@pytest.mark.parametrize("name", EVERY)
def test_a_random_one_asks_for_its_draw(name, vit, images, keys, tmp_path):
    """And gives others for another; a stage that declares no randomness needs none."""
    defended = make(name, vit, tmp_path)
    if not defended.stages.random:
        assert torch.equal(defended.encode(images).embedding_BD, defended.encode(images, draw=draw_of(keys)).embedding_BD)
        return
    with pytest.raises(InputError, match="random and got no draw"):
        defended.encode(images)
    looks = [defended.encode(images, draw=draw_of(keys, number)).embedding_BD for number in (0, 0, 1)]
    assert torch.equal(looks[0], looks[1]) and not torch.equal(looks[0], looks[2])


@pytest.mark.parametrize("name", EVERY)
def test_attacks_get_a_gradient(name, precise, images, keys, tmp_path):
    """Through the stages as they are, with the identity in their place, and through the smooth form; finite, and some for every image."""
    defended = make(name, precise, tmp_path)
    text_KD, draw, x = defended.text_bank(NAMES, TEMPLATES), draw_of(keys), images.requires_grad_(True)
    (stage,) = defended.stages.declared.values()
    ways = [encode_in_stages(defended, x, draw, bpda=list(defended.stages.declared))]
    if stage.differentiable:
        ways.append(encode_in_stages(defended, x, draw))
    elif stage.smooth is not None and defended.stages.pixels is not None:
        ways.append(precise.encode(stage.smooth(x, draw)))
    for encoding in ways:
        (gradient,) = torch.autograd.grad(defended.logits(encoding, text_KD)[:, 0].sum(), x)
        assert gradient.isfinite().all() and (gradient.abs().flatten(1).amax(1) > 0).all()


@pytest.mark.parametrize("name", EVERY)
def test_pixels_stay_pixels(name, vit, images, keys, tmp_path):
    """In [0, 1], of the same shape and type, also in single precision where an image lies on the border."""
    defended = make(name, vit.float(), tmp_path)
    stage = defended.stages.pixels
    if stage is None:
        return
    x = images.float()
    for form in (stage.run, stage.smooth, stage.otherwise):
        shown = x if form is None else form(x, draw_of(keys))
        assert shown.shape == x.shape and shown.dtype == x.dtype and shown.min() >= 0 and shown.max() <= 1


@pytest.mark.parametrize("name", ["ttc", "aom"])
def test_gates_can_be_looked_at(name, vit, images, keys, tmp_path):
    """The share on which a defence acts; a model without gates has none."""
    defended = make(name, vit, tmp_path)
    (opened,) = open_gates(defended, images, draw_of(keys)).values()
    assert opened.shape == (7,) and opened.dtype == torch.bool
    assert open_gates(vit, images) == {}


def test_one_defence_at_a_time(vit, tmp_path):
    """A second one would silently see the first one's stages skipped."""
    with pytest.raises(ConfigError, match="defended already, by low_pass"):
        make("noise", make("low_pass", vit, tmp_path), tmp_path)


def test_patch_tokens_are_the_undefended_models(vit, images, tmp_path):
    """A defended embedding has none."""
    with pytest.raises(ConfigError, match="no patch tokens"):
        make("low_pass", vit, tmp_path).encode(images, tokens=True)


def test_only_the_released_form_warns(vit, tmp_path):
    """When it is built."""
    with pytest.warns(UserWarning, match="depends on its batch"):
        defend(vit, "clipure_cos_release")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in set(EVERY) - {"clipure_cos_release", "clipure_diff"}:
            defend(vit, name)
