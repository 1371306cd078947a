"""Laws of the runner: resumed = uninterrupted, any number of processes = one, robust <= clean, a finished cell costs nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from aft import cards
from aft.errors import ConfigError
from aft.evaluation import Cell, Place, evaluate, first, plan
from aft.evaluation.judge import Cost, scoring
from aft.evaluation.runner import card_path, survivors_of

HAPPENED = ("seconds", "created")


def cell_for(model, data, name="apgd", eps=0.02, steps=3, n=None, **settings):
    """A cell on the first n images, with a radius that breaks about half of them."""
    protocol = plan(name, eps=eps, steps=steps, targets=2, classes=len(data.class_names), norm=settings.pop("norm", "linf"))
    return Cell(model, first(data, n), protocol, **settings)


def verdicts_of(cell, out, label="model"):
    """The arrays beside a cell's card."""
    return cards.read_arrays(card_path(out, label, cell).with_suffix(".npz"))


def same(a, b):
    """Whether two tables of verdicts are equal: verdicts to the bit, probabilities but for the rounding of another batch size."""
    close = {name: np.allclose if a[name].dtype.kind == "f" else np.array_equal for name in a}
    return a.keys() == b.keys() and all(close[name](a[name], b[name]) for name in a)


def without_what_happened(card):
    """A card without times, and its calibration but for the rounding of another batch size."""
    calibration = {name: value and round(value, 5) for name, value in card["metrics"]["calibration"].items()}
    changed = {"cost": {**card["cost"], "seconds": 0}, "metrics": {**card["metrics"], "calibration": calibration}}
    return {**{key: value for key, value in card.items() if key not in HAPPENED}, **changed}


@pytest.fixture
def cell(model, data):
    """APGD-CE and APGD-T on 40 images."""
    return cell_for(model, data)


def test_the_cell_is_worth_testing(cell, tmp_path):
    """Some images are wrong when clean, some break under the first attack, some survive all: else the laws below say little."""
    card = evaluate(cell, tmp_path, batch_size=16)
    assert card["clean_accuracy"] == 0.75 and 0.1 < card["robust_accuracy"] < 0.6
    assert card["verdict"] == {"status": "unchecked", "failed_checks": []} and card["data"]["n"] == 40
    assert card["per_attack"]["apgd_t"] == card["robust_accuracy"] <= card["per_attack"]["apgd_ce"] < card["clean_accuracy"]


@pytest.mark.parametrize("parts_before", [1, 2])
def test_killed_and_continued_is_uninterrupted(cell, tmp_path, parts_before):
    """Same verdicts, same card but for times, no image twice; also with another batch size afterwards, and beside a half-written part."""
    whole = evaluate(cell, tmp_path / "whole", batch_size=8)
    texts = []

    def stop(text):
        texts.append(text)
        if len(texts) == parts_before:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(cell, tmp_path / "cut", batch_size=8, log=stop)
    folder = next((tmp_path / "cut" / "parts").iterdir())
    assert len(list(folder.iterdir())) == parts_before
    (folder / ".part-0.npz.123").write_bytes(b"half")
    again = []
    card = evaluate(cell, tmp_path / "cut", batch_size=11, log=again.append)
    assert again[-1] == f"{40 - 8 * parts_before} of {40 - 8 * parts_before} images"
    assert same(verdicts_of(cell, tmp_path / "whole"), verdicts_of(cell, tmp_path / "cut"))
    assert without_what_happened(card) == without_what_happened(whole)
    assert not folder.exists(), "parts go when the card is there"


