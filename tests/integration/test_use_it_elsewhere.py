"""docs/use_it_elsewhere.md: every block of it runs, where ``aft`` cannot be imported; strangers reproduce a card's figures from exports."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_command
from aft.batch import EvaluationSet
from aft.cards import Card
from aft.evaluation import first
from aft.export.__main__ import main
from datamodules import Sample

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "use_it_elsewhere.md").read_text(encoding="utf-8")
WEIGHTS = ROOT / "results" / "weights" / "tecoa_seed0.safetensors"
IMAGES, ATTACKED = 500, 48
pytestmark = pytest.mark.timeout(600)  # five exports come first

# Before a stranger's lines: what they do not have is not to be had, however the environment was made.
ALONE = "import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n"
ABSENT = {
    "open_clip": {"aft", "transformers", "onnxruntime"}, "transformers": {"aft", "open_clip", "onnxruntime"},
    "onnxruntime": {"aft", "open_clip", "transformers", "torch"},
}  # fmt: skip


def stranger(library: str, lines: str, folder: Path) -> str:
    """Runs lines in a Python of their own that has that library and not this project; what they print."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    code = ALONE.format(absent=ABSENT[library]) + lines
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def blocks(kind: str) -> dict[str, str]:
    """The blocks of a kind by the section they stand in."""
    sections = re.split(r"^## ", TEXT, flags=re.M)[1:]
    return {section.split("\n")[0]: found[0] for section in sections if (found := re.findall(rf"```{kind}\n(.*?)```", section, flags=re.S))}


@pytest.fixture(scope="module")
def sample() -> EvaluationSet:
    """The first photographs of the sample's fixed order."""
    data = Sample()
    data.setup("test")
    return first(data.evaluation_set("test"), IMAGES)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, sample: EvaluationSet) -> Iterator[Path]:
    """A folder with twelve photographs in which all export commands of the page have run."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "results").symlink_to(ROOT / "results")
    (folder / "photos").mkdir()
    pixels_NHWC = np.stack([np.uint8(255 * sample.images[int(p)].permute(1, 2, 0).numpy() + 0.5) for p in positions(sample)])
    np.savez(folder / "sample.npz", images=pixels_NHWC, labels=sample.labels_N.numpy())
    for number in range(12):
        Image.fromarray(pixels_NHWC[number]).save(folder / "photos" / f"{number}.png")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for command in blocks("sh").values():
            words = shlex.split(command)
            if words[1] == "eval.py":
                eval_command.main(words[2:])
            else:
                assert words[:3] == ["python", "-m", "aft.export"]
                main(words[3:])
        yield folder
    finally:
        os.chdir(before)


def positions(data: EvaluationSet) -> list[int]:
    """Where its images lie in the store."""
    assert data.positions_N is not None
    return [int(p) for p in data.positions_N]


@pytest.mark.parametrize(
    ("library", "sections"),
    [
        ("open_clip", ["open_clip", "Retrieval with robust embeddings", "A perceptual distance"]),
        ("transformers", ["transformers", "LLaVA-style towers"]),
        ("onnxruntime", ["ONNX Runtime"]),
    ],
)
def test_every_python_block_of_the_page_runs(library: str, sections: list[str], place: Path) -> None:
    """With that library alone; the distance sees which of two made images is nearer."""
    python = blocks("python")
    assert set(python) == {"open_clip", "transformers", "LLaVA-style towers", "ONNX Runtime", "Retrieval with robust embeddings",
                           "A perceptual distance"}  # fmt: skip
    said = stranger(library, "\n".join(python[section] for section in sections), place)
    assert all(len([line for line in python[section].splitlines() if line.strip()]) <= 11 for section in sections)
    if library == "open_clip":
        lists = re.findall(r"\[('.*')\]", said)
        assert len(lists) == 2 and lists[1].startswith("'0.png'")
        assert int(re.findall(r"(\d+) of 12 pairs", said)[0]) >= 10
    elif library == "transformers":
        assert "torch.Size([1, 16, 256])" in said
    else:
        assert "(1, 256)" in said


def test_the_soup_and_the_robustbench_entry_are_there(place: Path) -> None:
    """The sum is named; entries come from the cards that an export carries."""
    soup = (place / "exports/soup/README.md").read_text()
    assert "merge(0.5*" in soup and "nothing is claimed" in soup
    entries = [json.loads(path.read_text()) for path in (place / "exports/robustbench").rglob("*.json")]
    assert len(entries) == 6 and {entry["eps"] for entry in entries} == {"1/255", "2/255", "4/255"}


def measured(protocol: str, n: int, out: Path) -> Card:
    """A card of the exported weights, by this project's own evaluation."""
    words = ["--weights", str(WEIGHTS), "--data", "datamodules.Sample", "--n", str(n), "--protocols", f"[{protocol}]", "--eps", "[2/255]",
             "--steps", "10", "--threads", "1", "--out", str(out)]  # fmt: skip
    ((_, card),) = eval_command.main(words)
    return card


