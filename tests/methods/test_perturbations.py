"""Kept perturbations: where an attack goes on from, which pixels they belong to, and which are forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from aft.attacks import FGSM, PGD, ClassificationObjective, Judged, sample_keys
from aft.clip import ModelSpec, ZeroShotModel
from aft.errors import ConfigError
from aft.methods import ContrastivePretraining, WarmStart
from aft.methods.perturbations import PerturbationStore, marks
from tests.conftest import MemoryData
from tests.methods.test_cheaper import FREE, PGD2, tecoa, trained


def objective_of(model: ZeroShotModel, labels: Tensor) -> ClassificationObjective:
    """Cross-entropy over a fixed bank."""
    text = model.text_bank(["cat", "dog", "ship"], ["a photo of a {}."])
    return ClassificationObjective(lambda x: model(x, text), labels, modules=(model,))


def test_two_warm_steps_are_one_attack_of_two_steps(model: ZeroShotModel, data: MemoryData) -> None:
    """What an attack of one step leaves is where the next begins: without momentum they add up to the attack of two steps."""
    batch = data.batches()[0]
    keys, objective = sample_keys(0, 0, batch.index), objective_of(model, batch.labels)  # type: ignore[arg-type]
    one, store = PGD(eps="8/255", step_size="4/255", steps=1), PerturbationStore(WarmStart(capacity=8))
    for _ in range(2):
        found = store.attack(one, lambda: objective, batch.images, batch.index, keys)
    whole = PGD2(objective, batch.images, keys).x_BCHW
    assert (found.x_BCHW - whole).abs().max() < 8 / 255 * 2e-3  # kept in half precision
    first = one(objective, batch.images, keys).x_BCHW
    assert (first - whole).abs().max() > 1 / 255


def test_a_perturbation_belongs_to_the_pixels_it_was_made_for(model: ZeroShotModel, data: MemoryData) -> None:
    """Mirrored, or another sample with the same pixels: the attack begins as without a store."""
    batch = data.batches()[0]
    keys, store, attack = sample_keys(0, 1, batch.index), PerturbationStore(WarmStart(capacity=16)), PGD2
    store.put(batch.images, batch.index, torch.full_like(batch.images, 0.01))
    fresh = attack.start(batch.images, keys)
    assert torch.allclose(store.starts(attack, batch.images, batch.index, keys), batch.images + 0.01, atol=1e-4)
    mirrored = batch.images.flip(3)
    assert torch.equal(store.starts(attack, mirrored, batch.index, keys), attack.start(mirrored, keys))
    assert torch.equal(store.starts(attack, batch.images, batch.index + 100, keys), fresh)


def test_a_mirror_image_has_another_mark_also_where_its_brightness_is_balanced_and_in_half_precision() -> None:
    """A sum weighted by place alone is the same for it: 3 left of the middle weighs what 1 does at the edge. Black and white text is so."""
    balanced = torch.zeros(1, 3, 4, 4)
    balanced[:, :, 1] = torch.tensor([0.0, 3.0, 0.0, 1.0]) / 255
    bright = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) / 2 + 0.4
    for images in (balanced, bright, bright.half(), bright.bfloat16()):
        assert int(marks(images)) != int(marks(images.flip(3))) and int(marks(images)) == int(marks(images.double()))


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
@pytest.mark.parametrize("free", [False, True])
def test_the_store_computes_in_fp32_as_attacks_do(dtype: torch.dtype, free: bool, data: MemoryData) -> None:
    """In the precision of 16-bit pixels a perturbation of 1/255 would be rounded to nothing, or to twice of it."""
    batch, store = data.batches()[0], PerturbationStore(WarmStart(free=free, capacity=8))
    images = (batch.images * 0.2 + 0.75).to(dtype)
    store.put(images, batch.index, torch.full((8, 3, 32, 32), 1 / 255))
    seen: list[Tensor] = []

    def objective(x: Tensor, rows: Tensor) -> Judged:
        """Keeps where it is asked."""
        seen.append(x.detach())
        return Judged(x.flatten(1).sum(1), None)

    objective.modules = ()  # type: ignore[attr-defined]
    found = store.attack(PGD2, lambda: objective, images, batch.index, sample_keys(0, 0, batch.index))  # type: ignore[arg-type, return-value]
    start = found.x_BCHW.detach() if free else seen[0]
    assert start.dtype == torch.float32
    torch.testing.assert_close(start - images.float(), torch.full_like(start, 1 / 255), rtol=1e-3, atol=0)


def test_the_store_keeps_the_newest(data: MemoryData) -> None:
    """Two batches of eight in a store of twelve: the first four of the first are gone, and a second put of a batch replaces the first."""
    first, second, _ = data.batches()
    store, attack = PerturbationStore(WarmStart(capacity=12)), PGD(eps="8/255", step_size="4/255", steps=1, random_start=False)
    store.put(first.images, first.index, torch.full_like(first.images, 0.01))
    store.put(second.images, second.index, torch.full_like(second.images, 0.02))
    kept = (store.starts(attack, first.images, first.index, first.index) - first.images).amax(dim=(1, 2, 3))
    assert torch.allclose(kept, torch.tensor([0.0] * 4 + [0.01] * 4), atol=1e-4)
    store.put(first.images[:4], first.index[:4], torch.full_like(first.images[:4], 0.03))
    store.put(first.images[:4], first.index[:4], torch.full_like(first.images[:4], 0.04))
    newest = (store.starts(attack, first.images[:4], first.index[:4], first.index[:4]) - first.images[:4]).amax(dim=(1, 2, 3))
    assert torch.allclose(newest, torch.full((4,), 0.04), atol=1e-4)
    with pytest.raises(ConfigError, match="less than the 8 images of a step"):
        PerturbationStore(WarmStart(capacity=7)).put(first.images, first.index, first.images)
    with pytest.raises(ConfigError, match="capacity = 0"):
        WarmStart(capacity=0)


def test_a_store_without_an_attack_is_refused() -> None:
    """Free training would silently be clean training."""
    with pytest.raises(ConfigError, match="warm_start is set, and there is no attack"):
        ContrastivePretraining(ModelSpec("tiny", "random"), warm_start=FREE)


def test_only_pgd_begins_at_given_points(data: MemoryData, tmp_path: Path) -> None:
    """Another attack is named, in training and by the attack itself."""
    with pytest.raises(ConfigError, match="goes with aft.attacks.PGD"):
        trained(tmp_path, tecoa(attack=FGSM(eps="8/255"), warm_start=WarmStart()), data)


def test_a_store_of_another_capacity_begins_empty(data: MemoryData) -> None:
    """Its places would mean other numbers."""
    batch = data.batches()[0]
    store = PerturbationStore(WarmStart(capacity=8))
    store.put(batch.images, batch.index, batch.images)
    same, other = PerturbationStore(WarmStart(capacity=8)), PerturbationStore(WarmStart(capacity=9))
    same.load(store.state())
    other.load(store.state())
    assert same.count == 8 and other.count == 0
