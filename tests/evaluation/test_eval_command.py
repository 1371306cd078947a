"""Laws of ``eval.py``: what is asked for is measured, nothing twice, and a mistake is one line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import eval as command
from aft.clip import ModelSpec, files, load_model
from aft.clip.pack import pack_tower
from aft.clip.weights import named
from aft.defenses import LatentDiffusionPrior
from aft.errors import AftError
from aft.evaluation import runner
from datamodules import Sample
from datamodules.caption_table import main as caption_table

ROOT = Path(__file__).resolve().parents[2]
MODEL = "{m: {name: tiny}}"


def run(out, *more):
    """A small evaluation of the tiny model on the sample."""
    return command.main(["--data", "datamodules.Sample", "--models", MODEL, "--out", str(out), "--n", "20", "--steps", "2", *more])


def test_models_spaces_protocols_and_radii_are_crossed(tmp_path, capsys):
    """Each combination once, the clean one without a radius; then nothing is left to do, and report shows the same."""
    spaces = "{some: [cat, dog, ship], all: null}"
    words = ("--n", "10", "--label_spaces", spaces, "--protocols", "[clean, pgd, apgd]", "--eps", "[1/255, 2/255]")
    made = run(tmp_path, *words)
    cells = [(c["data"]["label_space"], c["protocol"]["name"], c["threat"] and c["threat"]["eps"]) for _, c in made]
    ladder = [(name, eps / 255) for name in ("pgd", "apgd") for eps in (1, 2)]
    assert cells == [(space, *cell) for space in ("some", "all") for cell in [("clean", None), *ladder]]
    assert all(c["data"]["n"] == 10 and c["command"].startswith("python eval.py --data") and c["model"]["name"] == "tiny" for _, c in made)
    assert {"cards", "config.yaml", "table.csv", "accuracy.png"} <= {path.name for path in tmp_path.iterdir()}
    said = capsys.readouterr().out
    assert "show them again: python eval.py report --cards" in said and "±" in said and "\x1b" not in said
    assert run(tmp_path, *words) == made
    capsys.readouterr()
    shown = command.main(["report", "--cards", str(tmp_path / "cards")])
    assert sorted(shown, key=str) == sorted(made, key=str) and "apgd_margin" in capsys.readouterr().out


def test_files_may_be_given_several_times_and_the_command_line_wins(tmp_path):
    """The later file over the earlier one, the command line over both; the effective settings lie beside the cards, and work again."""
    whole = {"n": 30, "seed": 1, "models": {"m": {"name": "tiny"}}, "protocols": ["clean"]}
    for name, settings in (("a", whole), ("b", {"n": 12, "seed": 2})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"data": "datamodules.Sample", **settings}))
    made = command.main(["-c", str(tmp_path / "a.yaml"), "-c", str(tmp_path / "b.yaml"), "--seed", "3", "--out", str(tmp_path / "out")])
    stored = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert made[0][1]["data"]["n"] == 12 and (stored["n"], stored["seed"]) == (12, 3)
    assert command.main(["-c", str(tmp_path / "out" / "config.yaml")]) == made


def test_largest_first_spares_survivors_and_says_so(tmp_path, capsys):
    """Radii from the largest; the cards of the smaller ones name what was spared, and the table says it."""
    made = run(tmp_path, "--protocols", "[pgd]", "--eps", "[0.1/255, 1/255]", "--largest_first", "true")
    assert [round(255 * card["threat"]["eps"], 3) for _, card in made] == [1, 0.1]
    large, small = (card for _, card in made)
    spared = small["metrics"]["spared"]
    assert spared["cell"] == large["cell"] and spared["images"] == round(20 * large["robust_accuracy"]) and "spared" not in large["metrics"]
    assert small["robust_accuracy"] >= large["robust_accuracy"] and "Largest radius first" in capsys.readouterr().out


def test_curve_measures_the_way_to_the_robust_weights(tmp_path, tiny_folder):
    """Share 0 is the base, share 1 the tuned model; a picture of robust against clean accuracy."""
    tuned = load_model("tiny")
    with torch.no_grad():
        for parameter in tuned.visual.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    pack_tower(tuned, tmp_path / "tuned.safetensors")
    words = ["--data", "datamodules.Sample", "--n", "20", "--steps", "2", "--protocols", "[pgd]", "--eps", "[1/255]"]
    made = command.main(["curve", *words, "--base.name", "tiny", "--robust.name", "tiny", "--robust.pretrained",
                         str(tmp_path / "tuned.safetensors"), "--shares", "[0, 0.5, 1]", "--out", str(tmp_path / "curve")])  # fmt: skip
    assert [label for label, _ in made] == ["a=0", "a=0.5", "a=1"] and (tmp_path / "curve" / "curve.png").stat().st_size > 5000
    assert len({card["model"]["sha256"] for _, card in made}) == 3
    ends = command.main([*words, "--models", "{m: {name: tiny}, t: {name: tiny, pretrained: %s}}" % (tmp_path / "tuned.safetensors"),
                         "--out", str(tmp_path / "ends")])  # fmt: skip
    for (_, on_curve), (_, alone) in zip((made[0], made[2]), ends, strict=True):
        assert (on_curve["clean_accuracy"], on_curve["robust_accuracy"]) == (alone["clean_accuracy"], alone["robust_accuracy"])
    with pytest.raises(AftError, match="shares is empty"):
        command.main(["curve", *words, "--robust.name", "tiny", "--base.name", "tiny", "--shares", "[]", "--out", str(tmp_path / "none")])


def test_ranks_share_the_work_and_the_last_shows_the_table(tmp_path, monkeypatch, capsys):
    """As torchrun tells them: the first finds its cells unfinished, the last has all cards, whatever its rank.

    Settings and table come once; every line of a rank bears its number. When nothing is left to do, rank 0 shows the table again.
    """
    monkeypatch.setenv("WORLD_SIZE", "2")
    made, said = [], []
    for rank in ("0", "1", "0", "1"):
        monkeypatch.setenv("RANK", rank)
        made.append(run(tmp_path, "--protocols", "[clean, pgd]", "--eps", "[2/255]"))
        said.append(capsys.readouterr().out)
    assert [len(cards) for cards in made] == [0, 2, 2, 0] and {card["data"]["n"] for _, card in made[1]} == {20}
    assert ["Chance:" in text for text in said] == [False, True, True, False]
    assert ["protocols:" in text for text in said] == [True, False, True, False]
    assert "rank 0: its share is done; the table comes from the rank that ends last" in said[0] and "rank 1: m, sample all, pgd" in said[1]


def test_ranks_measure_one_cell_at_a_smaller_radius(tmp_path, monkeypatch, capsys):
    """It takes survivors over from the larger one, and begins when that is whole: else each rank measures half of a cell of its own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = []
    for rank in ("0", "1", "0"):
        monkeypatch.setenv("RANK", rank)
        made.append(run(tmp_path, "--protocols", "[pgd]", "--eps", "[0.001/255, 0.002/255]", "--largest_first", "true"))
        parts = [path.name for path in (tmp_path / "parts").glob("*") if any(path.iterdir())]
        assert len(parts) == (rank == "0" and len(made) == 1) + (rank == "1"), parts
    assert [len(cards) for cards in made] == [0, 0, 2]
    assert "largest_first its smaller radii: the same command goes on" in capsys.readouterr().out


