"""Tensors of all ranks, for losses that are defined on the global batch."""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor


def gather_with_gradient(value: Tensor) -> Tensor:
    """Rows of all ranks in rank order, ``[W * B, ...]``; the value itself on one process.

    Every rank then computes the same global loss; DDP averages over ranks what the backward of the gather sums, so the gradient is
    that of one process with the joint batch. Every rank must bring the same number of rows.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    gathered = differentiable.all_gather(value) if value.requires_grad else _gather(value)
    return torch.cat(list(gathered))


def _gather(value: Tensor) -> list[Tensor]:
    places = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(places, value.contiguous())
    return places


def leave_process_group() -> None:
    """Ends this process's part in a distributed run, if there is one: the last act of a program that trained.

    Lightning does so for NCCL alone. A gloo thread that outlives the interpreter can end a good run with "terminate called without an
    active exception" and exit code -6.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
