"""A DALL-E 2 prior of the package ``dalle2_pytorch`` as a prior over unit image embeddings, as the published CLIPure-Diff has it.

Shapes: n samples, D embedding width.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aft.clip.files import file_hash, read_file
from aft.errors import ConfigError, WeightsError

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}


class Dalle2Prior(nn.Module):
    """The denoising loss of a ``DiffusionPrior`` without any text, one value a sample.

    The loss is that of its own training: it predicts the embedding (times ``image_embed_scale``), the noise or v. Text is dropped, so the
    prior is unconditional, and its random generator is never asked.

    Args:
        prior: a ``dalle2_pytorch.DiffusionPrior``.
        sha256: of its file.
    """

    def __init__(self, prior: nn.Module, sha256: str = "") -> None:
        super().__init__()
        self.prior: Any = prior.eval().requires_grad_(False)
        self.sha256 = sha256

    @property
    def width(self) -> int:
        """D."""
        return int(self.prior.image_embed_dim)

    def loss(self, unit_nD: Tensor, time_n: Tensor, noise_nD: Tensor) -> Tensor:
        """The loss of each sample, ``[n]``; times are rounded down to the prior's own steps."""
        schedule = self.prior.noise_scheduler
        x_nD = unit_nD * self.prior.image_embed_scale
        step_n = (time_n * schedule.num_timesteps).long().clamp(0, schedule.num_timesteps - 1)
        keep_n1 = schedule.sqrt_alphas_cumprod[step_n][:, None].to(x_nD)
        add_n1 = schedule.sqrt_one_minus_alphas_cumprod[step_n][:, None].to(x_nD)
        noisy_nD, no_text_nD = keep_n1 * x_nD + add_n1 * noise_nD, torch.zeros_like(x_nD)
        predicted_nD = self.prior.net(noisy_nD, step_n, text_embed=no_text_nD, text_cond_drop_prob=1.0)
        if self.prior.predict_v:
            wanted_nD = keep_n1 * noise_nD - add_n1 * x_nD
        elif self.prior.predict_x_start:
            wanted_nD = x_nD
            if self.prior.training_clamp_l2norm:
                predicted_nD = self.prior.l2norm_clamp_embed(predicted_nD)
        else:
            wanted_nD = noise_nD
        return LOSSES[schedule.loss_type](predicted_nD, wanted_nD, reduction="none").mean(1)


def load_dalle2(path: Path) -> Dalle2Prior:
    """A prior from its checkpoint and the JSON of its configuration, which lies beside it under the same name.

    Args:
        path: ``FILE.pth``, as the package's trainer writes it; ``FILE.json`` holds ``{"prior": {"net": {...}, ...}}``.

    Raises:
        ConfigError: the package is not there.
        WeightsError: a file is missing, or the tensors do not fit the configuration.
    """
    try:
        package = importlib.import_module("dalle2_pytorch")
    except ImportError as error:
        raise ConfigError(f"{path} is a prior of the package dalle2_pytorch, which cannot be imported ({error}): "
                          "pip install 'aft[diffusion]', or leave prior out for the small one that ships.") from error  # fmt: skip
    described = path.with_suffix(".json")
    if not path.is_file() or not described.is_file():
        raise WeightsError(f"no prior at {path} with its configuration {described.name} beside it: both are needed.")
    settings = dict(json.loads(described.read_text(encoding="utf-8"))["prior"])
    contents = read_file(path)
    state = {key: value for key, value in contents.get("model", contents).items() if not key.startswith("clip.")}
    network = settings.pop("net")
    settings.pop("clip", None)  # whose embeddings it is for; the model is ours
    try:
        with torch.random.fork_rng(devices=[]):
            prior = package.DiffusionPrior(net=package.DiffusionPriorNetwork(**network), **settings)
        prior.load_state_dict(state)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise WeightsError(f"{path} does not fit {described.name}: {error}") from error
    return Dalle2Prior(prior, file_hash(path))