@pytest.mark.parametrize("world, n", [(3, 40), (4, 3), (2, 37)])
def test_many_processes_are_one(model, data, tmp_path, world, n):
    """Each sample once, the same verdicts, also where n does not divide or some process has nothing; the last one writes the card."""
    cell = cell_for(model, data, n=n)
    evaluate(cell, tmp_path / "one")
    made = [evaluate(cell, tmp_path / "many", batch_size=5, place=Place(rank, world)) for rank in reversed(range(world))]
    assert made[-1] is not None and made[-1]["data"]["n"] == n and made[-1]["verdict"]["failed_checks"] == []
    assert all(card is None for card in made[: min(n, world) - 1 - (world - min(n, world))])
    assert same(verdicts_of(cell, tmp_path / "one"), verdicts_of(cell, tmp_path / "many"))


def test_a_finished_cell_costs_no_forward(cell, model, tmp_path):
    """Neither image nor text tower runs, the file stays as it is; a damaged or partial card is not taken for a finished one."""
    card = evaluate(cell, tmp_path)
    path, calls = card_path(tmp_path, "model", cell), model.clip.text_calls
    before = path.stat().st_mtime_ns
    with Cost(model.visual) as cost:
        assert evaluate(cell, tmp_path) == card
    assert (cost.forwards, model.clip.text_calls, path.stat().st_mtime_ns) == (0, calls, before)
    cards.write(path, {**card, "status": "partial"})
    with Cost(model.visual) as cost:
        evaluate(cell, tmp_path)
    assert cost.forwards >= 40


def test_smaller_subsets_give_the_same_verdicts(model, data, tmp_path):
    """The verdicts on the first 10 are those among 40."""
    small, large = cell_for(model, data, n=10), cell_for(model, data)
    evaluate(small, tmp_path), evaluate(large, tmp_path)
    a, b = verdicts_of(small, tmp_path), verdicts_of(large, tmp_path)
    assert same(a, {name: column[:10] for name, column in b.items()})


def test_robust_is_never_above_clean_for_any_image(cell, tmp_path):
    """Right after an attack only where right before it; and what is wrong when clean is never attacked."""
    card = evaluate(cell, tmp_path)
    seen = verdicts_of(cell, tmp_path)
    course = np.concatenate([seen["clean"][:, None], seen["right"]], 1)
    assert (course[:, 1:] <= course[:, :-1]).all()
    assert card["metrics"]["attacked"] == {"apgd_ce": int(seen["clean"].sum()), "apgd_t": int(seen["right"][:, 0].sum())}
    assert (seen["answer"][~seen["clean"]] == seen["clean_answer"][~seen["clean"]]).all()


@pytest.mark.parametrize("norm, eps", [("linf", 1e-7), ("l2", 1e-6)])
def test_cost_counts_images_through_the_tower(model, data, tmp_path, norm, eps):
    """PGD that breaks nothing: n clean, k + 1 by the attack, 1 fresh; k backward. Without an attack n and 0."""
    card = evaluate(cell_for(model, data, "pgd", eps=eps, steps=4, norm=norm), tmp_path)
    right = round(40 * card["clean_accuracy"])
    assert card["robust_accuracy"] == card["clean_accuracy"]
    assert (card["cost"]["forwards"], card["cost"]["backwards"]) == (40 + right * (4 + 1 + 1), right * 4)
    clean = evaluate(cell_for(model, data, "clean"), tmp_path)
    assert (clean["cost"]["forwards"], clean["cost"]["backwards"]) == (40, 0)
    assert clean["threat"] is None and clean["robust_accuracy"] is None and clean["attacks"] == [] and clean["seeds"]["attack"] is None


def test_metrics_per_class_add_up(cell, tmp_path):
    """Weighted by n, the classes' accuracies are the whole's."""
    card = evaluate(cell, tmp_path)
    of_class = card["metrics"]["per_class"].values()
    for key in ("clean_accuracy", "robust_accuracy"):
        assert sum(one["n"] * one[key] for one in of_class if one["n"]) / 40 == pytest.approx(card[key])
    assert set(card["metrics"]["per_class"]) == {"ant", "bee", "cow", "dog", "elk"}


