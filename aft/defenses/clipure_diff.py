"""CLIPure-Diff: embeddings climb the likelihood of a latent diffusion prior.

Shapes: n images, S noise samples, D embedding width.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from aft.attacks.noise import normal, uniform
from aft.clip.model import ZeroShotModel, at_least_fp32
from aft.clip.stages import Draw, Stage, Stages
from aft.defenses.base import Defended, gradient_at
from aft.defenses.dalle2 import Dalle2Prior, load_dalle2
from aft.defenses.geometry import split
from aft.defenses.prior import LatentDiffusionPrior, load_prior, trained_on
from aft.errors import ConfigError

PRIORS = Path(__file__).parent / "priors"
#: sha256 of the weights whose embeddings a shipped prior was trained on.
SHIPPED = {"25f19f9a1fe265a863f9f8c859b602228a907b514c46c1cada63fc694f240df0": PRIORS / "miniclip32.safetensors"}


class CLIPureDiff(Defended):
    """``steps`` times ``u <- unit(u - step g / |g|)``, ``g`` the tangent part of the gradient of the prior's denoising loss at ``u``.

    Each step has its own times in ``[first, last]`` and its own noise for each sample, the mean over ``samples`` of them. With a graph
    the whole is differentiated, the inner gradient too.

    Args:
        model: a plain model.
        prior: file of :mod:`aft.defenses.fit_prior`, or of a prior of ``dalle2_pytorch`` with its JSON configuration beside it
            (``FILE.pth`` and ``FILE.json``); a folder of such files: the one that was trained on embeddings of these very weights, there or
            among those that ship; none: the one that ships for MiniCLIP-32 and what was fine-tuned from it.
        steps, step: of the climb, the step along a unit tangent: each step rotates by ``arctan(step)``.
        samples: times and noises a step.
        first, last: share of the noise schedule that times come from, uniformly.

    Raises:
        ConfigError: a setting out of range, no prior for this model, or one of another width.
        WeightsError: no such file, or it is no prior.

    Reference:
        Zhang et al., arXiv 2502.18176. Released: a prior of about a billion parameters, eta 30 with a norm over the batch, one time in the
        last tenth a step for the whole batch, the gradient a constant. The small prior, its times, the norm a sample and the exact
        derivative are ours.
    """

    name: ClassVar[str] = "clipure_diff"

    def __init__(
        self, model: ZeroShotModel, *, prior: str | None = None, steps: int = 10, step: float = 0.02, samples: int = 4, first: float = 0.2,
        last: float = 0.6,
    ) -> None:  # fmt: skip
        if steps < 1 or samples < 1 or not (math.isfinite(step) and step > 0):
            raise ConfigError(f"steps = {steps}, step = {step}, samples = {samples}: give one step and one noise sample or more, "
                              "and a step above 0.")  # fmt: skip
        if not 0 < first <= last < 1:
            raise ConfigError(f"first = {first}, last = {last}: times are shares of the noise schedule, 0 < first <= last < 1.")
        path = prior_for(model, prior)
        loaded = read_prior(path)
        if loaded.width != model.width:
            raise ConfigError(f"the prior {path} is for embeddings of width {loaded.width}, {model.record.name} gives {model.width}: "
                              "train one for this model with python -m aft.defenses.fit_prior.")  # fmt: skip
        learned = loaded.origin.get("model_sha256") if isinstance(loaded, LatentDiffusionPrior) else None
        if learned not in (None, model.record.sha256):
            warnings.warn(f"the prior {path.name} was trained on embeddings of other weights ({str(learned)[:12]}) than those of "
                          f"{model.record.name} ({model.record.method}, {model.record.sha256[:12]}): train one on these with "
                          "python -m aft.defenses.fit_prior.", stacklevel=2)  # fmt: skip
        told = {"prior": path.name, "prior_sha256": loaded.sha256, "steps": int(steps), "step": float(step), "samples": int(samples)}
        super().__init__(model, **told, first=float(first), last=float(last))
        self.prior = loaded.to(model.logit_scale)

    @property
    def stages(self) -> Stages:
        """After the tower."""
        return Stages(embedding=Stage(self._purified, random=True))

    def _purified(self, z_nD: Tensor, x_nCHW: Tensor, draw: Draw) -> Tensor:
        """Uphill; as long as before."""
        size_n1, unit_nD = split(at_least_fp32(z_nD))
        for turn in range(self.settings["steps"]):
            gradient_nD = gradient_at(lambda at_nD, turn=turn: self._loss(at_nD, draw, turn), unit_nD, keep_graph=True)  # type: ignore[misc]
            tangent_nD = gradient_nD - (gradient_nD * unit_nD).sum(-1, keepdim=True) * unit_nD
            unit_nD = F.normalize(unit_nD - self.settings["step"] * F.normalize(tangent_nD, dim=-1), dim=-1)
        return size_n1 * unit_nD

    def _loss(self, unit_nD: Tensor, draw: Draw, turn: int) -> Tensor:
        """The denoising loss of a step's own times and noise, ``[n]``."""
        n, samples, (first, last) = len(unit_nD), self.settings["samples"], (self.settings["first"], self.settings["last"])
        time_nS = first + (last - first) * uniform(draw.keys_n, draw.count(2 * turn), (samples,)).to(unit_nD)
        noise_nSD = normal(draw.keys_n, draw.count(2 * turn + 1), (samples, unit_nD.shape[1])).to(unit_nD)
        repeated_mD = unit_nD.repeat_interleave(samples, dim=0)
        return self.prior.loss(repeated_mD, time_nS.flatten(), noise_nSD.flatten(0, 1)).view(n, samples).mean(1)


def prior_for(model: ZeroShotModel, given: str | None) -> Path:
    """The file of a prior: ``given``, or the one of the folder ``given`` that belongs to these weights, or the one that ships.

    Raises:
        ConfigError: there is none, or a folder has two.
    """
    if given is None:
        return shipped_for(model)
    folder, sha256 = Path(given), model.record.sha256
    if folder.is_file() or folder.suffix:
        return folder
    fitting = [path for path in sorted(folder.glob("*.safetensors")) if trained_on(path) == sha256]
    if len(fitting) > 1:
        raise ConfigError(f"{folder} has {len(fitting)} priors of {model.record.name} ({sha256[:12]}): give the file of one as prior.")
    if not fitting and sha256 not in SHIPPED:
        raise ConfigError(f"{folder} has no diffusion prior of these weights ({model.record.name}, {model.record.method}, {sha256[:12]}): "
                          "train one with python -m aft.defenses.fit_prior.")  # fmt: skip
    return fitting[0] if fitting else SHIPPED[sha256]


def shipped_for(model: ZeroShotModel) -> Path:
    """The prior that ships for this model, or for what it was fine-tuned from.

    Raises:
        ConfigError: there is none.
    """
    record = model.record
    for sha256 in (record.sha256, record.base_sha256):
        if sha256 in SHIPPED:
            return SHIPPED[sha256]
    raise ConfigError(f"no diffusion prior ships for {record.name} ({record.sha256[:12]}): train one with python -m aft.defenses.fit_prior "
                      "and give its file as prior.")  # fmt: skip


def read_prior(path: Path) -> LatentDiffusionPrior | Dalle2Prior:
    """A prior of ours, or by its ending one of ``dalle2_pytorch``."""
    return load_dalle2(path) if path.suffix in (".pth", ".pt") else load_prior(path)
