"""Trains a latent diffusion prior on the image embeddings of any data set, for CLIPure-Diff.

    python -m aft.defenses.fit_prior -c configs/defenses/prior_mini.yaml

The images are embedded once and kept; the training itself takes minutes on a CPU.

Shapes: N training images, D embedding width.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import lightning as L
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from aft.attacks.noise import normal, sample_keys, uniform
from aft.batch import EvaluationSet
from aft.clip import ModelSpec, ZeroShotModel, load_model
from aft.clip.matmul import use_onednn
from aft.defenses.prior import LatentDiffusionPrior
from aft.errors import ConfigError, ending_calmly

AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class FitPrior:
    """What training a prior takes.

    Args:
        data: datamodule with ``evaluation_set(split)``, as in ``configs/data/*.yaml``; ``train`` is trained on, ``holdout`` measured.
        clip: whose image embeddings.
        out: the prior's file.
        n: training images to embed, spread evenly over the set; null: all.
        cache: folder for the embeddings, which are made once a model and choice of images.
        hidden: units of the network.
        blocks: residual blocks of the network.
        epochs: passes over the embeddings.
        batch_size: embeddings in a step.
        lr: highest rate of AdamW; it falls to zero along a cosine.
        weight_decay: of AdamW.
        seed: of weights, order, times and noise.
        threads: CPU threads of torch; null: its own choice.

    Raises:
        ConfigError: the datamodule has no evaluation set; no pass, or no embedding in a batch.
    """

    data: L.LightningDataModule
    clip: ModelSpec = field(default_factory=ModelSpec)
    out: Path = Path("runs/prior/prior.safetensors")
    n: int | None = None
    cache: Path = Path("runs/prior")
    hidden: int = 320
    blocks: int = 3
    epochs: int = 20
    batch_size: int = 1024
    lr: float = 2e-3
    weight_decay: float = 0.01
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.data, "evaluation_set"):
            raise ConfigError(f"{type(self.data).__name__} has no evaluation_set(split): give a datamodule of datamodules, such as Sample.")
        if min(self.epochs, self.batch_size, 1 if self.n is None else self.n) < 1:
            raise ConfigError(f"epochs = {self.epochs}, batch_size = {self.batch_size}, n = {self.n}: give one or more of each.")

    def run(self, command: str) -> LatentDiffusionPrior:
        """Embeds, trains, writes and returns the prior; prints its losses."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        model = load_model(self.clip)
        learned_ND, held_ND = self.embeddings(model, "train", self.n), self.embeddings(model, "holdout")
        prior, steps = self.fit(learned_ND)
        parts = {"loss": learned_ND[:: max(1, len(learned_ND) // len(held_ND))], "holdout_loss": held_ND}
        losses = {name: f"{mean_loss(prior, part_ND):.4f}" for name, part_ND in parts.items()}
        prior.origin = {
            "model": model.record.name, "model_sha256": model.record.sha256, "data": str(getattr(self.data, "name", "")),
            "embeddings": str(len(learned_ND)), "steps": str(steps), "batch_size": str(self.batch_size), **losses, "command": command,
        }  # fmt: skip
        digest = prior.save(self.out)
        print(f"{self.out}: {', '.join(f'{key} {value}' for key, value in prior.origin.items())}, sha256 {digest}", flush=True)
        return prior

    def embeddings(self, model: ZeroShotModel, split: Literal["train", "holdout"], n: int | None = None) -> Tensor:
        """Unit embeddings of a split, ``[N, D]``, or of n images of it; from the cache where they are there."""
        part: EvaluationSet = self.data.evaluation_set(split)  # type: ignore[attr-defined]
        rows = torch.linspace(0, len(part) - 1, min(n or len(part), len(part))).long()
        who = hashlib.sha256(model.record.sha256.encode() + part.index_N[rows].numpy().tobytes() + part.name.encode()).hexdigest()[:16]
        place = self.cache / f"embeddings-{split}-{who}.safetensors"
        if not place.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            save_file({"unit_ND": embed_all(model, part, rows.tolist())}, place)
        return load_file(place)["unit_ND"]

    def fit(self, unit_ND: Tensor) -> tuple[LatentDiffusionPrior, int]:
        """The trained prior, and its number of steps."""
        L.seed_everything(self.seed, verbose=False)
        size = min(self.batch_size, len(unit_ND))
        steps = self.epochs * (len(unit_ND) // size)
        prior = LatentDiffusionPrior(unit_ND.shape[1], self.hidden, self.blocks, lr=self.lr, weight_decay=self.weight_decay, steps=steps)
        prior.standardise_by(unit_ND)
        loader = DataLoader(TensorDataset(unit_ND), batch_sampler=Shuffled(len(unit_ND), size), num_workers=0)
        trainer = L.Trainer(max_epochs=self.epochs, accelerator="auto", devices=1, logger=False, enable_checkpointing=False,
                            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False)  # fmt: skip
        trainer.fit(prior, loader)
        return prior.cpu().eval().requires_grad_(False), steps


class Shuffled(torch.utils.data.Sampler[list[int]]):
    """Whole batches in a new order each pass, by torch's generator.

    Args:
        count: embeddings.
        size: of a batch; the rest of a pass is left out.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count // self.size

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.count)[: len(self) * self.size]
        yield from order.view(-1, self.size).tolist()


def embed_all(model: ZeroShotModel, data: EvaluationSet, rows: Sequence[int]) -> Tensor:
    """Unit embeddings of the images at these places, fp32 ``[N, D]``."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(rows), AT_ONCE):
            batch = data.batch(rows[start : start + AT_ONCE])
            found.append(F.normalize(model.encode(batch.images).embedding_BD, dim=1))
    return torch.cat(found).clone()


def mean_loss(prior: LatentDiffusionPrior, unit_ND: Tensor) -> float:
    """The mean denoising loss over one counted time and noise an embedding, the same at every call."""
    keys_N = sample_keys(0, 0, torch.arange(len(unit_ND)))
    with torch.no_grad():
        return float(prior.loss(unit_ND, uniform(keys_N, 0, ()), normal(keys_N, 1, unit_ND.shape[1:])).mean())


def main(args: list[str] | None = None) -> LatentDiffusionPrior:
    """The command; returns the prior.

    Raises:
        AftError: whatever a user can mend.
    """
    words = list(sys.argv[1:] if args is None else args)
    parser = ArgumentParser(prog="python -m aft.defenses.fit_prior", description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("-c", "--config", action="config", help="YAML with any of these settings; give several, and the later wins.")
    parser.add_class_arguments(FitPrior, fail_untyped=True)
    settings = parser.parse_args(words)
    settings.pop("config", None)
    use_onednn()
    made = FitPrior(**vars(parser.instantiate(settings)))
    return made.run(" ".join(["python -m aft.defenses.fit_prior", *words]))


if __name__ == "__main__":
    with ending_calmly():
        main()
