"""What keeps an attack from leaving a trace, and what names a lack of memory.

Shapes: B images, C channels, H rows, W columns.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from aft.errors import RunError

_NO_MEMORY = ("out of memory", "can't allocate memory")


@contextmanager
def undisturbed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode, frozen weights, gradients enabled; afterwards everything is as before, also after an exception.

    Inside, a caller's ``no_grad`` and ``inference_mode`` do not hold. Restored are the training flag of every submodule, ``requires_grad``
    of every parameter, and the state of torch's random generators (of the CPU and of the modules' CUDA devices), should the networks
    draw from them. ``.grad`` and BatchNorm statistics are never written.

    Args:
        modules: the networks; one that is named twice, or inside another, is restored as it was.
    """
    parts = {part for module in modules for part in module.modules()}
    weights = {weight for part in parts for weight in part.parameters(recurse=False)}
    training = [part for part in parts if part.training]
    learning = [weight for weight in weights if weight.requires_grad]
    devices = sorted({weight.device.index for weight in weights if weight.device.type == "cuda"})
    try:
        for part in training:
            part.training = False
        for weight in learning:
            weight.requires_grad_(False)
        # inference_mode(False) ends no_grad, too
        with torch.inference_mode(False), torch.random.fork_rng(devices):
            yield
    finally:
        for part in training:
            part.training = True
        for weight in learning:
            weight.requires_grad_(True)


@contextmanager
def naming_out_of_memory(what: str, x_BCHW: Tensor) -> Iterator[None]:
    """Turns a lack of memory into an error that names what ran, on which batch, and the remedy.

    Raises:
        RunError: in place of torch's error, which stays its cause.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(words in str(error).lower() for words in _NO_MEMORY):
            raise
        raise RunError(
            f"out of memory in {what} on a batch of {len(x_BCHW)} images of {tuple(x_BCHW.shape[1:])}: "
            "make the batch smaller or use bf16 autocast; fewer steps save time, not memory."
        ) from error
