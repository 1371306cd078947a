"""Whether weights give the logits that they should: ``python -m aft.clip.verify NAME WEIGHTS --against FOLDER``.

A fixed image (sums of sines, made in code at the model's own resolution) and four fixed prompts go through our model and are compared
with transformers' ``CLIPModel`` in a local folder (``--against``), or with logits that were written before (``--record``, ``--check``).
A wrong activation, normalisation, resize or logit scale moves logits of real weights by far more than the tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aft.clip.model import ZeroShotModel
from aft.clip.weights import ModelSpec, load_model
from aft.errors import AftError, WeightsError

PROMPTS = ("a photo of a cat.", "a photo of a dog.", "a diagram", "waves on the sea at night")
TOLERANCE = 1e-3  # in logits, which lie within +- the logit scale
SCHEMA = "aft.logits/1"


def fixed_image(side: int) -> Tensor:
    """The same picture at every resolution: per channel a sum of sines of the place, ``[1, 3, side, side]`` in [0, 1]."""
    place = (torch.arange(side, dtype=torch.float64) + 0.5) / side * 2 * torch.pi
    y, x = place[:, None], place[None, :]
    waves = [torch.sin(x * (c + 1)) + torch.sin(y * (3 - c) + c) + torch.sin((2 * x + 3 * y) * (c + 1)) for c in range(3)]
    return (torch.stack(waves)[None] / 6 + 0.5).float()


@torch.no_grad()
def our_logits(model: ZeroShotModel) -> Tensor:
    """Logits of the fixed image over the fixed prompts, ``[4]``."""
    logits: Tensor = model(fixed_image(model.record.resolution), model.text_bank(PROMPTS, ("{}",)))[0]
    return logits


@torch.no_grad()
def logits_of_transformers(folder: Path, model: ZeroShotModel) -> Tensor:
    """The same of transformers' CLIPModel, with our pixels and our tokens, ``[4]``.

    Raises:
        WeightsError: transformers is not installed, or the folder holds no CLIPModel.
    """
    try:
        from transformers import CLIPModel
    except ImportError as error:
        raise WeightsError("--against needs transformers: install the extra hf.") from error
    try:
        theirs: Any = CLIPModel.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f"transformers reads no CLIPModel in {folder} ({error}): give a folder with config.json and weights.") from error
    pixels, tokens = model.pixels(fixed_image(model.record.resolution)), model.tokenizer(list(PROMPTS))
    logits: Tensor = theirs.float().eval()(input_ids=tokens, pixel_values=pixels).logits_per_image[0]
    return logits


def recorded(model: ZeroShotModel) -> dict[str, Any]:
    """What ``--record`` writes: the logits and all that they depend on."""
    record = model.record
    facts = {"name": record.name, "sha256": record.sha256, "resolution": record.resolution, "activation": record.activation,
             "mean": list(record.mean), "std": list(record.std), "logit_scale": record.logit_scale}  # fmt: skip
    return {"schema": SCHEMA, "model": facts, "prompts": list(PROMPTS), "logits": our_logits(model).tolist()}


def read_logits(path: Path) -> Tensor:
    """Recorded logits, ``[4]``.

    Raises:
        WeightsError: the file is none that ``--record`` wrote, or was written for other prompts.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        schema, prompts, logits = stored["schema"], stored["prompts"], torch.tensor(stored["logits"], dtype=torch.float32)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path} holds no recorded logits ({error!r}): write it with --record.") from error
    if schema != SCHEMA or prompts != list(PROMPTS) or logits.shape != (len(PROMPTS),):
        raise WeightsError(f"{path} was recorded for other prompts or by another version: record it anew.")
    return logits


def agree(ours: Tensor, theirs: Tensor) -> bool:
    """Prints both and the largest difference; whether it is within the tolerance (what is not finite never is)."""
    largest = float((ours - theirs).abs().max())
    for prompt, own, other in zip(PROMPTS, ours.tolist(), theirs.tolist(), strict=True):
        print(f"{own:10.4f} {other:10.4f}  {prompt}")
    fine = largest <= TOLERANCE
    print(f"largest difference {largest:.2e}: {'within' if fine else 'ABOVE'} {TOLERANCE:g}")
    return fine


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 where the logits agree, 1 where they do not or something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m aft.clip.verify", description="Compares the logits of weights with other ones.")
    parser.add_argument("name", help="an open_clip name, or an embedded model")
    parser.add_argument("pretrained", help="tag, file or folder of the weights")
    parser.add_argument("--activation", choices=["gelu", "quick_gelu"], help="of a file that does not say")
    parser.add_argument("--base", help="the text side, where the file holds an image tower alone")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--against", type=Path, metavar="FOLDER", help="transformers' CLIPModel of the same weights")
    what.add_argument("--record", type=Path, metavar="FILE", help="write our logits")
    what.add_argument("--check", type=Path, metavar="FILE", help="compare with logits that were written")
    given = parser.parse_args(arguments)
    try:
        return _run(given)
    except AftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(given: argparse.Namespace) -> int:
    model = load_model(ModelSpec(given.name, given.pretrained, activation=given.activation, base=given.base))
    if given.record is not None:
        given.record.write_text(json.dumps(recorded(model), indent=2) + "\n", encoding="utf-8")
        print(f"{given.record}: logits of {model.record.name}, sha256 {model.record.sha256}")
        return 0
    theirs = read_logits(given.check) if given.check is not None else logits_of_transformers(given.against, model)
    return 0 if agree(our_logits(model), theirs) else 1


if __name__ == "__main__":
    sys.exit(main())