def test_a_collapsed_model_shows_as_one(make, data, tmp_path):
    """It says one class whatever it sees: its share is 1 and its robust accuracy that class's share."""
    model = make[0]()
    for parameter in model.visual.parameters():
        parameter.data.zero_()
    model.visual[-1].bias.data.fill_(1.0)
    balanced = replace(data, labels_N=torch.arange(40) % 5)
    card = evaluate(cell_for(model, balanced, "pgd"), tmp_path)
    assert card["largest_class_share"] == 1.0 and card["robust_accuracy"] == card["clean_accuracy"] == card["chance"] == 0.2


def test_scoring_is_in_eval_mode_and_full_precision_and_leaves_no_trace(cell, model, tmp_path):
    """A caller's train mode, autocast and low matmul precision change nothing, and are there again afterwards."""
    evaluate(cell, tmp_path / "plain")
    kinds = set()
    hook = model.visual.register_forward_hook(lambda _, __, out: kinds.add((out.dtype, model.visual[3].training)))
    model.train()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            evaluate(cell, tmp_path / "careless")
            assert torch.is_autocast_enabled("cpu") and torch.get_float32_matmul_precision() == "medium"
        with scoring(model):
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")
        hook.remove()
    assert kinds == {(torch.float32, False)} and model.training and model.visual[3].training
    assert same(verdicts_of(cell, tmp_path / "plain"), verdicts_of(cell, tmp_path / "careless"))
    assert all(parameter.grad is None for parameter in model.parameters())


IDENTITY = {
    "weights": lambda model, data, make: cell_for(make[0](sha256="f" * 64), data),
    "mean": lambda model, data, make: cell_for(make[0](mean=(0.4, 0.5, 0.5)), data),
    "activation": lambda model, data, make: cell_for(make[0](activation="quick_gelu"), data),
    "resolution": lambda model, data, make: cell_for(make[0](resolution=12), data),
    "data set": lambda model, data, make: cell_for(model, replace(data, name="other")),
    "split": lambda model, data, make: cell_for(model, replace(data, split="val")),
    "n": lambda model, data, make: cell_for(model, data, n=39),
    "which images": lambda model, data, make: cell_for(model, replace(data, index_N=data.index_N + 1)),
    "class names": lambda model, data, make: cell_for(model, replace(data, class_names=(*data.class_names[:4], "emu"))),
    "order of classes": lambda model, data, make: cell_for(model, replace(data, class_names=data.class_names[::-1])),
    "templates": lambda model, data, make: cell_for(model, replace(data, templates=("the {}",))),
    "label space": lambda model, data, make: cell_for(model, replace(data, label_space="some")),
    "protocol": lambda model, data, make: cell_for(model, data, "pgd"),
    "eps": lambda model, data, make: cell_for(model, data, eps=0.03),
    "norm": lambda model, data, make: cell_for(model, data, norm="l2"),
    "steps": lambda model, data, make: cell_for(model, data, steps=4),
    "seed": lambda model, data, make: cell_for(model, data, seed=1),
}


@pytest.mark.parametrize("what", IDENTITY)
def test_a_cell_changes_with_all_that_decides_its_figure(model, data, make, what):
    """Each field alone gives another cell."""
    assert IDENTITY[what](model, data, make).id != cell_for(model, data).id


def test_a_cell_does_not_change_with_what_decides_nothing(model, data, make, tmp_path):
    """The model's name and label, the order in which the set came, batch size, and when it was measured."""
    cell = cell_for(model, data)
    assert cell_for(make[0](name="else", method="tecoa"), data).id == cell.id == cell_for(make[0](), data).id
    first_time, second = (evaluate(cell, tmp_path, label, batch_size=size) for label, size in (("a", 8), ("b", 40)))
    assert first_time["cell"] == second["cell"] == cell.id


