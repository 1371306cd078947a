"""A small latent diffusion prior: how likely is a unit image embedding?

Noise is added along ``x_t = cos(pi t / 2) x + sin(pi t / 2) xi`` with t in (0, 1), and a residual network predicts
``v = cos(pi t / 2) xi - sin(pi t / 2) x``. Its squared error bounds the negative log-likelihood up to a weighting over t.

Shapes: n samples, D embedding width, H hidden units, T frequencies.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from aft.clip.files import file_hash
from aft.errors import ConfigError, WeightsError

FREQUENCIES = 32
METADATA = "aft.prior"


class Prior(Protocol):
    """What CLIPure-Diff asks of a prior over unit image embeddings."""

    @property
    def width(self) -> int:
        """D."""

    def loss(self, unit_nD: Tensor, time_n: Tensor, noise_nD: Tensor) -> Tensor:
        """The denoising loss at each embedding, ``[n]``; smaller where an embedding is more likely.

        Args:
            unit_nD: unit vectors.
            time_n: share of the noise schedule, in (0, 1).
            noise_nD: standard normal.
        """


class Block(nn.Module):
    """``h + W2 gelu(W1 norm(h) + U t)``."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.time = nn.LayerNorm(hidden), nn.Linear(2 * FREQUENCIES, hidden)
        self.inner, self.outer = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, hidden_nH: Tensor, time_nT: Tensor) -> Tensor:
        """The next hidden state."""
        inner_nH = F.gelu(self.inner(self.norm(hidden_nH)) + self.time(time_nT))
        outer_nH: Tensor = self.outer(inner_nH)
        return hidden_nH + outer_nH


class LatentDiffusionPrior(L.LightningModule):
    """A denoiser of unit image embeddings, ``loss(z) = mean_D |v_hat(x_t, t) - v|^2`` with ``x = (z - mean) / std`` per dimension.

    Args:
        width: D.
        hidden: H.
        blocks: residual blocks.
        lr: highest rate of AdamW; it falls to zero along a cosine.
        weight_decay: of AdamW.
        steps: of the whole training, for the cosine; 0 for a prior that is not trained.

    Raises:
        ConfigError: no width, hidden unit or block.

    Reference:
        Ho et al., arXiv 2006.11239 (the denoising loss); Salimans and Ho, arXiv 2202.00512 (the cosine schedule with v).
    """

    def __init__(
        self, width: int, hidden: int = 320, blocks: int = 3, lr: float = 2e-3, weight_decay: float = 0.01, steps: int = 0
    ) -> None:
        super().__init__()
        if min(width, hidden, blocks) < 1:
            raise ConfigError(f"width = {width}, hidden = {hidden}, blocks = {blocks}: a prior needs one or more of each.")
        self.shape = {"width": width, "hidden": hidden, "blocks": blocks}
        self.lr, self.weight_decay, self.steps = lr, weight_decay, steps
        self.into, self.out = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(blocks))
        self.norm = nn.LayerNorm(hidden)
        self.register_buffer("mean_D", torch.zeros(width))
        self.register_buffer("std_D", torch.ones(width))
        #: What it was trained on and how, as text; it goes with the file.
        self.origin: dict[str, str] = {}
        #: Of its file.
        self.sha256 = ""

    @property
    def width(self) -> int:
        """D."""
        return self.shape["width"]

    def standardise_by(self, unit_nD: Tensor) -> None:
        """Takes mean and standard deviation of each dimension from the training embeddings."""
        self.get_buffer("mean_D").copy_(unit_nD.mean(0))
        self.get_buffer("std_D").copy_(unit_nD.std(0).clamp_min(1e-6))

    def forward(self, noisy_nD: Tensor, time_n: Tensor) -> Tensor:
        """``v`` as the network sees it, ``[n, D]``."""
        octave_T = 2 ** torch.linspace(0, 6, FREQUENCIES, device=noisy_nD.device, dtype=noisy_nD.dtype)
        angle_nT = math.pi * time_n[:, None] * octave_T
        time_nT = torch.cat([angle_nT.sin(), angle_nT.cos()], dim=1)
        hidden_nH = self.into(noisy_nD)
        for block in self.blocks:
            hidden_nH = block(hidden_nH, time_nT)
        predicted_nD: Tensor = self.out(self.norm(hidden_nH))
        return predicted_nD

    def loss(self, unit_nD: Tensor, time_n: Tensor, noise_nD: Tensor) -> Tensor:
        """The denoising loss of each sample, ``[n]``."""
        x_nD = (unit_nD - self.get_buffer("mean_D")) / self.get_buffer("std_D")
        keep_n1, add_n1 = (math.pi / 2 * time_n).cos()[:, None], (math.pi / 2 * time_n).sin()[:, None]
        predicted_nD = self(keep_n1 * x_nD + add_n1 * noise_nD, time_n)
        loss_n: Tensor = (predicted_nD - (keep_n1 * noise_nD - add_n1 * x_nD)).square().mean(1)
        return loss_n

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The mean loss at random times."""
        (unit_nD,) = batch
        time_n = torch.rand(len(unit_nD), device=unit_nD.device)
        return self.loss(unit_nD, time_n, torch.randn_like(unit_nD)).mean()

    def configure_optimizers(self) -> Any:
        """AdamW along a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}

    def save(self, path: Path) -> str:
        """Writes it in fp16 as safetensors, with its shape and origin in the metadata.

        Returns:
            sha256 of the file.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        save_file(state, path, metadata={METADATA: json.dumps(self.shape), **self.origin})
        path.chmod(0o644)
        return file_hash(path)


def load_prior(path: Path) -> LatentDiffusionPrior:
    """A prior from its file, in fp32 and eval mode, frozen; no random stream is moved.

    Raises:
        WeightsError: no such file, or not a prior of ours.
    """
    if not path.is_file():
        raise WeightsError(f"no prior at {path}: train one with python -m aft.defenses.fit_prior, or give another file.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118  (a file is no mapping)
    except SafetensorError as error:
        raise WeightsError(f"{path} cannot be read as safetensors ({error}): fetch it again.") from error
    if METADATA not in metadata:
        raise WeightsError(f"{path} is no latent diffusion prior of this project: train one with python -m aft.defenses.fit_prior.")
    with torch.random.fork_rng(devices=[]):
        prior = LatentDiffusionPrior(**json.loads(metadata[METADATA]))
    try:
        prior.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(f"{path}: its tensors do not fit its own shape {metadata[METADATA]}: {error}") from error
    prior.origin = {key: value for key, value in metadata.items() if key != METADATA}
    prior.sha256 = file_hash(path)
    return prior.eval().requires_grad_(False)


def trained_on(path: Path) -> str | None:
    """sha256 of the weights whose embeddings a prior was trained on; none for a file that is no prior of ours, or does not say."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    return metadata.get("model_sha256") if METADATA in metadata else None
