"""Whole-batch augmentation is the per-image one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.augment import apply, draw


@pytest.mark.parametrize("augment", ["none", "flip", "crop_flip"])
@pytest.mark.parametrize("size", [(8, 8), (6, 11)])
def test_batch_equals_per_image_reference(augment: str, size: tuple[int, int]) -> None:
    """Each image is numpy's reflect padding, cut at its shift, then mirrored; to the bit."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (32, 3, *size), dtype=np.uint8))
    draws = draw(augment, 32, 3, (0, 1, 2))
    got = apply(images, draws)
    for image, new, (down, right), flip in zip(images.numpy(), got.numpy(), draws.shift_B2.tolist(), draws.flip_B.tolist(), strict=True):
        padded = np.pad(image, ((0, 0), (3, 3), (3, 3)), mode="reflect")
        want = padded[:, 3 + down:3 + down + size[0], 3 + right:3 + right + size[1]]
        assert np.array_equal(new, want[:, :, ::-1] if flip else want)


def test_draws_cover_their_range_and_are_what_was_asked() -> None:
    """All shifts -3 .. 3 occur, about half is mirrored, ``flip`` does not shift and ``none`` does nothing."""
    both, flip, none = (draw(kind, 4000, 3, (7, 1, 0, 5)) for kind in ("crop_flip", "flip", "none"))
    assert set(both.shift_B2.flatten().tolist()) == set(range(-3, 4))
    assert 0.45 < both.flip_B.float().mean() < 0.55
    assert not flip.shift_B2.any() and torch.equal(flip.flip_B, both.flip_B)
    assert not none.shift_B2.any() and not none.flip_B.any()


def test_draws_differ_between_steps_and_leave_global_randomness_alone() -> None:
    """The key decides; torch's and numpy's global streams are not read."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    steps = [draw("crop_flip", 64, 4, (0, 1, 0, step)).shift_B2 for step in range(2)]
    assert not torch.equal(*steps)
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])