def test_rank_0_that_ends_last_shows_the_cards_of_the_others(tmp_path, monkeypatch, capsys):
    """A cell that another rank finished is in its table, too."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, protocols in (("0", "[clean]"), ("1", "[clean, pgd]"), ("0", "[clean, pgd]")):
        monkeypatch.setenv("RANK", rank)
        made = run(tmp_path, "--protocols", protocols, "--eps", "[2/255]")
    assert len(made) == 2 and "Chance:" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "expected"), [
    ("ViT-B-32/openai", ModelSpec("ViT-B-32", "openai")), ("miniclip32", ModelSpec("miniclip32")),
    ("hf-hub:owner/model", ModelSpec(pretrained="/cache/owner/model")), ("configs", ModelSpec(pretrained="configs")),
])  # fmt: skip
def test_one_model_by_its_name(given, expected, monkeypatch):
    """NAME/TAG, NAME, a model of the hub (fetched without pickles), or a path."""
    def fetch(name, allow_patterns):
        """In the place of a download."""
        assert allow_patterns == ["*.json", "*.safetensors"]
        return f"/cache/{name}"

    monkeypatch.setattr(files.huggingface_hub, "snapshot_download", fetch)
    assert named(given) == expected


def test_a_model_of_the_hub_that_cannot_be_fetched_is_named(monkeypatch):
    """With what to do."""
    monkeypatch.setattr(files.huggingface_hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(AftError, match="hf-hub:a/b could not be fetched .no network.: check name and network"):
        named("hf-hub:a/b")


def test_a_radius_given_twice_is_measured_once(tmp_path, capsys):
    """In the order given, and it is said."""
    cards = run(tmp_path, "--protocols", "[pgd, pgd]", "--eps", "[2/255, 1/255, 2/255]")
    assert [round(255 * card["threat"]["eps"]) for _, card in cards] == [2, 1]
    assert "names a radius more than once" in capsys.readouterr().out


MISTAKES = {
    "--model miniclip32 --weights x.ckpt": "give one of them",
    "-c configs/eval/apdg.yaml": "there is no file configs/eval/apdg.yaml: did you mean configs/eval/apgd.yaml",
    "--protocols [apdg]": "did you mean 'apgd'",
    "--label_spaces {s: [cat,dgo]}": "did you mean 'dog'",
    "--n 5000": "has 1000 images",
    "--eps [4]": "write 4/255",
    "--eps []": "give one radius",
    "--protocols []": "protocols is empty",
    "--models {m:{name:miniclip23,pretrained:random}}": "did you mean 'miniclip32'",
    "--weights nowhere.ckpt": "no weights file at nowhere.ckpt",
    "--split tets": "did you mean 'test'",
    "--stepz 3": "did you mean 'steps'",
    "--data.bach_size 3": "did you mean 'batch_size'",
    "--rank 2 --world 2": "ranks are 0",
    "--threads 0": "threads = 0",
    "--batch_size 0": "batch_size = 0",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_named_before_anything_is_measured(tmp_path, words, monkeypatch):
    """With what is allowed or what to do."""
    monkeypatch.setattr(runner, "_one_part", lambda *_: pytest.fail("an image was measured"))
    given = words.replace("{m:{name:miniclip23,pretrained:random}}", "{m: {name: miniclip23, pretrained: random}}").replace("s: ", "s:_")
    with pytest.raises(AftError, match=MISTAKES[words]):
        run(tmp_path, *(word.replace("s:_", "s: ") for word in given.split(" ", 1)) if words.count("--") == 1 else words.split())


def test_cuda_is_refused_where_there_is_none(tmp_path, monkeypatch):
    """And not replaced by the CPU; auto is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(AftError, match="torch sees no CUDA device"):
        run(tmp_path, "--device", "cuda")
    assert command.torch_device("auto").type == "cpu"


