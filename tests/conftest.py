"""Shared by all rooms: a tiny CLIP with random weights, a labelled set in memory, counters of encoder calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from aft.batch import Batch
from aft.clip import ModelSpec, ZeroShotModel, load_model, matmul, weights

matmul.use_onednn()  # as train.py and eval.py do: in whatever order tests come, all multiply alike

TINY = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]},
}


@pytest.fixture
def on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor: one on which fp32 products go to oneDNN when they are asked to."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        pytest.skip("torch was built here without MKL or without oneDNN: there is nothing to replace")
    monkeypatch.setattr(matmul, "vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.delenv(matmul.SWITCH, raising=False)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP in open_clip's folder layout, with random weights and a logit scale of 20."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "open_clip_config.json").write_text(json.dumps(TINY))
    torch.manual_seed(0)
    clip = weights.build_clip(TINY["model_cfg"])
    with torch.no_grad():
        clip.get_parameter("logit_scale").fill_(torch.tensor(20.0).log())
        for name, parameter in clip.named_parameters():
            if "proj" in name and parameter.ndim == 2:
                parameter.mul_(3)
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(autouse=True)
def tiny(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelSpec]:
    """The tiny CLIP under the name ``tiny``, for every test."""
    monkeypatch.setitem(weights.EMBEDDED, "tiny", tiny_folder)
    yield ModelSpec("tiny")


@pytest.fixture
def model(tiny: ModelSpec) -> ZeroShotModel:
    """The tiny CLIP, loaded."""
    return load_model(tiny)


class MemoryData(L.LightningDataModule):
    """Random images whose brightness tells the class, in memory; the class data a method asks for."""

    def __init__(
        self, count: int = 24, names: tuple[str, ...] = ("cat", "dog", "ship"), batch_size: int = 8, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(0)
        self.labels = torch.arange(count) % len(names)
        images = torch.rand(count, 3, 32, 32, generator=noise) * 0.3 + 0.2 * self.labels[:, None, None, None]
        self.images = images.clamp(0, 1).to(dtype)
        self.class_lists = {"train": names, "holdout": names}
        self.val_class_lists = ("holdout",)
        self.templates = ("a photo of a {}.",)
        self.class_phrases = tuple((name, f"{name} of some kind", "thing") for name in names)
        self.batch_size = batch_size

    def batches(self) -> list[Batch]:
        """The set in order, cut into batches."""
        rows = torch.arange(len(self.labels)).split(self.batch_size)
        return [Batch(self.images[r], r, self.labels[r]) for r in rows]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches in order."""
        return DataLoader(self.batches(), batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """The same images."""
        return [self.train_dataloader()]


@pytest.fixture
def data() -> MemoryData:
    """A small labelled set."""
    return MemoryData()


class Calls:
    """How often a module was called, and on how many rows."""

    def __init__(self, module: nn.Module) -> None:
        self.count, self.rows = 0, 0
        module.register_forward_pre_hook(self._seen)

    def _seen(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.count += 1
        self.rows += len(inputs[0])


def make_trainer(folder: Path, **settings: object) -> L.Trainer:
    """A silent trainer on one CPU process."""
    defaults: dict[str, object] = {
        "accelerator": "cpu", "devices": 1, "max_steps": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False, "default_root_dir": str(folder),
    }  # fmt: skip
    return L.Trainer(**(defaults | settings))  # type: ignore[arg-type]
