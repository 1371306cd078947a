"""Graphs that run without this project: ONNX, and torch.export's programs.

The image graph takes pixels in [0, 1], so that eps keeps its meaning: a defence's stages, normalisation and tower are inside.
Shapes: B images, R side of the tower's input, D embedding width, K classes, T tokens of a text.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aft.clip.model import ZeroShotModel
from aft.clip.stages import encode_in_stages
from aft.errors import ConfigError

IMAGE, TEXT = "image", "text"
METADATA = "aft.json"  # beside the tensors of a torch.export file
ONE_FILE = 1 << 30  # bytes of weights that fit into an ONNX file itself: protobuf's limit is twice that


class ImageGraph(nn.Module):
    """``pixels [B, 3, R, R] in [0, 1] -> embedding [B, D]``, and ``logits [B, K]`` where classes are baked in.

    Args:
        model: plain or with stages that are neither random nor coupled to the batch.
        text_KD: the class texts as the model classifies with them; none: no logits.
    """

    def __init__(self, model: ZeroShotModel, text_KD: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.scale = float(model.logit_scale)
        self.text_KD: Tensor | None
        self.register_buffer("text_KD", text_KD)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """The raw embedding; then logits."""
        embedding_BD = encode_in_stages(self.model, pixels).embedding_BD
        if self.text_KD is None:
            return (embedding_BD,)
        return embedding_BD, self.scale * F.normalize(embedding_BD, dim=-1) @ self.text_KD.T


class TextGraph(nn.Module):
    """``tokens int64 [n, T] -> embedding [n, D]``, not normalised."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """The raw embedding."""
        return (self.clip.encode_text(tokens),)  # type: ignore[operator]


def graphs_of(model: ZeroShotModel, classes: Sequence[str], templates: Sequence[str]) -> dict[str, tuple[nn.Module, Tensor]]:
    """The graphs of a model, each with an example of its input; no text graph where a transformation stands behind the text tower."""
    bank_KD = model.text_bank(classes, templates) if classes else None
    side = model.record.resolution
    found: dict[str, tuple[nn.Module, Tensor]] = {IMAGE: (ImageGraph(model, bank_KD), torch.rand(2, 3, side, side, generator=_noise()))}
    if model.text_transform.idle:
        found[TEXT] = TextGraph(model.clip), model.tokenizer(["a cat", "two dogs"])
    return {name: (graph.eval(), example) for name, (graph, example) in found.items()}


def _noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def traced(graph: nn.Module, example: Tensor, what: str) -> torch.export.ExportedProgram:
    """torch.export's program for any number of rows.

    Raises:
        ConfigError: something in it cannot be traced, such as a stage that takes gradients.
    """
    argument = "pixels" if isinstance(graph, ImageGraph) else "tokens"
    rows = {argument: {0: torch.export.Dim("rows", min=1, max=4096)}}
    try:
        with torch.no_grad(), _remembered_texts(graph, example), _plain_attention():
            return torch.export.export(graph, (example,), dynamic_shapes=rows)
    except Exception as error:  # torch has a dozen kinds, and a stage may raise its own
        said = " ".join(str(error).split())[:300] or type(error).__name__
        stages = ", ".join(graph.model.stages.declared) if isinstance(graph, ImageGraph) else ""
        why = f"its {stages} stage may take gradients or look at values; export the undefended model"
        remedy = why if stages else "use --format open_clip"
        raise ConfigError(f"the {what} cannot be written as a graph: {remedy}. torch.export says: {said}") from error


@contextmanager
def _remembered_texts(graph: nn.Module, example: Tensor) -> Iterator[None]:
    """While it is traced, a stage that asks for a text bank gets the one it got before: a constant, not the text tower."""
    if not isinstance(graph, ImageGraph) or not graph.model.stages.declared:
        yield
        return
    plain, banks = graph.model.undefended, {}
    ask = plain.text_bank

    def remember(names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Asks once a list."""
        key = (tuple(names), tuple(templates))
        if key not in banks:
            banks[key] = ask(names, templates).clone()
        return banks[key]

    object.__setattr__(plain, "text_bank", remember)
    try:
        graph(example)
        yield
    finally:
        object.__delattr__(plain, "text_bank")


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without torch's fused inference kernel, which no other runtime has."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def metadata_of(facts: Mapping[str, Any], name: str) -> dict[str, str]:
    """What a graph says of itself, as text; ``aft`` holds all of ``export.json``."""
    side = facts["model"]["resolution"]
    inputs = {
        IMAGE: f"pixels: float32 [batch, 3, {side}, {side}], RGB in [0, 1]; normalisation is inside, resize before (bicubic, antialiased, "
               "no crop)",
        TEXT: "tokens: int64 [batch, context], OpenAI's BPE, padded with 0",
    }  # fmt: skip
    return {
        "aft": json.dumps(facts, ensure_ascii=False), "aft.input": inputs[name], f"aft.{name}_embedding": "not normalised",
        "aft.logit_scale": str(facts["model"]["logit_scale"]),
    }  # fmt: skip


def need(*modules: str) -> None:
    """Raises ConfigError where a package of the extra ``onnx`` is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--format onnx needs {', '.join(missing)}: install the extra onnx (pip install 'aft[onnx]').")


def write_onnx(graphs: Mapping[str, tuple[nn.Module, Tensor]], facts: Mapping[str, Any], folder: Path) -> None:
    """``image.onnx`` and ``text.onnx``; weights of more than a gigabyte lie in ``NAME.onnx.data`` beside them."""
    for name, (graph, example) in graphs.items():
        names = ["pixels"] if name == IMAGE else ["tokens"]
        outputs = [f"{name}_embedding", "logits"][: 2 if getattr(graph, "text_KD", None) is not None else 1]
        program = torch.onnx.export(
            traced(graph, example, f"{name} graph"), (example,), dynamo=True, input_names=names, output_names=outputs, verbose=False
        )
        assert program is not None
        program.model.metadata_props.update(metadata_of(facts, name))
        size = sum(value.numel() * value.element_size() for value in graph.state_dict().values())
        program.save(str(folder / f"{name}.onnx"), external_data=size > ONE_FILE)


def write_torch_export(graphs: Mapping[str, tuple[nn.Module, Tensor]], facts: Mapping[str, Any], folder: Path) -> None:
    """``image.pt2`` and ``text.pt2``, each with ``aft.json`` inside."""
    for name, (graph, example) in graphs.items():
        said = json.dumps(metadata_of(facts, name), ensure_ascii=False)
        torch.export.save(traced(graph, example, f"{name} graph"), folder / f"{name}.pt2", extra_files={METADATA: said})
