"""What the teacher said of clean images is asked once, and only where an image is the same each time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from aft.clip import ModelSpec
from aft.errors import ConfigError
from aft.methods import OptimizerSpec
from aft.methods.teacher_cache import TeacherCache
from tests.conftest import Calls, MemoryData, make_trainer
from tests.methods.recipes import build


def trained(name: str, tiny: ModelSpec, folder: Path, augment: str = "none", **settings: object) -> tuple[int, dict[str, Tensor]]:
    """Two epochs of three steps: how often the teacher ran, and the weights."""
    data = MemoryData()
    data.augment = augment  # type: ignore[attr-defined]
    method = build(name, tiny, optimizer=OptimizerSpec(name="sgd", lr=1e-3, schedule="constant"), **settings)  # no step is skipped
    counted, begin = list[Calls](), method.on_fit_start

    def watched() -> None:
        begin()
        counted.append(Calls(method._teacher[0].visual))

    method.on_fit_start = watched  # type: ignore[method-assign]
    make_trainer(folder, max_steps=6, limit_val_batches=0).fit(method, datamodule=data)
    return counted[0].count, {key: value.clone() for key, value in method.model.clip.state_dict().items()}


@pytest.mark.parametrize("name", ["fare", "lore", "agft"])
def test_the_second_epoch_asks_nothing_and_learns_the_same(name: str, tiny: ModelSpec, tmp_path: Path) -> None:
    """Batches are the same in both epochs here, so the weights are, to the bit."""
    often, expected = trained(name, tiny, tmp_path)
    once, found = trained(name, tiny, tmp_path, cache_teacher=True)
    assert (often, once) == (6, 3)
    assert all(value.isfinite().all() and torch.equal(value, expected[key]) for key, value in found.items())


def test_only_new_images_are_encoded() -> None:
    cache, asked = TeacherCache(), list[int]()

    def encode(images: Tensor) -> Tensor:
        asked.append(len(images))
        return images.flatten(1)

    images = torch.rand(4, 1, 2, 2)
    first = cache(torch.tensor([9, 4]), images[:2], encode)
    both = cache(torch.tensor([5, 4, 9, 6]), images[[2, 1, 0, 3]], encode)
    assert asked == [2, 2] and torch.equal(first, images[:2].flatten(1)) and torch.equal(both, images[[2, 1, 0, 3]].flatten(1))


@pytest.mark.parametrize(("name", "augment", "message"), [
    ("fare", "flip", "augment = 'flip'"), ("tga_zsr", "none", "patch tokens"), ("pmg_aft", "none", "no term asks"),
])  # fmt: skip
def test_what_would_be_wrong_is_refused(name: str, augment: str, message: str, tiny: ModelSpec, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(name, tiny, tmp_path, augment, cache_teacher=True)
