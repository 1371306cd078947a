"""Patch embedding as a product: torch's convolution in values, gradients and names, and no convolution in an attack's backward pass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from aft.clip import ModelSpec, load_model
from aft.clip.patches import PatchEmbedding, cuts_pixels, embed_by_convolution, embed_by_product
from tests import towers


class Convolutions(TorchDispatchMode):
    """How many there are, backward ones among them."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts."""
        self.count += "convolution" in function._schema.name
        return function(*args, **(kwargs or {}))


def pair(patch: int = 5, width: int = 4, **settings: Any) -> tuple[nn.Conv2d, nn.Conv2d]:
    """Ours and torch's, with the same weights."""
    torchs = nn.Conv2d(3, width, patch, patch, **settings).double()
    ours = nn.Sequential(copy.deepcopy(torchs))
    embed_by_product(ours)
    assert type(ours[0]) is PatchEmbedding
    return ours[0], torchs


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_it_is_torchs_convolution(bias: bool, order: torch.memory_format) -> None:
    """Patches of high and of wide images, gradients by pixels and weights: 1e-12 in float64."""
    ours, torchs = pair(bias=bias)
    images = torch.rand(2, 3, 10, 20, dtype=torch.float64).to(memory_format=order)
    found: list[list[Tensor]] = []
    for one in (ours, torchs):
        leaf = images.clone().requires_grad_(True)
        out = one(leaf)
        found.append([out, *torch.autograd.grad(out.pow(3).sum(), [leaf, *one.parameters()])])
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


def test_what_is_no_whole_number_of_patches_goes_the_old_way() -> None:
    """One image without its batch, and pixels that are left over: bits of torch's own."""
    ours, torchs = pair()
    for images in (torch.rand(2, 3, 12, 10), torch.rand(2, 3, 10, 12), torch.rand(3, 10, 10)):
        assert torch.equal(ours(images.double()), torchs(images.double()))


def test_other_devices_keep_the_convolution() -> None:
    """Nothing was measured there; ``meta`` stands for them."""
    ours, _ = pair()
    with Convolutions() as seen:
        ours.to("meta")(torch.rand(2, 3, 10, 10, device="meta", dtype=torch.float64))
    assert seen.count == 1


@pytest.mark.parametrize("other", [
    nn.Conv2d(3, 4, 4, 2), nn.Conv2d(3, 4, 4, 4, padding=1), nn.Conv2d(4, 4, 4, 4), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 4, 4, dilation=2),
    nn.Conv2d(3, 4, (4, 2), (4, 2)), nn.Conv2d(3, 3, 4, 4, groups=3),
], ids=["overlap", "padded", "no pixels", "one pixel", "gaps", "oblong", "grouped"])  # fmt: skip
def test_other_convolutions_are_left_alone(other: nn.Conv2d) -> None:
    """Whatever is not patches side by side of three colours."""
    tower = nn.Sequential(other)
    embed_by_product(tower)
    assert type(tower[0]) is nn.Conv2d and not cuts_pixels(other)


@pytest.mark.parametrize("name", ["vit", "timm_vit", "resnet"])
def test_a_loaded_transformer_attacks_without_a_convolution(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a ResNet keeps its own; weights keep their names, also when it is taken back."""
    (tmp_path / "towers").mkdir()
    towers.register(monkeypatch, tmp_path / "towers")
    model = load_model(ModelSpec(name, "random"))
    side = model.record.resolution
    leaf = torch.rand(2, 3, side, side).requires_grad_(True)
    with Convolutions() as seen:
        torch.autograd.grad(model.visual(leaf).sum(), leaf)
    assert (seen.count == 0) is (name != "resnet")
    before = list(model.visual.state_dict())
    embed_by_convolution(model.visual)
    assert list(model.visual.state_dict()) == before and not any(isinstance(module, PatchEmbedding) for module in model.modules())
