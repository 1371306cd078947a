"""Whether what was written says what the model says: it is read back and compared before the folder gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aft.clip.architectures import build_clip
from aft.clip.files import load_strictly, read_file
from aft.clip.layouts import detect
from aft.clip.model import ZeroShotModel
from aft.clip.stages import encode_in_stages
from aft.clip.weights import ModelSpec, load_model, own_names
from aft.errors import WeightsError
from aft.export.formats import Head
from aft.export.graphs import IMAGE, TEXT

#: Largest difference of an entry of a unit embedding, and of a logit in units of the logit scale.
TOLERANCE, TOLERANCE_ONNX, TOLERANCE_HALF = 1e-5, 1e-4, 2e-2
PROMPTS = ("a photo of a cat.", "waves on the sea at night", "a diagram")


@torch.no_grad()
def check_written(model: ZeroShotModel, kind: str, folder: Path, head: Head, half: bool) -> float:
    """Compares unit embeddings of random images (three, where graphs were traced with two) and prompts, and logits.

    Returns:
        The largest difference.

    Raises:
        WeightsError: it is above the tolerance.
    """
    side = model.record.resolution
    images_BCHW = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    tokens_nT = model.tokenizer(list(PROMPTS))
    embedding_BD = encode_in_stages(model, images_BCHW).embedding_BD
    pairs = {IMAGE: (embedding_BD, written(model, kind, folder, IMAGE, images_BCHW))}
    if kind != "llava_tower" and (kind not in ("onnx", "torch_export") or model.text_transform.idle):
        pairs[TEXT] = model.clip.encode_text(tokens_nT), written(model, kind, folder, TEXT, tokens_nT)  # type: ignore[operator]
    found = [float((unit(ours) - unit(theirs[0])).abs().max()) for ours, theirs in pairs.values()]
    if head.classes:
        bank_KD = model.text_bank(head.classes, head.templates)
        logits_BK = unit(embedding_BD) @ bank_KD.T
        found.append(float((logits_BK - pairs[IMAGE][1][1] / model.logit_scale).abs().max()))
    tolerance = TOLERANCE_HALF if half else TOLERANCE_ONNX if kind == "onnx" else TOLERANCE
    if not max(found) <= tolerance:
        raise WeightsError(f"the {kind} export of {model.record.name} differs from the model by {max(found):.2e}, more than {tolerance:g}: "
                           "nothing was written; please report this with the model's record.")  # fmt: skip
    return max(found)


def unit(embedding_BD: Tensor) -> Tensor:
    """Unit vectors in fp32."""
    return F.normalize(embedding_BD.float(), dim=-1)


def written(model: ZeroShotModel, kind: str, folder: Path, part: str, value: Tensor) -> list[Tensor]:
    """What the export says: the embedding, then logits if it has any."""
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(folder / f"{part}.onnx"))
        outputs: list[np.ndarray[Any, Any]] = session.run(None, {session.get_inputs()[0].name: value.numpy()})
        return [torch.from_numpy(one) for one in outputs]
    if kind == "torch_export":
        return list(torch.export.load(folder / f"{part}.pt2").module()(value))
    again = read_back(model, kind, folder)
    return [again.encode(value).embedding_BD if part == IMAGE else again.clip.encode_text(value)]  # type: ignore[operator]


def read_back(model: ZeroShotModel, kind: str, folder: Path) -> ZeroShotModel:
    """Exported weights as a model: through ``load_model`` where the folder knows its architecture, else into the model's own."""
    if kind in ("open_clip", "hf"):
        return load_model(ModelSpec(pretrained=str(folder)))
    file = folder / ("model.pt" if kind == "openai" else "model.safetensors")
    clip = build_clip(model.record.config)
    text = {} if kind == "openai" else {key: value for key, value in model.clip.state_dict().items() if not key.startswith("visual.")}
    load_strictly(clip, {**text, **own_names(clip, detect(read_file(file), str(file)).state)}, str(file))
    return ZeroShotModel(clip, model.tokenizer, model.record).float().eval()
