"""Weights for other libraries: the layouts of open_clip, OpenAI's ``clip`` and transformers, and a vision tower as LLaVA takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor

from aft.clip.layouts import detect, to_transformers
from aft.clip.model import ZeroShotModel
from aft.clip.pack import pack, save, stored
from aft.export.folder import write_json

BICUBIC = 3  # of PIL
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def write_open_clip(model: ZeroShotModel, folder: Path, half: bool) -> None:
    """``open_clip_config.json`` and ``open_clip_model.safetensors``."""
    pack(model, folder, half)


def write_openai(model: ZeroShotModel, folder: Path, half: bool) -> None:
    """``model.pt``: tensors, and the three numbers that OpenAI's files have beside them. Not safetensors: ``clip.load`` reads none."""
    context = model.record.config["text_cfg"].get("context_length", 77)  # type: ignore[attr-defined]
    numbers = {"input_resolution": model.record.resolution, "context_length": context}
    state = stored(plain_names(model), half)
    numbers["vocab_size"] = len(state["token_embedding.weight"])
    torch.save(state | {name: torch.tensor(value) for name, value in numbers.items()}, folder / "model.pt")


def write_hf(model: ZeroShotModel, folder: Path, half: bool) -> None:
    """``config.json``, ``model.safetensors``, and the files of processor and tokenizer."""
    state = to_transformers(plain_names(model))
    config: Any = model.record.config
    whole = {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": config["embed_dim"], "dtype": _dtype(half),
        "logit_scale_init_value": float(model.clip.get_parameter("logit_scale")), "vision_config": vision_config(model),
        "text_config": text_config(model),
    }  # fmt: skip
    write_json(folder / "config.json", whole)
    save(state, model.record, folder / "model.safetensors", half)
    write_processor(model, folder)
    write_tokenizer(config["text_cfg"].get("context_length", 77), folder)


def write_llava_tower(model: ZeroShotModel, folder: Path, half: bool) -> None:
    """The vision part alone, which ``CLIPVisionModel`` loads; the projection lies in the file for ``CLIPVisionModelWithProjection``."""
    visual = {name: value for name, value in plain_names(model).items() if name.startswith("visual.")}
    config = vision_config(model) | {"architectures": ["CLIPVisionModelWithProjection"], "dtype": _dtype(half)}
    write_json(folder / "config.json", config)
    save(to_transformers(visual), model.record, folder / "model.safetensors", half)
    write_processor(model, folder)


def plain_names(model: ZeroShotModel) -> dict[str, Tensor]:
    """All tensors under the names of ``open_clip.CLIP``, whichever of open_clip's classes the model is."""
    return detect(model.clip.state_dict(), model.record.name).state


def _dtype(half: bool) -> str:
    return "float16" if half else "float32"


def vision_config(model: ZeroShotModel) -> dict[str, Any]:
    """transformers' ``CLIPVisionConfig``, every setting said, read off the tower itself."""
    visual: Any = model.visual
    sizes = _transformer(visual.transformer.resblocks, model.record.activation)
    return sizes | {
        "model_type": "clip_vision_model", "image_size": model.record.resolution, "patch_size": visual.conv1.kernel_size[0],
        "num_channels": 3, "projection_dim": model.width,
    }  # fmt: skip


def text_config(model: ZeroShotModel) -> dict[str, Any]:
    """transformers' ``CLIPTextConfig``. The end token is the true one; at the old default of 2 texts are pooled at their largest id."""
    clip: Any = model.clip
    text = getattr(clip, "text", clip)
    sizes = _transformer(text.transformer.resblocks, model.record.activation)
    return sizes | {
        "model_type": "clip_text_model", "max_position_embeddings": len(text.positional_embedding), "projection_dim": model.width,
        "vocab_size": text.token_embedding.num_embeddings, "bos_token_id": text.token_embedding.num_embeddings - 2,
        "eos_token_id": text.token_embedding.num_embeddings - 1, "pad_token_id": text.token_embedding.num_embeddings - 1,
    }  # fmt: skip


def _transformer(blocks: Any, activation: str) -> dict[str, Any]:
    first: ResidualAttentionBlock = blocks[0]
    return {
        "hidden_size": first.attn.embed_dim, "intermediate_size": first.mlp.c_fc.out_features, "num_hidden_layers": len(blocks),
        "num_attention_heads": first.attn.num_heads, "hidden_act": activation, "layer_norm_eps": first.ln_1.eps, "attention_dropout": 0.0,
    }  # fmt: skip


def write_processor(model: ZeroShotModel, folder: Path) -> None:
    """``preprocessor_config.json``: the whole image to the tower's square, as the model was measured; no crop."""
    side = {"height": model.record.resolution, "width": model.record.resolution}
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "size": side, "resample": BICUBIC,
        "do_center_crop": False, "crop_size": side, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(model.record.mean), "image_std": list(model.record.std),
    })  # fmt: skip


def write_tokenizer(context: int, folder: Path) -> None:
    """OpenAI's BPE as transformers reads it: ``vocab.json``, ``merges.txt``, ``tokenizer_config.json``."""
    bpe = SimpleTokenizer()
    merges = sorted(bpe.bpe_ranks, key=bpe.bpe_ranks.__getitem__)
    ours = {bpe.sot_token_id: BEGIN, bpe.eot_token_id: END}  # open_clip calls these two otherwise
    write_json(folder / "vocab.json", {ours.get(number, word): number for word, number in bpe.encoder.items()})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": context, "bos_token": BEGIN, "eos_token": END, "unk_token": END,
        "pad_token": END,
    })  # fmt: skip
