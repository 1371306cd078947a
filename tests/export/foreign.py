"""What an export says when the library that it is for loads it, and how far that is from the model; also for ``bench.export_table``.

Nothing here reads an export by this project's code: configuration, preprocessing, tokenizer and towers are the other library's.
Shapes: B images, K texts, D embedding width, N patches, W tower width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from aft.clip import ZeroShotModel
from aft.clip.stages import encode_in_stages
from aft.export import Head
from aft.export.graphs import METADATA

#: Largest difference that an export may have: of an entry of a unit embedding, and of a logit in units of the logit scale.
TOLERANCES = {"open_clip": 1e-5, "openai": 1e-5, "hf": 1e-5, "llava_tower": 1e-5, "onnx": 1e-4, "torch_export": 1e-5}
TEXTS = ["a photo of a cat.", "waves on the sea at night, and a ship", "two dogs"]
#: For graphs: logits over these very texts.
OVER_TEXTS = Head(tuple(TEXTS), ("{}",))


@dataclass(frozen=True)
class Said:
    """What one side says of some images and of ``TEXTS``; none for what a format does not hold.

    Args:
        unit_BD: unit image embeddings.
        text_KD: unit text embeddings, before any text transformation.
        logits_BK: over the texts, as the model classifies.
        scale: the logit scale.
        features_BNW: the patch tokens that LLaVA takes, before the last block.
    """

    unit_BD: Tensor
    text_KD: Tensor | None = None
    logits_BK: Tensor | None = None
    scale: float | None = None
    features_BNW: Tensor | None = None


def by_open_clip(folder: Path, images: Tensor) -> Said:
    """open_clip's factory, its own preprocessing constants and its own tokenizer."""
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    normalise = preprocess.transforms[-1]
    return by_towers(clip.eval(), normalise(images), open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS))


def by_openai(folder: Path, images: Tensor) -> Said:
    """open_clip's copy of ``clip.load``'s builder; OpenAI's fixed normalisation."""
    clip = open_clip.load_openai_model(str(folder / "model.pt"), device="cpu").eval()
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return by_towers(clip, (images - mean) / std, SimpleTokenizer(context_length=clip.context_length)(TEXTS))


def by_towers(clip: Any, pixels: Tensor, tokens: Tensor) -> Said:
    """Both towers and the scale."""
    image, text = F.normalize(clip.encode_image(pixels), dim=-1), F.normalize(clip.encode_text(tokens), dim=-1)
    return Said(image, text, clip.logit_scale.exp() * image @ text.T, float(clip.logit_scale.detach().exp()))


def by_transformers(folder: Path, images: Tensor) -> Said:
    """CLIPModel with its own processor and tokenizer; the images as PIL would give them are already of the right size."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    clip = CLIPModel.from_pretrained(folder).eval()
    processor, tokenizer = CLIPImageProcessor.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    pixels = processor(list(images), do_rescale=False, return_tensors="pt")["pixel_values"]
    said = clip(pixel_values=pixels, **tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt"))
    return Said(said.image_embeds, said.text_embeds, said.logits_per_image, float(clip.logit_scale.detach().exp()))


def by_vision_tower(folder: Path, images: Tensor) -> Said:
    """What LLaVA's tower takes, hidden state -2 without the class token; and the embedding, whose projection lies in the file."""
    from transformers import CLIPImageProcessor, CLIPVisionModel, CLIPVisionModelWithProjection

    processor = CLIPImageProcessor.from_pretrained(folder)
    pixels = processor(list(images), do_rescale=False, return_tensors="pt")["pixel_values"]
    states = CLIPVisionModel.from_pretrained(folder).eval()(pixels, output_hidden_states=True).hidden_states
    embedded = CLIPVisionModelWithProjection.from_pretrained(folder).eval()(pixels).image_embeds
    return Said(F.normalize(embedded, dim=-1), features_BNW=states[-2][:, 1:])


