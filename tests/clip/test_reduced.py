"""A tower that sees fewer pixels or patches: against open_clip's interpolation, by hand, compiled, and refused where it cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from open_clip.transformer import PatchDropout

from aft.clip import ZeroShotModel, weights
from aft.clip.enlarge import regrid
from aft.clip.reduced import patches_at, positions_at, reduced
from aft.errors import ConfigError
from tests.towers import TEXT, VISION


def test_fewer_pixels_are_the_tower_of_that_size(model: ZeroShotModel) -> None:
    """As if the weights had been loaded for smaller images: open_clip's own interpolation is the outside reference."""
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    smaller = copy.deepcopy(model.clip)
    with pytest.warns(UserWarning, match="interpolated"):
        regrid(smaller, 16)
    pixels = torch.nn.functional.interpolate(model.pixels(images), size=(16, 16), mode="bicubic", antialias=True)
    with reduced(model.visual, 16):
        torch.testing.assert_close(model.encode(images).embedding_BD, smaller.visual(pixels), rtol=0, atol=1e-6)


def test_fewer_patches_are_a_tower_that_was_never_given_the_others(model: ZeroShotModel) -> None:
    """Written out by hand; and dropped patches have no gradient."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    kept = torch.tensor([0, 5, 10])
    tower: Any = model.visual
    tokens = tower._embeds(model.pixels(images))  # its ln_pre works on each token alone
    expected = tower._pool(tower.transformer(tokens[:, [0, 1, 6, 11]]))[0] @ tower.proj
    with reduced(tower, kept_M=kept):
        found = model.encode(images).embedding_BD
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), images)
    patches = gradient.unfold(2, 8, 8).unfold(3, 8, 8).abs().amax(dim=(0, 1, 4, 5)).flatten()
    assert (patches.nonzero().flatten() == kept).all()


def test_positions_learn_through_the_interpolation_and_the_tower_is_as_before(model: ZeroShotModel) -> None:
    """Same parameters in the same order afterwards, also where the forward fails."""
    names = [name for name, _ in model.visual.named_parameters()]
    images = torch.rand(2, 3, 32, 32)
    whole = model.encode(images).embedding_BD
    with reduced(model.visual, 16, torch.tensor([1, 2])):
        model.encode(images).embedding_BD.sum().backward()
        with pytest.raises(RuntimeError):
            model.visual(torch.rand(2, 5, 32, 32))
        assert [name for name, _ in model.visual.named_parameters()] == names
    gradient = model.visual.positional_embedding.grad
    assert gradient is not None and gradient.abs().sum() > 0
    assert isinstance(model.visual.positional_embedding, torch.nn.Parameter)
    assert torch.equal(model.encode(images).embedding_BD, whole)
    assert torch.allclose(positions_at(model.visual.positional_embedding, 4), model.visual.positional_embedding, atol=1e-6)


def test_a_compiled_tower_sees_less_and_then_all_again(model: ZeroShotModel) -> None:
    """Before the context, in it and after it: as an uncompiled one (a compiled graph does not notice hooks that come and go)."""
    images, plain = torch.rand(2, 3, 32, 32), copy.deepcopy(model)
    model.visual.compile(backend="eager")
    for side in (None, 16, None):
        with reduced(model.visual, side), reduced(plain.visual, side):
            torch.testing.assert_close(model.encode(images).embedding_BD, plain.encode(images).embedding_BD, rtol=0, atol=1e-6)
    with reduced(model.visual, 16):
        model.encode(images)
    whole = model.encode(images).embedding_BD
    torch.testing.assert_close(whole, plain.encode(images).embedding_BD, rtol=0, atol=1e-6)
    kept = torch.tensor([1, 2])
    with reduced(model.visual, None, kept), reduced(plain.visual, None, kept):
        torch.testing.assert_close(model.encode(images).embedding_BD, plain.encode(images).embedding_BD, rtol=0, atol=1e-6)
    assert model.visual._compiled_call_impl is not None


def test_a_tower_that_cannot_see_less_is_named(model: ZeroShotModel) -> None:
    """A ResNet; a ViT that drops patches by itself."""
    resnet = weights.build_clip({"embed_dim": 16, "vision_cfg": VISION["resnet"], "text_cfg": TEXT}).visual
    dropping: Any = copy.deepcopy(model.visual)
    dropping.patch_dropout = PatchDropout(0.5)
    for visual in (resnet, dropping):
        assert isinstance(visual, torch.nn.Module)
        with pytest.raises(ConfigError, match="cannot see fewer pixels"):
            patches_at(visual)