def test_images_are_kept_on_request_only(cell, tmp_path):
    """Inside the ball, one for each sample, beside the parts."""
    evaluate(cell, tmp_path / "no")
    assert not list((tmp_path / "no").rglob("images-*"))
    evaluate(cell, tmp_path / "yes", batch_size=16, keep_images=True)
    kept = [cards.read_arrays(path) for path in (tmp_path / "yes").rglob("images-*.npz")]
    assert sorted(np.concatenate([part["index"] for part in kept])) == sorted(cell.data.index_N.tolist())
    clean = {int(i): cell.data.batch([row]).images[0].numpy() for row, i in enumerate(cell.data.index_N)}
    pairs = [(x, clean[int(i)]) for part in kept for i, x in zip(part["index"], part["adversarial"], strict=True)]
    assert max(abs(x - y).max() for x, y in pairs) <= 0.02 + 1e-6


def test_places_are_checked():
    """A rank that is not among the processes would leave rows undone."""
    for rank, world in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match="ranks are 0"):
            Place(rank, world)


def test_survivors_of_a_larger_radius_are_not_attacked_again(model, data, tmp_path):
    """They count as robust; all others are judged as without them; the card says how many were spared, and it is another cell."""
    large, small = cell_for(model, data, eps=0.02), cell_for(model, data, eps=0.01)
    robust = evaluate(large, tmp_path)
    survivors = survivors_of(robust, card_path(tmp_path, "model", large))
    cell = replace(small, survivors=survivors)
    usual, spared = evaluate(small, tmp_path, "usual"), evaluate(cell, tmp_path, "spared")
    assert len(survivors.rows) == round(40 * robust["robust_accuracy"]) > 0 and cell.id != small.id
    told = spared["metrics"]
    assert told["spared"] == {"eps": 0.02, "images": len(survivors.rows), "cell": robust["cell"]}
    assert told["attacked"]["apgd_ce"] == usual["metrics"]["attacked"]["apgd_ce"] - len(survivors.rows)
    assert spared["cost"]["forwards"] < usual["cost"]["forwards"] and spared["robust_accuracy"] >= robust["robust_accuracy"]
    attacked = [row for row in range(40) if row not in survivors.rows]
    expected, found = verdicts_of(small, tmp_path, "usual"), verdicts_of(cell, tmp_path, "spared")
    assert np.array_equal(found["right"][attacked], expected["right"][attacked]) and found["right"][sorted(survivors.rows)].all()
    with pytest.raises(ConfigError, match="larger radius"):
        replace(cell_for(model, data, eps=0.03), survivors=survivors)


@pytest.mark.parametrize("name", ["pgd", "apgd", "strict", "four", "autoattack_standard"])
def test_a_radius_of_zero_gives_the_clean_accuracy(model, data, tmp_path, name):
    """Exactly, and nothing is held against the model for it."""
    card = evaluate(Cell(model, first(data, 8), plan(name, eps=0, steps=3, targets=2, classes=len(data.class_names))), tmp_path)
    assert card["robust_accuracy"] == card["clean_accuracy"] > 0.5 and card["verdict"]["status"] == "reliable"
    assert card["threat"]["eps"] == 0


def test_more_of_an_attack_never_raises_accuracy(model, data, tmp_path):
    """Radius, steps and targets, beyond one standard error; the whole box leaves at most 1 %."""
    def left(name="apgd", **settings):
        given = {"eps": "8/255", "steps": 5, "targets": 1, "classes": len(data.class_names), **settings}
        card = evaluate(Cell(model, data, plan(name, **given)), tmp_path)
        return card["robust_accuracy"], card["standard_error"]["robust"]

    for change in ([{"eps": f"{eps}/255"} for eps in (1, 2, 4, 8, 16, 32)], [{"steps": steps} for steps in (1, 2, 5, 20)],
                   [{"targets": targets} for targets in (1, 2, 4)]):  # fmt: skip
        found = [left(**one) for one in change]
        assert all(after <= before + error for (before, error), (after, _) in pairwise(found)), found
    assert left(eps=1.0, steps=20)[0] <= 0.01
