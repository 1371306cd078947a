"""Attention with one product for its projections: the same mathematics, parameters and names, and no product token by token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from aft.clip import ModelSpec, ZeroShotModel, load_model
from aft.clip.attention import FoldedAttention, attend, fold_attention, unfold_attention


class Products(TorchDispatchMode):
    """How often matrices are multiplied one by one."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts."""
        self.count += function._schema.name == "aten::bmm"
        return function(*args, **(kwargs or {}))


class Kinds(TorchDispatchMode):
    """Of what numbers attention is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes it."""
        if "scaled_dot_product" in function._schema.name:
            self.found.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


def as_torch_has_it(tower: nn.Module) -> nn.Module:
    """A copy with torch's own attention."""
    tower = copy.deepcopy(tower)
    unfold_attention(tower)
    assert not any(isinstance(module, FoldedAttention) for module in tower.modules())
    return tower


def gradient(tower: nn.Module, images: Tensor) -> Tensor:
    """Of the squares by the pixels."""
    leaf = images.clone().requires_grad_(True)
    return torch.autograd.grad(tower(leaf).square().sum(), leaf)[0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_it_is_torchs_attention(model: ZeroShotModel, frozen: bool, training: bool) -> None:
    """Embedding, gradient by the pixels and by every weight: 1e-12 in float64; the same bits with and without one."""
    tower = model.visual.double().train(training).requires_grad_(not frozen)
    torchs = as_torch_has_it(tower)
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(gradient(tower, images), gradient(torchs, images), rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        alone = tower(images)
        torch.testing.assert_close(alone, torchs(images), rtol=1e-10, atol=1e-12)
    assert torch.equal(alone, tower(images)), "a verdict is that of the attack's own forward"
    if not frozen:
        for one in (tower, torchs):
            one(images).square().sum().backward()
        for (name, weight), other in zip(tower.named_parameters(), torchs.parameters(), strict=True):
            torch.testing.assert_close(weight.grad, other.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_no_product_goes_token_by_token_in_an_attack(tiny: ModelSpec) -> None:
    """With frozen weights torch's own attention multiplies once a token; a model that is loaded does not."""
    tower, images = load_model(tiny).visual.requires_grad_(False), torch.rand(4, 3, 32, 32)
    with Products() as ours:
        gradient(tower, images)
    with Products() as torchs:
        gradient(as_torch_has_it(tower), images)
    assert ours.count == 0 < torchs.count


def test_names_stay_and_copies_work(model: ZeroShotModel) -> None:
    assert model.visual.state_dict().keys() == as_torch_has_it(model.visual).state_dict().keys()
    twin = copy.deepcopy(model.visual)
    assert any(isinstance(module, FoldedAttention) for module in twin.modules())
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.visual.parameters()}


def test_all_else_goes_the_old_way() -> None:
    """Masks, cross attention, weights that are asked for: bits of torch's own."""
    plain = nn.MultiheadAttention(8, 2, batch_first=True)
    tower = nn.Sequential(copy.deepcopy(plain))
    fold_attention(tower)
    x, y, mask = torch.rand(2, 3, 8), torch.rand(2, 4, 8), torch.zeros(3, 3)
    assert type(tower[0]) is FoldedAttention
    for given, settings in [((x, x, x), {}), ((x, y, y), {"need_weights": False}), ((x, x, x), {"need_weights": False, "attn_mask": mask})]:
        ours, torchs = tower[0](*given, **settings), plain(*given, **settings)
        assert torch.equal(ours[0], torchs[0]) and (ours[1] is None) == (torchs[1] is None)
    dropping = nn.Sequential(nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True))
    fold_attention(dropping)
    assert type(dropping[0]) is nn.MultiheadAttention


def test_bf16_on_a_cpu_attends_in_fp32() -> None:
    """Also under autocast, which would cast it back; the result and its gradient are bf16, and as exact as bf16 can be."""
    draws = (torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    query, key, value = (draw.bfloat16().requires_grad_() for draw in draws)
    with torch.autocast("cpu", torch.bfloat16), Kinds() as seen:
        mixed = attend(query, key, value)
    assert seen.found == {torch.float32} and mixed.dtype == torch.bfloat16
    exact = nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert torch.equal(mixed, exact.bfloat16())
    (ours,), (wanted,) = (torch.autograd.grad(out.double().square().sum(), query) for out in (mixed, exact))
    assert ours.dtype == torch.bfloat16 and torch.allclose(ours, wanted, rtol=0.02, atol=1e-3)


def test_other_numbers_attend_as_they_are() -> None:
    """fp32 is torch's own, to the bit."""
    query, key, value = (torch.randn(2, 3, 5, 4) for _ in range(3))
    assert torch.equal(attend(query, key, value), nn.functional.scaled_dot_product_attention(query, key, value))
