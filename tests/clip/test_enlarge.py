"""MiniCLIP-64: the same weights on enlarged images. The law of its patch embedding, and how near its answers are."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aft.clip import ModelSpec, ZeroShotModel, load_model, weights
from aft.clip.enlarge import REACH, enlarge, enlarge_kernel, enlarging_matrix
from aft.clip.pack import pack_tower
from aft.errors import ConfigError, WeightsError
from datamodules.sample import Sample


def enlarged(images_BCHW: Tensor, factor: int) -> Tensor:
    """Our own resize."""
    side = factor * images_BCHW.shape[-1]
    return F.interpolate(images_BCHW, size=(side, side), mode="bicubic", antialias=True, align_corners=False)


@pytest.mark.parametrize(("side", "factor"), [(8, 2), (4, 3), (2, 2)])
def test_the_matrix_is_the_resize_of_a_patch_inside_an_image(side: int, factor: int) -> None:
    """``U x U^T`` of a patch and what lies around it is that part of the enlarged image."""
    image = torch.rand(1, 1, 5 * side + 2 * REACH, 5 * side + 2 * REACH, dtype=torch.float64)
    begin, matrix = 2 * side, enlarging_matrix(side, factor)
    around = image[0, 0, begin - REACH : begin + side + REACH, begin - REACH : begin + side + REACH]
    inside = slice(factor * begin, factor * (begin + side))
    torch.testing.assert_close(matrix @ around @ matrix.T, enlarged(image, factor)[0, 0, inside, inside])


@pytest.mark.parametrize(("side", "factor"), [(8, 2), (4, 3), (3, 2)])
def test_the_kernel_solves_the_least_squares_problem_with_the_least_norm(side: int, factor: int) -> None:
    """Against float64 least squares on the full two-dimensional operator: the same residual, the same solution."""
    kernel = torch.randn(5, 2, side, side, dtype=torch.float64)
    matrix = enlarging_matrix(side, factor)
    operator = torch.kron(matrix, matrix)
    target = F.pad(kernel, (REACH,) * 4).flatten(2)
    given = enlarge_kernel(kernel, factor).flatten(2)
    expected = torch.linalg.lstsq(operator.T, target.view(10, -1).T, driver="gelsd").solution.T.view(5, 2, -1)
    torch.testing.assert_close(given, expected, rtol=1e-8, atol=1e-8)
    residual = given @ operator - target
    torch.testing.assert_close(residual @ operator.T, torch.zeros_like(given), rtol=0, atol=1e-8)  # the normal equations


def smooth(count: int) -> Tensor:
    """Random images without much detail, ``[count, 3, 32, 32]``."""
    coarse = torch.rand(count, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=(32, 32), mode="bicubic", antialias=True).clamp(0, 1)


def test_tokens_of_enlarged_images_are_nearly_the_same() -> None:
    """Patch embeddings, relative to their own length: below 1 % (nearest-pixel copies of the weights miss this bound)."""
    small, large = load_model("miniclip32"), load_model("miniclip64")
    images = smooth(32)
    with torch.no_grad():
        before, after = small.visual.conv1(small.pixels(images)), large.visual.conv1(large.pixels(images))
    copied = small.visual.conv1.weight.detach().repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    crude = F.conv2d(large.pixels(images), copied, stride=16)
    error, crude_error = (float((tokens - before).norm() / before.norm()) for tokens in (after, crude))
    print(f"relative token error {error:.4f}, with copied weights {crude_error:.4f}")
    assert error < 0.01 < crude_error


def test_miniclip64_answers_as_miniclip32_on_the_sample() -> None:
    """The same class on 95 % of 500 test images, and a clean accuracy within two points."""
    small, large = load_model("miniclip32"), load_model("miniclip64")
    test = Sample().evaluation_set("test")
    batch = test.batch(range(500))
    with torch.no_grad():
        ours = [model(batch.images, model.text_bank(test.class_names, test.templates)).argmax(1) for model in (small, large)]
    agreement = float((ours[0] == ours[1]).float().mean())
    accuracy = [float((answer == batch.labels).float().mean()) for answer in ours]
    print(f"n = {len(batch.images)}: the same class on {agreement:.3f}; clean {accuracy[0]:.3f} at 32 px, {accuracy[1]:.3f} at 64 px")
    assert agreement >= 0.95 and abs(accuracy[0] - accuracy[1]) <= 0.02


def test_the_record_says_what_it_is() -> None:
    """No second weights file: the embedded file's hash, the larger sizes; the configuration rebuilds the architecture."""
    small, large = load_model("miniclip32").record, load_model("miniclip64")
    record = large.record
    vision = record.config["vision_cfg"]
    assert (record.name, record.resolution, record.sha256) == ("miniclip64", 64, small.sha256)
    assert (vision["patch_size"], vision["image_size"]) == (16, 64)  # type: ignore[index]
    assert large.visual.grid_size == load_model("miniclip32").visual.grid_size
    weights.load_strictly(weights.build_clip(record.config), large.clip.state_dict(), "miniclip64")


def test_random_weights_and_files_under_its_name_are_not_enlarged_again(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """What was saved at 64 px is loaded as it is; a file at 32 px is refused by its patch size."""
    large = load_model("miniclip64")
    torch.save(large.clip.state_dict(), tmp_path / "64.pt")
    torch.save(load_model("miniclip32").clip.state_dict(), tmp_path / "32.pt")
    again = load_model(ModelSpec("miniclip64", str(tmp_path / "64.pt")))
    assert torch.equal(again.visual.conv1.weight, large.visual.conv1.weight)
    assert load_model(ModelSpec("miniclip64", "random")).visual.conv1.kernel_size == (16, 16)
    with pytest.raises(WeightsError, match="the file has patch size 8, miniclip64 has 16"):
        load_model(ModelSpec("miniclip64", str(tmp_path / "32.pt")))


def test_the_given_model_stays_as_it_is(model: ZeroShotModel) -> None:
    """``enlarge`` works on a copy, for any ViT and factor; other towers and factors are refused."""
    before = copy.deepcopy(model.clip.state_dict())
    larger = enlarge(model.clip, 3)
    assert larger.visual.conv1.weight.shape == (32, 3, 24, 24) and larger.visual(torch.rand(1, 3, 96, 96)).shape == (1, 16)
    assert all(torch.equal(value, before[name]) for name, value in model.clip.state_dict().items())
    with pytest.raises(ConfigError, match="factor = 1"):
        enlarge(model.clip, 1)
    with pytest.raises(WeightsError, match="needs a ViT"), torch.device("meta"):
        enlarge(weights.build_clip(open_clip.get_model_config("RN50")), 2)


def test_a_tower_of_the_small_model_serves_the_large_one(tmp_path) -> None:
    """Fine-tuned at 32 px, asked for as miniclip64: as if the small model with that tower had been enlarged."""
    small = load_model("miniclip32")
    with torch.no_grad():
        small.visual.proj.mul_(-1)
    pack_tower(small, tmp_path / "tower.safetensors")
    large, expected = load_model(ModelSpec("miniclip64", str(tmp_path / "tower.safetensors"))), enlarge(small.clip, 2)
    assert (large.record.name, large.record.resolution) == ("miniclip64", 64)
    images = enlarged(smooth(4), 2)
    with torch.no_grad():
        torch.testing.assert_close(large.encode(images).embedding_BD, expected.visual(large.pixels(images)), rtol=2e-3, atol=2e-3)
