"""Small CLIPs of every kind that an export may meet, with random weights that hide no fault; also for ``bench.export_table``."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file

from aft.clip import ModelSpec, TrainableSpec, ZeroShotModel, weights
from aft.clip.text_transform import Expansion, Residual
from aft.clip.trainable import make_trainable
from tests.conftest import MemoryData, make_trainer
from tests.methods.recipes import build
from tests.towers import TEXT, VISION, WIDTH, shake

OPENAI = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
OTHER = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
OPENAI_TEXT = TEXT | {"width": 64, "heads": 1}
QUICK = {"text_cfg": OPENAI_TEXT, "quick_gelu": True}
#: name -> what differs from a configuration with open_clip's activation and the small text tower.
CONFIGS: dict[str, dict[str, Any]] = {name: {"vision_cfg": vision} for name, vision in VISION.items()} | {
    "quick_vit": {"vision_cfg": VISION["vit"], "quick_gelu": True},
    "openai_vit": {"vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}, **QUICK},
    "openai_resnet": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}, **QUICK},
    "custom_text": {"vision_cfg": VISION["vit"], "custom_text": True},
}
#: What each layout of weights holds of them; graphs hold all.
HELD = {
    "open_clip": set(CONFIGS),
    "openai": {"openai_vit", "openai_resnet"},
    "hf": {"vit", "quick_vit", "openai_vit", "custom_text"},
    "llava_tower": {"vit", "quick_vit", "openai_vit", "custom_text"},
}


def folder_of(name: str, folder: Path) -> Path:
    """A model of this name in open_clip's layout, written by hand."""
    changes = copy.deepcopy(CONFIGS[name])
    config = {"embed_dim": WIDTH.get(name, 16), "text_cfg": copy.deepcopy(TEXT), **changes}
    (folder / name).mkdir()
    preprocess = OPENAI if name.startswith("openai") else OTHER
    (folder / name / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = weights.build_clip(config)
    shake(clip)
    with torch.no_grad():
        clip.get_parameter("logit_scale").fill_(torch.tensor(20.0).log())
        for name_, parameter in clip.named_parameters():
            if "proj" in name_ and parameter.ndim == 2:
                parameter.mul_(3)
    save_file(clip.state_dict(), folder / name / "open_clip_model.safetensors")
    return folder / name


def images_of(model: ZeroShotModel, n: int = 3) -> torch.Tensor:
    """Fixed random pixels in [0, 1] at the model's own size."""
    side = model.record.resolution
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(5))


def as_clip_load_rounds(model: ZeroShotModel) -> ZeroShotModel:
    """With weights that fp16 holds exactly: ``clip.load`` rounds to fp16 itself."""
    model.clip.load_state_dict({key: value.half().float() for key, value in model.clip.state_dict().items()})
    return model


def with_prompts(model: ZeroShotModel) -> ZeroShotModel:
    """Visual prompts in front: a border, and a token where the tower has a place for one."""
    make_trainable(model, TrainableSpec("prompts", pad=2, tokens=int(isinstance(model.visual, VisionTransformer))))
    return model.eval()


def with_expansion(model: ZeroShotModel) -> ZeroShotModel:
    """LAAT's texts."""
    model.text_transform = Expansion(model.width)
    model.text_transform.fit(model.raw_bank(["cat", "dog", "ship"], ["a {}"]))
    return model


def with_residual(model: ZeroShotModel) -> ZeroShotModel:
    """TIMA's texts, after some learning."""
    model.text_transform = Residual(model.width).requires_grad_(False)
    with torch.no_grad():
        model.text_transform.up.weight.add_(torch.randn(model.width, 64, generator=torch.Generator().manual_seed(3)))
    return model


def trained(name: str, tiny: ModelSpec, data: MemoryData, folder: Path, **settings: object) -> Path:
    """A checkpoint after two steps."""
    method = build(name, tiny, **settings)
    trainer = make_trainer(folder, limit_val_batches=0)
    trainer.fit(method, data)
    trainer.save_checkpoint(folder / "x.ckpt")
    return folder / "x.ckpt"