def run_onnx(folder: Path, part: str, value: Tensor) -> tuple[list[Tensor], dict[str, str]]:
    """Outputs and metadata of a graph in ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(folder / f"{part}.onnx"))
    found = session.run(None, {session.get_inputs()[0].name: value.numpy()})
    return [torch.from_numpy(one) for one in found], session.get_modelmeta().custom_metadata_map


def run_torch_export(folder: Path, part: str, value: Tensor) -> tuple[list[Tensor], dict[str, str]]:
    """The same of torch.export's program."""
    extra = {METADATA: ""}
    program = torch.export.load(folder / f"{part}.pt2", extra_files=extra)
    return list(program.module()(value)), json.loads(extra[METADATA])


def by_onnxruntime(folder: Path, images: Tensor) -> Said:
    """Pixels in [0, 1] into ``image.onnx``; texts by the context length that ``text.onnx`` says."""
    found, said = run_onnx(folder, "image", images)
    text = None
    if (folder / "text.onnx").is_file():
        context = onnxruntime.InferenceSession(str(folder / "text.onnx")).get_inputs()[0].shape[1]
        text = F.normalize(run_onnx(folder, "text", SimpleTokenizer(context_length=context)(TEXTS))[0][0], dim=-1)
    return Said(F.normalize(found[0], dim=-1), text, found[1], float(said["aft.logit_scale"]))


def by_torch_export(folder: Path, images: Tensor) -> Said:
    """The same of ``image.pt2`` and ``text.pt2``."""
    found, said = run_torch_export(folder, "image", images)
    text = None
    if (folder / "text.pt2").is_file():
        context = torch.export.load(folder / "text.pt2").example_inputs[0][0].shape[1]
        text = F.normalize(run_torch_export(folder, "text", SimpleTokenizer(context_length=context)(TEXTS))[0][0], dim=-1)
    return Said(F.normalize(found[0], dim=-1), text, found[1], float(said["aft.logit_scale"]))


READERS = {
    "open_clip": by_open_clip, "openai": by_openai, "hf": by_transformers, "llava_tower": by_vision_tower, "onnx": by_onnxruntime,
    "torch_export": by_torch_export,
}  # fmt: skip


def features_of(model: ZeroShotModel, images: Tensor) -> Tensor:
    """The patch tokens before the last block of this project's model."""
    seen: list[Tensor] = []
    blocks: Any = model.visual.transformer.resblocks  # type: ignore[union-attr]
    handle = blocks[-2].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.encode(images)
    handle.remove()
    return seen[0][:, 1:]


@torch.no_grad()
def differences(model: ZeroShotModel, kind: str, folder: Path, images: Tensor) -> dict[str, float]:
    """How far the export is from the model, by what there is to compare: largest entries of differences.

    ``image`` and ``text``: of unit embeddings; ``logits``: in units of the logit scale; ``scale`` and ``features``: relative to the
    largest entry.
    """
    said = READERS[kind](folder, images)
    encoding = encode_in_stages(model, images)
    bank_KD, scale = model.text_bank(OVER_TEXTS.classes, OVER_TEXTS.templates), float(model.logit_scale)
    found = {"image": far(said.unit_BD, encoding.unit_BD)}
    if said.text_KD is not None:
        found["text"] = far(said.text_KD, model.encode_text(TEXTS))
    if said.logits_BK is not None:
        found["logits"] = far(said.logits_BK, model.undefended.logits(encoding, bank_KD)) / scale
    if said.scale is not None:
        found["scale"] = abs(said.scale / scale - 1)
    if said.features_BNW is not None:
        own_BNW = features_of(model, images)
        found["features"] = far(said.features_BNW, own_BNW) / float(own_BNW.abs().max())
    return found


def far(a: Tensor, b: Tensor) -> float:
    """The largest entry of the difference."""
    assert a.shape == b.shape
    return float((a - b).abs().max())
