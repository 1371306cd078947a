"""The released CLIPure-Cos on a real CLIP: does it defend, or hide its gradient? ``python -m bench.clipure_release``.

MiniCLIP-32 in fp32, and with its image tower in fp16 as the release runs it; batches of 1, 2, 32 and 256, which the release couples. The
first images of Tiny-ImageNet's validation set that the undefended model has right, under PGD on the margin with steps of eps / 4:

- ``oblivious``: made against the undefended tower, shown to the defended one (attack A);
- ``as_released``: by the gradient that autograd gives of the release, whose inner gradient is a constant;
- ``bpda``: the true forward, the identity backward (attack B).

The tower embeds all images at once and the purification sees them in batches of the given size: the tower does not look at neighbours, so
this is what such batches give. Of 256 the others are clean. Figures go to ``results/defenses/clipure_release.json``.

Shapes: n images, D embedding width, m neighbours.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aft.attacks import PGD, sample_keys
from aft.attacks.adaptive import Expected
from aft.attacks.sight import Dice, Sight
from aft.attacks.threat_model import pixel_fraction
from aft.batch import EvaluationSet
from aft.cards import standard_error, write_whole
from aft.clip import ZeroShotModel, load_model
from aft.clip.stages import Draw, Stage, Stages
from aft.defenses.clipure import CLIPureCosRelease
from aft.errors import ending_calmly
from aft.evaluation import first
from aft.evaluation.judge import scoring
from aft.evaluation.tasks import Classification, ClassText
from datamodules import ImageFolder

OUT = Path(__file__).resolve().parents[1] / "results" / "defenses" / "clipure_release.json"
SIZES = (1, 2, 32, 256)
LOOKED_AT = 1000


class InHalf(nn.Module):
    """An image tower in fp16.

    Args:
        tower: in fp32; it is copied.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = copy.deepcopy(tower).half()

    def forward(self, images_nCHW: Tensor) -> Tensor:
        """Embeddings in fp16."""
        embedding_nD: Tensor = self.tower(images_nCHW.half())
        return embedding_nD


