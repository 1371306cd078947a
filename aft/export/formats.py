"""The formats by name: what each may hold, how it is written, which libraries load it, and with which lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aft.clip.model import ZeroShotModel
from aft.export import layouts, limits
from aft.export.graphs import graphs_of, need, write_onnx, write_torch_export


@dataclass(frozen=True)
class Head:
    """The classes that a graph's logits are over; none: no logits.

    Args:
        classes: their names.
        templates: prompts with one ``{}`` each.
    """

    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("a photo of a {}.",)


@dataclass(frozen=True)
class Format:
    """One of the ways in which a model leaves the house.

    Args:
        library: the hub's name for who loads it.
        task: the hub's name for what it is for.
        check: raises ConfigError for a model that the format has no place for.
        write: writes all but the model card: ``write(model, folder, head, half, facts)``.
        load: Python lines that load it from the folder that they are run in, and need that library alone.
        graph: whether it is a program, not weights.
    """

    library: str
    task: str
    check: Callable[[ZeroShotModel, Head], None]
    write: Callable[[ZeroShotModel, Path, Head, bool, dict[str, Any]], None]
    load: str
    graph: bool = False


def _onnx(model: ZeroShotModel, folder: Path, head: Head, half: bool, facts: dict[str, Any]) -> None:
    write_onnx(graphs_of(model, head.classes, head.templates), facts, folder)


def _torch_export(model: ZeroShotModel, folder: Path, head: Head, half: bool, facts: dict[str, Any]) -> None:
    write_torch_export(graphs_of(model, head.classes, head.templates), facts, folder)


def _check_onnx(model: ZeroShotModel, head: Head) -> None:
    need("onnx", "onnxscript", "onnxruntime")
    limits.check_graph(model, head.classes)


FORMATS: dict[str, Format] = {
    "open_clip": Format(
        "open_clip", "zero-shot-image-classification",
        lambda model, head: limits.check_open_clip(model),
        lambda model, folder, head, half, facts: layouts.write_open_clip(model, folder, half),
        'import open_clip\n\nmodel, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")\n'
        'tokenizer = open_clip.get_tokenizer("local-dir:.")\nmodel.eval()',
    ),
    "openai": Format(
        "clip", "zero-shot-image-classification",
        lambda model, head: limits.check_openai(model),
        lambda model, folder, head, half, facts: layouts.write_openai(model, folder, half),
        '# With OpenAI\'s package: model, preprocess = clip.load("./model.pt"); the same file with open_clip alone:\n'
        'import open_clip\n\nmodel = open_clip.load_openai_model("./model.pt", device="cpu")',
    ),
    "hf": Format(
        "transformers", "zero-shot-image-classification",
        lambda model, head: limits.check_transformers(model),
        lambda model, folder, head, half, facts: layouts.write_hf(model, folder, half),
        'from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer\n\nmodel = CLIPModel.from_pretrained(".").eval()\n'
        'processor, tokenizer = CLIPImageProcessor.from_pretrained("."), CLIPTokenizer.from_pretrained(".")',
    ),
    "llava_tower": Format(
        "transformers", "image-feature-extraction",
        lambda model, head: limits.check_transformers(model, with_text=False),
        lambda model, folder, head, half, facts: layouts.write_llava_tower(model, folder, half),
        'from transformers import CLIPImageProcessor, CLIPVisionModel\n\ntower = CLIPVisionModel.from_pretrained(".").eval()\n'
        'processor = CLIPImageProcessor.from_pretrained(".")\n'
        '# LLaVA\'s features (select_layer -2): tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]',
    ),
    "onnx": Format(
        "onnx", "zero-shot-image-classification", _check_onnx, _onnx,
        'import json\n\nimport onnxruntime\n\nimage = onnxruntime.InferenceSession("image.onnx")\n'
        'facts = json.loads(image.get_modelmeta().custom_metadata_map["aft"])\n'
        '# image.run(None, {"pixels": float32 [batch, 3, side, side] in [0, 1]}) gives the embedding, then logits if classes are baked in',
        graph=True,
    ),
    "torch_export": Format(
        "pytorch", "zero-shot-image-classification",
        lambda model, head: limits.check_graph(model, head.classes), _torch_export,
        'import torch\n\nimage = torch.export.load("image.pt2").module()\n'
        '# image(float32 [batch, 3, side, side] in [0, 1]) gives (embedding,), or (embedding, logits) if classes are baked in',
        graph=True,
    ),
}  # fmt: skip

