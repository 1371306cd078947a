"""Counted noise: the right bits, uniform, uncorrelated, and nobody else's business."""

import math

import pytest
import torch

from aft.attacks import normal, sample_keys, uniform
from aft.errors import InputError

KEYS = sample_keys(3, 1, torch.arange(400))


def reference_mix(state: int) -> int:
    """The splitmix64 finaliser in Python's unbounded integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_bits_are_those_of_the_formula():
    """Tensor arithmetic that wraps and shifts signed words gives the bits of the hash in unbounded integers (so on any device)."""
    golden, keys = 0x9E3779B97F4A7C15, KEYS[:5]
    for key, row in zip(keys.tolist(), uniform(keys, 2, (6,)), strict=True):
        lane = reference_mix((key + 3 * golden) % 2**64)
        words = [reference_mix((lane + (element + 1) * golden) % 2**64) for element in range(6)]
        assert [(word >> 40) * 2.0**-24 for word in words] == row.tolist()


def test_uniform_is_uniform():
    """400 x 768 numbers in [0, 1): mean, variance and 64 equal bins as a uniform law has them (five standard errors)."""
    numbers = uniform(KEYS, 0, (3, 16, 16)).double().flatten()
    assert 0 <= numbers.min() and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 5 * math.sqrt(1 / 12 / numbers.numel())
    expected = numbers.numel() / 64
    chi_square = ((torch.histc(numbers, 64, 0, 1) - expected) ** 2 / expected).sum()
    assert abs(chi_square - 63) < 5 * math.sqrt(2 * 63)


def test_normal_is_normal():
    """Mean 0, variance 1, fourth moment 3; all finite."""
    numbers = normal(KEYS, 0, (768,)).double().flatten()
    assert numbers.isfinite().all()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((numbers**power).mean() - moment) < 5 * math.sqrt(variance / numbers.numel())


@pytest.mark.parametrize("other", ["neighbour", "draw", "element", "epoch", "seed"])
def test_streams_are_uncorrelated(other):
    """Neighbouring samples, draws, elements, epochs and seeds share nothing: correlation 0 within five standard errors."""
    index = torch.arange(400)
    here = uniform(KEYS, 0, (256,))
    there = {
        "neighbour": lambda: here.roll(1, 0),
        "draw": lambda: uniform(KEYS, 1, (256,)),
        "element": lambda: here.roll(1, 1),
        "epoch": lambda: uniform(sample_keys(3, 2, index), 0, (256,)),
        "seed": lambda: uniform(sample_keys(4, 1, index), 0, (256,)),
    }[other]()
    correlation = torch.corrcoef(torch.stack([here.flatten(), there.flatten()]).double())[0, 1]
    assert abs(correlation) < 5 / math.sqrt(here.numel())


@pytest.mark.parametrize("draw_from", [uniform, normal])
def test_a_sample_draws_the_same_in_any_batch(draw_from):
    """Split, permuted or alone, a sample's numbers are the same to the bit; keys too."""
    whole = draw_from(KEYS[:9], 5, (3, 4))
    order = torch.tensor([4, 0, 8])
    assert torch.equal(draw_from(KEYS[order], 5, (3, 4)), whole[order])
    assert torch.equal(sample_keys(3, 1, torch.tensor([4, 0, 8])), KEYS[order])


def test_no_generator_moves():
    """Neither reads nor moves torch's global generator, and leaves the keys alone."""
    before, keys = torch.get_rng_state(), KEYS.clone()
    first = uniform(KEYS, 0, (8,))
    torch.rand(7)
    assert torch.equal(uniform(KEYS, 0, (8,)), first)
    torch.set_rng_state(before)
    normal(KEYS, 0, (8,))
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(KEYS, keys)


def test_large_indices_and_wrong_ones():
    """63-bit indices (hashes of shard and key) are fine; other types are refused with the remedy."""
    assert sample_keys(-5, 2**40, torch.tensor([2**63 - 1, -(2**63), 0])).unique().numel() == 3
    with pytest.raises(InputError, match="index_B is torch.float32.*int64"):
        sample_keys(0, 0, torch.rand(3))