COUNT = {
    "open_clip": """
import numpy, open_clip, torch
from PIL import Image
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:exports/open_clip")
tokenizer, data = open_clip.get_tokenizer("local-dir:exports/open_clip"), numpy.load("sample.npz")
text = tokenizer([f"a photo of a {name}." for name in CLASSES])
with torch.no_grad():
    z = model.eval().encode_image(torch.stack([preprocess(Image.fromarray(one)) for one in data["images"]]), normalize=True)
    said = (z @ model.encode_text(text, normalize=True).T).argmax(-1).numpy()
print((said == data["labels"]).sum())
""",
    "transformers": """
import numpy, torch
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
model, tokenizer = CLIPModel.from_pretrained("exports/hf").eval(), CLIPTokenizer.from_pretrained("exports/hf")
processor, data = CLIPImageProcessor.from_pretrained("exports/hf"), numpy.load("sample.npz")
text = tokenizer([f"a photo of a {name}." for name in CLASSES], padding=True, return_tensors="pt")
with torch.no_grad():
    said = model(**processor(list(data["images"]), return_tensors="pt"), **text).logits_per_image.argmax(-1).numpy()
print((said == data["labels"]).sum())
""",
    "onnxruntime": """
import numpy, onnxruntime
session, data = onnxruntime.InferenceSession("exports/onnx/image.onnx"), numpy.load("sample.npz")
pixels = data["images"].transpose(0, 3, 1, 2).astype(numpy.float32) / 255
print((session.run(["logits"], {"pixels": pixels})[0].argmax(1) == data["labels"]).sum())
""",
}


@pytest.fixture(scope="module")
def clean(place: Path) -> Card:
    """The clean accuracy on 500 photographs."""
    return measured("clean", IMAGES, place / "clean")


@pytest.mark.parametrize("library", COUNT)
def test_a_stranger_reproduces_the_clean_accuracy(library: str, place: Path, clean: Card, sample: EvaluationSet) -> None:
    """With that library alone, and its own preprocessing and tokenizer: the card's figure to the digit."""
    said = stranger(library, f"CLASSES = {list(sample.class_names)!r}\n{COUNT[library]}", place)
    assert int(said.split()[-1]) == round(clean["clean_accuracy"] * IMAGES)
    assert clean["data"]["n"] == IMAGES and 0.2 < clean["clean_accuracy"] < 0.5


def test_a_foreign_attack_leaves_what_the_card_says(place: Path, sample: EvaluationSet) -> None:
    """foolbox's PGD on open_clip's model of the export, against this project's PGD on its own: within one standard error."""
    foolbox, open_clip = pytest.importorskip("foolbox"), pytest.importorskip("open_clip")
    card = measured("pgd", ATTACKED, place / "robust")
    clip, _, preprocess = open_clip.create_model_and_transforms("local-dir:exports/open_clip")
    tokens = open_clip.get_tokenizer("local-dir:exports/open_clip")([f"a photo of a {name}." for name in sample.class_names])
    normalise, text = preprocess.transforms[-1], clip.eval().requires_grad_(False).encode_text(tokens, normalize=True)

    class Classifier(torch.nn.Module):
        """Logits from pixels in [0, 1]."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """As zero-shot models classify."""
            return clip.logit_scale.exp() * clip.encode_image(normalise(x), normalize=True) @ text.T

    images = torch.stack([sample.images[p] for p in positions(sample)[:ATTACKED]])
    attack = foolbox.attacks.LinfPGD(abs_stepsize=0.5 / 255, steps=10, random_start=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = foolbox.PyTorchModel(Classifier().eval(), bounds=(0, 1))
        _, shown, broken = attack(theirs, images, sample.labels_N[:ATTACKED], epsilons=2 / 255)
    assert (shown - images).abs().max() <= 2 / 255 + 1e-6
    robust = 1 - float(broken.float().mean())
    assert abs(robust - card["robust_accuracy"]) <= card["standard_error"]["robust"] and robust < card["clean_accuracy"]
