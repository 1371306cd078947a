"""The formats by name: what each may hold, how it is written, which libraries load it, and with which lines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

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
class Format(ABC):
    """One of the ways in which a model leaves the house.

    Args:
        library: the hub's name for who loads it.
        task: the hub's name for what it is for.
        load: Python lines that load it from the folder that they are run in, and need that library alone.
    """

    graph: ClassVar[bool]
    library: str
    task: str
    load: str

    @abstractmethod
    def check(self, model: ZeroShotModel, head: Head) -> None:
        """Raises ConfigError for a model that the format has no place for."""

    @abstractmethod
    def write(self, model: ZeroShotModel, folder: Path, head: Head, half: bool, facts: Mapping[str, Any]) -> None:
        """Writes all but the model card."""


@dataclass(frozen=True)
class Weights(Format):
    """Tensors and a configuration.

    Args:
        fits: raises ConfigError for a model that the layout has no place for.
        save: writes ``(model, folder, in half precision)``.
    """

    graph = False
    fits: Callable[[ZeroShotModel], None]
    save: Callable[[ZeroShotModel, Path, bool], None]

    def check(self, model: ZeroShotModel, head: Head) -> None:
        """What the layout holds."""
        self.fits(model)

    def write(self, model: ZeroShotModel, folder: Path, head: Head, half: bool, facts: Mapping[str, Any]) -> None:
        """The tensors; facts lie in ``export.json``."""
        self.save(model, folder, half)


@dataclass(frozen=True)
class Graph(Format):
    """A program that takes pixels.

    Args:
        save: writes ``(graphs, facts, folder)``.
        needs: packages of the extra of the same name that write it.
    """

    graph = True
    save: Callable[[Mapping[str, tuple[nn.Module, Tensor]], Mapping[str, Any], Path], None]
    needs: tuple[str, ...] = ()

    def check(self, model: ZeroShotModel, head: Head) -> None:
        """What a graph holds, and whether it can be written here."""
        need(*self.needs)
        limits.check_graph(model, head.classes)

    def write(self, model: ZeroShotModel, folder: Path, head: Head, half: bool, facts: Mapping[str, Any]) -> None:
        """The graphs, with the facts inside."""
        self.save(graphs_of(model, head.classes, head.templates), facts, folder)


ZERO_SHOT = "zero-shot-image-classification"
FORMATS: dict[str, Format] = {
    "open_clip": Weights(
        "open_clip", ZERO_SHOT,
        'import open_clip\n\nmodel, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")\n'
        'tokenizer = open_clip.get_tokenizer("local-dir:.")\nmodel.eval()',
        limits.check_open_clip, layouts.write_open_clip,
    ),
    "openai": Weights(
        "clip", ZERO_SHOT,
        '# With OpenAI\'s package: model, preprocess = clip.load("./model.pt"); the same file with open_clip alone:\n'
        'import open_clip\n\nmodel = open_clip.load_openai_model("./model.pt", device="cpu")',
        limits.check_openai, layouts.write_openai,
    ),
    "hf": Weights(
        "transformers", ZERO_SHOT,
        'from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer\n\nmodel = CLIPModel.from_pretrained(".").eval()\n'
        'processor, tokenizer = CLIPImageProcessor.from_pretrained("."), CLIPTokenizer.from_pretrained(".")',
        limits.check_transformers, layouts.write_hf,
    ),
    "llava_tower": Weights(
        "transformers", "image-feature-extraction",
        'from transformers import CLIPImageProcessor, CLIPVisionModel\n\ntower = CLIPVisionModel.from_pretrained(".").eval()\n'
        'processor = CLIPImageProcessor.from_pretrained(".")\n'
        '# LLaVA\'s features (select_layer -2): tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]',
        limits.check_vision_tower, layouts.write_llava_tower,
    ),
    "onnx": Graph(
        "onnx", ZERO_SHOT,
        'import json\n\nimport onnxruntime\n\nimage = onnxruntime.InferenceSession("image.onnx")\n'
        'facts = json.loads(image.get_modelmeta().custom_metadata_map["aft"])\n'
        '# image.run(None, {"pixels": float32 [batch, 3, side, side] in [0, 1]}) gives the embedding, then logits if classes are baked in',
        write_onnx, needs=("onnx", "onnxscript", "onnxruntime"),
    ),
    "torch_export": Graph(
        "pytorch", ZERO_SHOT,
        'import torch\n\nimage = torch.export.load("image.pt2").module()\n'
        '# image(float32 [batch, 3, side, side] in [0, 1]) gives (embedding,), or (embedding, logits) if classes are baked in',
        write_torch_export,
    ),
}  # fmt: skip