class InBatches(CLIPureCosRelease):
    """The released CLIPure as batches of one size see it, however many images are embedded at once.

    Args:
        model: undefended.
        size: of the batches.
        others_mD: embeddings of neighbours that fill up a batch that is larger than what is embedded.
    """

    def __init__(self, model: ZeroShotModel, size: int, others_mD: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            super().__init__(model)
        self.size, self.others_mD = size, others_mD

    @property
    def stages(self) -> Stages:
        """After the tower."""
        return Stages(embedding=Stage(self._in_batches, differentiable=False, batch_coupled=True))

    def _in_batches(self, z_nD: Tensor, x_nCHW: Tensor, draw: Draw | None) -> Tensor:
        """Batch by batch."""
        if self.size > len(z_nD):
            filled_nD = torch.cat([z_nD, self.others_mD[: self.size - len(z_nD)].to(z_nD)])
            return self._released(filled_nD, x_nCHW, draw)[: len(z_nD)]
        return torch.cat([self._released(part_nD, x_nCHW, draw) for part_nD in z_nD.split(self.size)])


class Attacked:
    """Images that are right, and how a model fares on them.

    Args:
        model: undefended, whose texts.
        data: an evaluation set.
        n: images.
        eps: radius.
        steps: of PGD.
    """

    def __init__(self, model: ZeroShotModel, data: EvaluationSet, n: int, eps: float, steps: int) -> None:
        self.text = ClassText(model.text_bank(data.class_names, data.templates))
        batch = data.batch(range(len(data)))
        with torch.no_grad():
            right_N = model(batch.images, self.text.text_KD).argmax(1) == data.labels_N
        rows = right_N.nonzero().flatten()[:n]
        self.images_nCHW, self.truth_n, self.keys_n = batch.images[rows], data.labels_N[rows], sample_keys(0, 0, batch.index[rows])
        self.others_mCHW = batch.images[[row for row in range(len(data)) if row not in set(rows.tolist())]][: max(SIZES)]
        self.attack = PGD(eps=eps, relative_step_size=0.25, steps=steps, keep="best", drop_broken=False)

    def points(self, model: ZeroShotModel, bpda: Sequence[str] = ()) -> tuple[Tensor, float]:
        """Adversarial images, and the share of gradients that were zero."""
        sight = Sight(model, bpda)
        inner = Classification().objective(sight, self.text, self.truth_n, "margin")  # type: ignore[arg-type]
        objective = Expected(inner, sight, Dice(self.keys_n))
        found = self.attack(objective, self.images_nCHW, self.keys_n)
        assert objective.meter is not None
        return found.x_BCHW, float(objective.meter.dead_B.sum() / objective.meter.taken_B.sum())

    def right(self, model: ZeroShotModel, images_nCHW: Tensor) -> Tensor:
        """Which are right, bool ``[n]``."""
        with torch.no_grad():
            outputs_nK = Classification().forward(model, images_nCHW, self.text)
        return outputs_nK.argmax(1) == self.truth_n

    def row(self, model: ZeroShotModel, oblivious_nCHW: Tensor) -> dict[str, Any]:
        """A defended model's figures; robust is right when clean, too."""
        clean_n = self.right(model, self.images_nCHW)
        released_nCHW, dead = self.points(model)
        bpda_nCHW, _ = self.points(model, ["embedding"])
        shown = {"oblivious": oblivious_nCHW, "as_released": released_nCHW, "bpda": bpda_nCHW}
        robust = {name: share(clean_n & self.right(model, points)) for name, points in shown.items()}
        return {"clean": share(clean_n), **robust, "zero_gradients_as_released": round(dead, 4)}


def share(right_n: Tensor) -> dict[str, float]:
    """A mean with its standard error over images, in %."""
    mean = float(right_n.float().mean())
    return {"percent": round(100 * mean, 1), "standard_error": round(100 * standard_error(mean, len(right_n)), 1)}


def halved(model: ZeroShotModel) -> ZeroShotModel:
    """The same model with its image tower in fp16; texts and cosines stay fp32."""
    half = copy.deepcopy(model)
    half.clip.visual = InHalf(model.visual)
    return half.eval().requires_grad_(False)


def run(model: ZeroShotModel, data: EvaluationSet, *, n: int, eps: float | str, steps: int, out: Path = OUT) -> dict[str, Any]:
    """Measures, writes after each row, and returns."""
    told: dict[str, Any] = {"model": model.record.sha256, "data": f"{data.name}, {data.split}", "eps": str(eps), "steps": steps}
    with scoring(model):
        attacked = Attacked(model, data, n, pixel_fraction(eps), steps)
        told["images"] = len(attacked.truth_n)
        for precision, tower in (("fp32", model), ("fp16", halved(model))):
            oblivious_nCHW, _ = attacked.points(tower)
            told[precision] = {"undefended": {"clean": share(attacked.right(tower, attacked.images_nCHW)),
                                              "robust": share(attacked.right(tower, oblivious_nCHW))}}  # fmt: skip
            with torch.no_grad():
                others_mD = tower.encode(attacked.others_mCHW).embedding_BD
            for size in SIZES:
                told[precision][f"batches of {size}"] = attacked.row(InBatches(tower, size, others_mD), oblivious_nCHW)
                print(precision, size, told[precision][f"batches of {size}"], flush=True)
                write_whole(out, (json.dumps(told, indent=1) + "\n").encode())
    return told


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=int, default=64, help="images that are right when clean")
    parser.add_argument("--steps", type=int, default=10, help="of PGD")
    parser.add_argument("--eps", default="2/255", help="radius in units of the pixel range")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    given = parser.parse_args(args)
    torch.set_num_threads(given.threads)
    folder = "data/tiny-imagenet-32"
    whole = ImageFolder(name="tiny_imagenet32", train=f"{folder}/train.zip", test=f"{folder}/val.zip", classes=f"{folder}/classes.json")
    data = first(whole.evaluation_set("test"), LOOKED_AT)
    return run(load_model("miniclip32").requires_grad_(False), data, n=given.n, eps=given.eps, steps=given.steps)


if __name__ == "__main__":
    with ending_calmly():
        main()
