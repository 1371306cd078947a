"""Counted noise: random numbers that are a function of who asks, not of when or where.

Each number is a hash of (sample key, draw, element), in int64 tensor arithmetic that wraps at 64 bits as on every device.
So a sample gets the same bits on any device, beside any neighbours, on any number of processes and after any resume,
and no random generator is read or moved.

Shapes: B samples; ``index_B`` the samples' stable numbers, ``keys_B`` their keys (int64).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aft.errors import InputError

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd: the step between two counters


def sample_keys(seed: int, epoch: int, index_B: Tensor) -> Tensor:
    """One key a sample: a 64-bit mix of (seed, epoch, index).

    Args:
        seed: any integer.
        epoch: which pass over the data; another epoch gives other noise.
        index_B: the samples' stable numbers, int64 ``[B]``.

    Returns:
        int64 ``[B]``, to hand to an attack or to :func:`uniform`.

    Raises:
        InputError: ``index_B`` is not int64 ``[B]``.

    Example:
        >>> import torch
        >>> sample_keys(0, 0, torch.tensor([7, 8, 7])).unique().numel()
        2
    """
    if index_B.dtype != torch.int64 or index_B.ndim != 1:
        raise InputError(f"index_B is {index_B.dtype} of shape {tuple(index_B.shape)}: give one int64 number a sample, shape [B].")
    root_B = torch.full_like(index_B, _signed(seed))
    for word_B in (torch.full_like(index_B, _signed(epoch)), index_B):
        root_B = _mix(root_B + _signed(_GOLDEN)) + word_B
    return _mix(root_B + _signed(_GOLDEN))


def uniform(keys_B: Tensor, draw: int, shape: Sequence[int]) -> Tensor:
    """Uniform numbers in [0, 1) on a grid of 2**-24, the same bits on every device.

    Args:
        keys_B: int64 ``[B]`` from :func:`sample_keys`.
        draw: number of the draw: a restart, a step, a draw of a defence.
        shape: shape for one sample.

    Returns:
        float32 ``[B, *shape]``.

    Example:
        >>> import torch
        >>> keys = sample_keys(0, 0, torch.arange(4))
        >>> torch.equal(uniform(keys, 0, (3,))[2:], uniform(keys[2:], 0, (3,)))
        True
    """
    return _grid(_bits(keys_B, draw, math.prod(shape)), 40).reshape(-1, *shape)


def normal(keys_B: Tensor, draw: int, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers: ``sqrt(-2 ln u) cos(2 pi v)`` with ``u`` and ``v`` from the two halves of one hash (Box-Muller).

    Args:
        keys_B: int64 ``[B]`` from :func:`sample_keys`.
        draw: number of the draw; the same number in :func:`uniform` is not independent of it.
        shape: shape for one sample.

    Returns:
        float32 ``[B, *shape]``; the bits below are the same everywhere, logarithm and cosine may differ in the last one.
    """
    bits = _bits(keys_B, draw, math.prod(shape))
    radius = (1 - _grid(bits, 40)).log_().mul_(-2).sqrt_()
    return (radius * _grid(bits, 16).mul_(2 * math.pi).cos_()).reshape(-1, *shape)


def _bits(keys_B: Tensor, draw: int, count: int) -> Tensor:
    """64 hashed bits for each sample and element, int64 ``[B, count]``."""
    lane_B = _mix(keys_B + _signed((draw + 1) * _GOLDEN))
    counter = torch.arange(1, count + 1, device=keys_B.device) * _signed(_GOLDEN)
    return _mix(lane_B[:, None] + counter)


def _mix(state: Tensor) -> Tensor:
    """The finaliser of splitmix64, in place: each bit of the input flips each bit of the output half of the time."""
    state ^= _shift(state, 30)
    state *= _signed(0xBF58476D1CE4E5B9)
    state ^= _shift(state, 27)
    state *= _signed(0x94D049BB133111EB)
    state ^= _shift(state, 31)
    return state


def _shift(state: Tensor, by: int) -> Tensor:
    """Logical right shift: int64 shifts copy the sign bit, so it is masked away."""
    return (state >> by) & ((1 << (64 - by)) - 1)


def _grid(bits: Tensor, lowest: int) -> Tensor:
    """24 of the bits, from ``lowest`` up, as float32 in [0, 1)."""
    return ((bits >> lowest) & 0xFFFFFF).to(torch.float32).mul_(2.0**-24)


def _signed(word: int) -> int:
    """The int64 with the same low 64 bits as ``word``."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)
