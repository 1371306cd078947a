"""Matrix products of fp32 on CPUs where torch's own are slow. M, K, N are the sides of a product ``[M, K] @ [K, N]``."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

#: Multiplications M K N from which on the other kernel pays: a call of it takes some 60 microseconds more.
LEAST = 2**22
#: Columns N from which it pays although the left matrix is a transposed one, whose rows oneDNN lays out anew first.
WIDE = 256
#: Set to 0, nothing is replaced.
SWITCH = "AFT_ONEDNN"
_libraries: list[torch.library.Library] = []  # a replacement lasts as long as its library


def use_onednn() -> bool:
    """Sends large fp32 products of this process's CPU to oneDNN, where that is faster; says whether they go there.

    torch's wheels multiply fp32 matrices by MKL, which takes a slow path on processors that are not Intel's: on an AMD EPYC with AVX-512
    about 97 GFLOP/s a core, while oneDNN, in the same wheel, reaches 210. Only ``aten::mm`` and ``aten::addmm`` of fp32 matrices with at
    least ``LEAST`` multiplications are replaced, below autograd and autocast: gradients, gradients of gradients and counted operations are
    as before, and results differ by the order of their sums. A transposed left matrix, as a gradient of weights has it, goes there only if
    it meets ``WIDE`` columns or more: with fewer, oneDNN took up to three times as long. Programs call this once, at their start; importing
    ``aft`` replaces nothing. Whether a product is large depends on the images of its batch, too: other batches, other last bits.

    Does nothing on Intel's processors, which MKL serves well, on those without AVX-512, where nothing was measured, without MKL or oneDNN,
    and where ``AFT_ONEDNN=0`` is set.
    """
    if not _libraries and wanted():
        library = torch.library.Library("aten", "IMPL")
        library.impl("mm", _mm, "CPU", allow_override=True)
        library.impl("addmm", _addmm, "CPU", allow_override=True)
        _libraries.append(library)
    return bool(_libraries)


def use_torch() -> None:
    """Takes :func:`use_onednn` back."""
    while _libraries:
        _libraries.pop()._destroy()


def products() -> Literal["onednn", "torch"]:
    """Whose kernels large fp32 products of this process's CPU go to now."""
    return "onednn" if _libraries else "torch"


@contextmanager
def torchs_products() -> Iterator[None]:
    """Torch's own products inside, and afterwards what was there before."""
    before = products()
    use_torch()
    try:
        yield
    finally:
        use_torch()
        if before == "onednn":
            use_onednn()


def wanted() -> bool:
    """Whether oneDNN is there, MKL as well, and the processor one on which it is faster."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    measured = torch.backends.cpu.get_cpu_capability() == "AVX512" and "GenuineIntel" not in vendor()
    return both and measured and os.environ.get(SWITCH) != "0"


def vendor() -> str:
    """What the system says of the processor's maker."""
    table = Path("/proc/cpuinfo")
    return table.read_text(encoding="utf-8") if table.is_file() else platform.processor()


def _fits(left_MK: Tensor, right_KN: Tensor) -> bool:
    """Large fp32 matrices that can be multiplied, the left one as it lies or the right one wide; torch says what is wrong with others."""
    if not all(one.ndim == 2 and one.dtype == torch.float32 for one in (left_MK, right_KN)):
        return False
    as_it_lies = left_MK.is_contiguous() or not left_MK.t().is_contiguous()
    fits = left_MK.shape[1] == right_KN.shape[0] and left_MK.shape[0] * right_KN.numel() >= LEAST
    return fits and (as_it_lies or right_KN.shape[1] >= WIDE)


def _mm(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """``aten::mm``."""
    if _fits(left_MK, right_KN):
        return _product(left_MK, right_KN, None)
    return torch.mm(left_MK, right_KN, out=left_MK.new_empty(0))


def _addmm(added: Tensor, left_MK: Tensor, right_KN: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``aten::addmm``: beta added + alpha left @ right."""
    if beta == alpha == 1 and added.dtype == torch.float32 and added.shape == right_KN.shape[1:] and _fits(left_MK, right_KN):
        return _product(left_MK, right_KN, added)
    return torch.addmm(added, left_MK, right_KN, beta=beta, alpha=alpha, out=left_MK.new_empty(0))


def _product(left_MK: Tensor, right_KN: Tensor, bias_N: Tensor | None) -> Tensor:
    """By oneDNN."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(dense(left_MK), dense(right_KN).t(), bias_N, "none", [], "")
    return found


def dense(matrix: Tensor) -> Tensor:
    """Without gaps between rows or columns: oneDNN takes a thousand times as long for a slice of a larger tensor."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()