@pytest.mark.parametrize("local_rank, expected", [(None, "cuda:0"), ("1", "cuda:1"), ("5", "cuda:1")])
def test_each_process_takes_the_gpu_that_the_launcher_gave_it(local_rank, expected, monkeypatch):
    """More processes than GPUs share them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert str(command.torch_device("auto")) == str(command.torch_device("cuda")) == expected
    assert str(command.torch_device("cpu")) == "cpu"


def test_threads_are_set_on_request(tmp_path):
    """And left to torch otherwise."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        command.use_threads(None)
        assert torch.get_num_threads() == 2
        run(tmp_path, "--threads", "1", "--protocols", "[clean]")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("error, status, words", [
    (AftError("a plain line"), 2, "error: a plain line\n"), (KeyboardInterrupt(), 130, "the same command goes on"), (None, 0, ""),
])  # fmt: skip
def test_the_exit_status_says_what_happened(monkeypatch, capsys, error, status, words):
    """One line without a traceback."""
    def fake() -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(command, "main", fake)
    assert command.shell() == status
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_are_understood(path, tmp_path, monkeypatch):
    """Each is run for one part of four images with a tiny model in the place of its own, and on the sample; every key has a comment.

    Where captions are asked for, four photographs of the sample are captioned with their classes.
    """
    monkeypatch.chdir(ROOT)
    lines = path.read_text().splitlines()
    keys = [number for number, line in enumerate(lines) if line and line[0].isalpha() and not line.startswith("data:")]
    assert all(lines[number - 1].lstrip().startswith("#") or lines[number + 1].lstrip().startswith("#") for number in keys)
    data = [] if "datamodules.Sample" in path.read_text() else ["--data", "datamodules.Sample"]
    models = ["--models", MODEL]
    if path.stem == "curve":
        data, models = ["curve"], ["--base.name", "tiny", "--robust.name", "tiny", "--robust.pretrained", "null", "--shares", "[0, 1]"]
    if path.stem == "retrieval":
        photos = Sample().evaluation_set("test")
        for label, name in enumerate(photos.class_names[:4]):
            photo = photos.batch([int((photos.labels_N == label).nonzero()[0])])
            (tmp_path / "photos" / name).mkdir(parents=True)
            Image.fromarray((photo.images[0] * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "photos" / name / "0.png")
        assert caption_table([str(tmp_path / "photos"), str(tmp_path / "pairs.csv")]) == 0
        data = ["--data.test", str(tmp_path / "pairs.csv"), "--data.images", str(tmp_path / "photos"), "--task.recall_at", "[1, 3]"]
    words = [*data, "-c", str(path)] if path.stem == "curve" else ["-c", str(path), *data]
    # each row of these is otherwise six attacks of forty steps
    fast = ["--protocols", "[oblivious]"] if path.stem in ("hybrid", "defenses_table") else []
    if path.stem == "defenses_table":
        prior = LatentDiffusionPrior(16, hidden=8, blocks=1)
        prior.origin = {"model_sha256": load_model("tiny").record.sha256}
        prior.save(tmp_path / "priors" / "tiny.safetensors")
        given = yaml.safe_load(path.read_text())["defenses"]
        given["clipure_diff"]["settings"]["prior"] = str(tmp_path / "priors")
        fast += ["--defenses", json.dumps(given)]
    made = command.main([*words, *models, *fast, "--n", "4", "--steps", "1", "--out", str(tmp_path)])
    assert made and {card["data"]["n"] for _, card in made} == {4}


def test_l1_is_a_norm_as_the_others(tmp_path, capsys):
    """Its radius is a sum of pixel changes; of the dear doubts those that apply are made, and asked for again nothing is; 0 is refused."""
    words = ("--protocols", "[apgd]", "--norm", "l1", "--eps", "[3]", "--checks", "4", "--n", "100")
    ((_, card),) = made = run(tmp_path, *words)
    assert card["threat"]["norm"] == "l1" and card["threat"]["eps"] == 3 and "E1" not in card["verdict"]["failed_checks"]
    asked = set(card["metrics"]["checks"]["made"])
    assert {"E15", "E20", "E23", "E31"} <= asked and not asked & {"E18", "E19", "E21", "E22"}
    said = capsys.readouterr().out
    assert "apgd 3 l1" in said and " 3 l1 " in said
    written = (tmp_path / "cards" / "m").glob("*-l1-*.json")
    before = next(written).stat().st_mtime_ns
    assert run(tmp_path, *words) == made and next((tmp_path / "cards" / "m").glob("*-l1-*.json")).stat().st_mtime_ns == before
    for wrong, message in (("[0]", "no radius for L1"), ("[-12]", "is negative"), ("[4000]", r"outside \[0, 3072\] for L1")):
        with pytest.raises(AftError, match=message):
            run(tmp_path, "--protocols", "[pgd]", "--norm", "l1", "--eps", wrong)
    with pytest.raises(AftError, match="FAB is here for linf and l2"):
        run(tmp_path, "--protocols", "[four]", "--norm", "l1", "--eps", "[3]")


def test_the_card_of_a_model_has_every_class(tmp_path):
    """Without attacks: accuracy and n of each class, and a table without robust columns."""
    ((_, card),) = run(tmp_path, "--protocols", "[clean]")
    assert {one["n"] for one in card["metrics"]["per_class"].values()} == {2} and len(card["metrics"]["per_class"]) == 10
    assert not (tmp_path / "accuracy.png").exists() and (tmp_path / "table.csv").exists()


def test_a_command_without_its_settings_says_where_they_are() -> None:
    """A YAML has them."""
    with pytest.raises(AftError, match="arguments are required: data.*or with -c a YAML that has them"):
        command.main(["curve"])
