"""Laws of figures under a defence: which attacks run, on which images, with whose draws; no process, batch or kill changes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aft import cards
from aft.attacks import APGD
from aft.clip.stages import DRAWS_A_PURPOSE, Stage, Stages
from aft.errors import ConfigError
from aft.evaluation import Cell, Place, evaluate, first, plan, rounds
from aft.evaluation.adaptive import WEIGHTS
from aft.evaluation.defended import DefendedJudge
from aft.evaluation.defended_card import gain, rows_decided, words
from aft.evaluation.defended_report import robust_n
from aft.evaluation.judge import Survivors
from aft.evaluation.pages.tables import number_of
from aft.evaluation.runner import card_path
from aft.evaluation.transfer import Transferred, transfer_id
from tests.staged import Made, blurred, defended, gated_blur, grey_levels, noisy

EPS = 0.008


def cell_for(model, data, name="adaptive_small", n=None, eps=EPS, quick=True, **changed):
    """A cell with few steps; ``changed`` are fields of the plan."""
    protocol = plan(name, eps=eps, steps=3, targets=2, classes=len(data.class_names))
    if quick:
        attacks = tuple(replace(one, attack=replace(one.attack, steps=6 if one.way != "queries" else 25)) for one in protocol.attacks)
        protocol = replace(protocol, attacks=attacks, plan=replace(protocol.plan, selection=3, scoring=4, pilot=6, **changed))
    return Cell(model, first(data, n), protocol)


def verdicts_of(cell, out, label="model"):
    """The arrays beside a cell's card."""
    return cards.read_arrays(card_path(out, label, cell).with_suffix(".npz"))


def figures(card):
    """What it says of the defence."""
    return card["metrics"]["defended"]


KINDS = {
    "deterministic": ({"pixels": blurred()}, ["a_apgd_ce", "a_apgd_t", "b_pgd_margin", "c_pgd_margin", "e_square"]),
    "opaque": ({"pixels": grey_levels(9)}, ["a_apgd_ce", "a_apgd_t", "b_pgd_margin", "e_square"]),
    "gated": ({"pixels": gated_blur(0.15)}, ["a_apgd_ce", "a_apgd_t", "b_pgd_margin", "c_pgd_margin", "d_gate", "e_square"]),
    "random": ({"pixels": noisy(0.02)}, ["a_apgd_ce", "a_apgd_t", "b_pgd_margin", "c_pgd_margin", "e_square"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_applies_by_the_declared_stages_runs(kind, model, data, tmp_path):
    """No gate: no D; nothing differentiable: no C; no randomness: one draw. The card says how many images each attack saw."""
    stages, expected = KINDS[kind]
    cell = cell_for(defended(model, kind, **stages), data)
    card = evaluate(cell, tmp_path)
    attacks = {attack["name"]: attack for attack in card["attacks"]}
    assert list(attacks) == list(card["per_attack"]) == expected and card["protocol"]["name"] == "adaptive_small"
    left = int((verdicts_of(cell, tmp_path)["selection"][:, :3].min(1) > 0).sum())
    assert attacks["a_apgd_ce"]["n"] == 40 and attacks["b_pgd_margin"]["n"] == left > 3 and attacks["e_square"]["n"] == min(20, left)
    random = kind == "random"
    assert (attacks["b_pgd_margin"]["eot"] > 1) <= random and attacks["a_apgd_ce"]["eot"] == 1
    assert card["defense"]["name"] == kind and card["defense"]["draws"] == (4 if random else 1)
    assert (card["defense"]["eot_cosine"] is not None) == random and (card["defense"]["gate_rates"] is not None) == (kind == "gated")
    assert card["seeds"]["scoring"] == (0 if random else None) and card["verdict"]["status"] == "unchecked"
    told = figures(card)
    assert told["adaptive"]["accuracy"] <= told["oblivious"]["accuracy"] + (0.1 if random else 0) and told["adaptive"]["n"] == 40


def test_the_full_protocol_runs_every_attack_on_all_images(model, data, tmp_path):
    """Three losses for B and C, every weight for D, Square from the image and from the best point; its union has E and all images."""
    cell = cell_for(defended(model, pixels=gated_blur(0.15, 0.02)), data, "adaptive", n=12, eps=0.004)
    card = evaluate(cell, tmp_path)
    informed = [f"{way}_apgd_{loss}" for way in "bc" for loss in ("ce", "margin", "t")]
    assert list(card["per_attack"]) == ["a_apgd_ce", "a_apgd_t", *informed, "d_gate", "e_square", "e_square_on"]
    told, seen = figures(card), verdicts_of(cell, tmp_path)
    left = int((seen["selection"][:, :3].min(1) > 0).sum())
    assert told["adaptive"]["n"] == 12 and left > 0 and {attack["n"] for attack in card["attacks"][2:]} == {left}
    assert told["pilot"]["swept"] is None and "with_queries" not in told and {attack["restarts"] for attack in card["attacks"]} == {1, 5}


def test_the_adaptive_figure_is_below_the_oblivious_one_where_attacks_that_know_the_defence_find_more(model, data, tmp_path):
    """Rounding to four grey levels stops images made against the plain model, not those made through it."""
    card = evaluate(cell_for(defended(model, pixels=grey_levels(3)), data, eps=0.02), tmp_path)
    told = figures(card)
    assert told["adaptive"]["accuracy"] == card["robust_accuracy"] < told["oblivious"]["accuracy"] and told["broke"]["b_pgd_margin"] > 0
    assert sum(told["worst"].values()) + told["unbroken"] == 40 and told["undefended"]["accuracy"] < told["undefended_clean"]["accuracy"]


def test_oblivious_is_the_first_round_of_adaptive_and_is_never_believed(model, data, tmp_path):
    """The same points of A; E33 says that it does not know the defence; also for a random model."""
    for name, stage in (("blur", blurred()), ("noise", noisy(0.02))):
        cells = [cell_for(defended(model, name, pixels=stage), data, protocol) for protocol in ("oblivious", "adaptive_small")]
        alone, whole = (evaluate(cell, tmp_path, name) for cell in cells)
        assert figures(alone)["oblivious"] == figures(whole)["oblivious"] and "adaptive" not in figures(alone)
        assert alone["verdict"] == {"status": "suspect", "failed_checks": ["E33"]} and "does not know" in figures(alone)["words"]
        assert alone["robust_accuracy"] == figures(alone)["oblivious"]["accuracy"]
    with pytest.raises(ConfigError, match="leave out largest_first"):
        replace(cells[0], survivors=Survivors("x", 1.0, frozenset()))
    with pytest.raises(ConfigError, match="leave out keep_images"):
        evaluate(cells[0], tmp_path, keep_images=True)


@pytest.mark.parametrize("name", ["oblivious", "adaptive_small", "adaptive"])
def test_a_model_without_stages_has_no_adaptive_attack(model, data, name):
    """A clear error before anything is measured; so for something that knows of no stages, or that does not say what defends it."""
    with pytest.raises(ConfigError, match="declares no stages.*apgd or strict"):
        cell_for(model, data, name, quick=False)
    silent = Made(model, Stages(blurred()))
    silent.defense_told = None
    with pytest.raises(ConfigError, match="declares stages but no defense"):
        cell_for(silent, data, name, quick=False)


def test_the_sweep_tries_every_weight_and_the_best_goes_on(model, data, tmp_path):
    """On the first images alone where a sweep is asked for; the pilot says what each weight left."""
    cell = cell_for(defended(model, pixels=gated_blur(0.15)), data, sweep=2)
    told = figures(evaluate(cell, tmp_path))["pilot"]
    assert set(told["swept"]) == {"alternating", *(f"{weight:g}" for weight in WEIGHTS if weight is not None)}
    best = "alternating" if told["weight"] is None else f"{told['weight']:g}"
    assert told["swept"][best] == min(told["swept"].values())
    seen = verdicts_of(cell, tmp_path)
    gate = 1 + [move.name for move in cell.moves].index("d_gate")
    left = np.flatnonzero(seen["selection"][:, :3].min(1) > 0)
    assert len(left) > 2 and not np.isnan(seen["selection"][left, gate]).any()


def test_a_union_is_over_images_that_saw_every_attack(model, data, tmp_path):
    """B to D on the first three that A left: the union's n goes up to the fourth, and the undefended figure beside it has the same n."""
    cell = cell_for(defended(model, pixels=blurred()), data, left=3)
    card = evaluate(cell, tmp_path)
    told, seen = figures(card), verdicts_of(cell, tmp_path)
    open_rows = np.flatnonzero(seen["selection"][:, :3].min(1) > 0)
    assert robust_n(card) == number_of("m", card, "robust").n == open_rows[3] < number_of("m", card, "clean").n == 40, "as it is shown"
    assert told["adaptive"]["n"] == open_rows[3] == told["undefended_there"]["n"] == told["gain"]["n"]
    assert told["oblivious"]["n"] == 40 and told["per_attack"]["b_pgd_margin"]["n"] == 3
    worst = np.nanmin(seen["selection"][: open_rows[3], :5], axis=1)
    assert told["adaptive"]["accuracy"] == pytest.approx(worst.mean())
    assert rows_decided(seen, 3, [int(row) for row in open_rows], len(open_rows)) == 40


def numbers_of(monkeypatch):
    """Notes the number of every draw that a noise stage reads, by purpose."""
    noted = {"scoring": set(), "selection": set(), "attack": set()}
    inner = noisy(0.02).run

    def run(x, draw):
        noted[list(noted)[draw.number // DRAWS_A_PURPOSE - 1]].add(draw.number)
        return inner(x, draw)

    return noted, Stage(run, random=True)


def test_attack_selection_and_scoring_draws_never_meet(model, data, tmp_path, monkeypatch):
    """As many of the last two as the plan says, whatever the attack threw."""
    noted, stage = numbers_of(monkeypatch)
    evaluate(cell_for(defended(model, pixels=stage), data, n=12), tmp_path)
    assert len(noted["scoring"]) == 4 and len(noted["selection"]) == 3 and len(noted["attack"]) > 100


def test_an_image_is_chosen_by_some_draws_and_judged_by_others(model, data, tmp_path):
    """The headline is the mean of the scoring draws at the candidate that the selection draws name; strict <= mean <= 1."""
    cell = cell_for(defended(model, pixels=noisy(0.05)), data)
    told, seen = figures(evaluate(cell, tmp_path)), verdicts_of(cell, tmp_path)
    chosen = np.nanargmin(seen["selection"][:, :5], axis=1)
    scores = seen["score"][np.arange(40), chosen]
    assert told["adaptive"]["accuracy"] == pytest.approx(scores.mean())
    assert told["adaptive"]["majority"] == pytest.approx((scores > 0.5).mean()) and told["adaptive"]["strict"] == (scores == 1).mean()
    assert set(np.unique(scores * 4)) <= set(range(5)) and 0 < ((scores > 0) & (scores < 1)).sum()


def same(a, b):
    """Equal to the bit."""
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def precise(make):
    """Model and data in float64."""
    model = make[0]().double()
    data = make[1](make[0](), n=24)
    return model, replace(data, images=data.images.double())


@pytest.mark.parametrize("stage", [noisy(0.03), gated_blur(0.15, 0.02), blurred()], ids=["noise", "random gate", "blur"])
def test_batches_processes_and_kills_change_no_verdict(stage, make, tmp_path):
    """In float64 every column is the same: batches of 5 or 24, one process or three, run through or killed in either round."""
    model, data = precise(make)
    cell = cell_for(defended(model, pixels=stage), data, sweep=2)
    whole = evaluate(cell, tmp_path / "whole", batch_size=24)
    texts = []

    def stop(text):
        texts.append(text)
        raise KeyboardInterrupt

    for _ in range(12):
        try:
            evaluate(cell, tmp_path / "cut", batch_size=5, log=stop)
        except KeyboardInterrupt:
            continue
    assert any("first round" in text for text in texts) and any("second round" in text for text in texts)
    made = [evaluate(cell, tmp_path / "many", batch_size=7, place=Place(rank, 3)) for _ in range(2) for rank in (2, 1, 0)]
    assert made[0] is None and made[-1] is not None
    for out in ("cut", "many"):
        one, other = verdicts_of(cell, tmp_path / "whole"), verdicts_of(cell, tmp_path / out)
        assert one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
        assert not any((tmp_path / out / "parts").iterdir())
    assert figures(made[-1]) == figures(whole) and made[-1]["attacks"] == whole["attacks"]


def test_a_cell_is_of_its_defence_and_an_undefended_one_keeps_its_id(model, data):
    """Name and settings are in the hash; the id of an undefended cell is what it was before there were defences."""
    base = cell_for(Made(model, Stages(blurred()), "blur", side=3), data, quick=False)
    for changed in (Made(model, Stages(blurred()), "other", side=3), Made(model, Stages(blurred()), "blur", side=5)):
        assert cell_for(changed, data, quick=False).id != base.id
    assert cell_for(Made(model, Stages(blurred()), "blur", side=3), data, quick=False).id == base.id
    assert cell_for(Made(model, Stages(blurred()), "blur", side=3), data, quick=False, eps=0.01).id != base.id
    old = Cell(model, first(data, 10), plan("apgd", eps="2/255", steps=5, targets=2, classes=5))
    assert old.id == "ad87676e58f6b3ef"


def test_a_defence_helps_only_beyond_its_interval():
    """Paired differences on the same images: a clear gain, none, a loss, and too few images."""
    def said(differences):
        told = gain(np.array(differences, dtype=float))
        return told["helps"], words({"gain": told}, "adaptive").split(":")[0]

    assert said([1] * 10 + [0] * 190) == (True, "helps") and said([1] * 3 + [-1] * 2 + [0] * 195) == (False, "does not help")
    assert said([-1] * 20 + [0] * 180) == (False, "harms") and said([0] * 200) == (False, "does not help")
    assert said([1] * 50)[0] is None and "too few" in said([1] * 50)[1]
    told = gain(np.array([1.0] * 30 + [0.0] * 70))
    assert told["low"] < told["mean"] == 0.3 < told["high"] and told["low"] == pytest.approx(0.3 - 1.96 * (0.21 / 100) ** 0.5, abs=0.02)


def test_queries_that_find_more_than_gradients_make_a_card_suspect(model, data, tmp_path):
    """E18 and E10: a stage that declares itself differentiable and has no gradient to speak of."""
    hiding = Stage(lambda x, draw: (x * 255).round() / 255, differentiable=True)
    both = Stages(hiding, Stage(lambda z, x, draw: z.detach() + 0 * z))
    model = Made(model, both, "hiding")
    cell = cell_for(model, data, eps=0.03)
    moves = tuple(move for move in cell.protocol.attacks if move.way in ("through", "queries"))
    card = evaluate(replace(cell, protocol=replace(cell.protocol, attacks=moves)), tmp_path)
    assert {"E10", "E18"} <= set(card["verdict"]["failed_checks"]) and card["defense"]["zero_gradient_fraction"] == 1


def test_the_dear_checks_make_a_figure_reliable_or_say_why_not(model, data, tmp_path):
    """Blur passes; a stage that hides its gradient fails at 32/255; a finished card is doubted again where more is asked."""
    cell = cell_for(defended(model, pixels=blurred()), data, eps=0.02)
    assert evaluate(cell, tmp_path)["verdict"]["status"] == "unchecked"
    card = evaluate(cell, tmp_path, checks=9)
    assert card["verdict"] == {"status": "reliable", "failed_checks": []} and card["metrics"]["checks"]["images"] == 9
    assert evaluate(cell, tmp_path, checks=5) == card
    hiding = Made(model, Stages(Stage(lambda x, draw: x.detach() + 0 * x)), "hiding")
    cell = cell_for(hiding, data, eps=0.02)
    moves = tuple(move for move in cell.protocol.attacks if move.way == "through")
    card = evaluate(replace(cell, protocol=replace(cell.protocol, attacks=moves)), tmp_path / "b", checks=20)
    assert {"E10", "E21"} <= set(card["metrics"]["checks"]["failed"])


def test_a_card_says_on_how_many_images_the_dear_checks_were_made(model, data, tmp_path, monkeypatch):
    """Those that are right, not those that were asked for; below four the checks cannot fail, and make nothing reliable."""
    def card_of(n):
        """Checked on a hundred, if there were as many."""
        cell = cell_for(defended(model, pixels=Stage(lambda x, draw: 0.9 * x + 0.05)), data, n=n, eps=0.02)
        return cell, evaluate(cell, tmp_path, checks=100), int(verdicts_of(cell, tmp_path)["clean"].sum())

    cell, card, right = card_of(12)
    assert card["metrics"]["checks"]["images"] == right > 3 and card["verdict"]["status"] != "unchecked"
    monkeypatch.setattr(rounds, "sane", lambda *given: pytest.fail("all there are were looked at"))
    assert evaluate(cell, tmp_path, checks=200) == card
    _, card, right = card_of(3)
    assert 0 < right < 4 and card["metrics"]["checks"]["images"] == 0 and card["verdict"]["status"] == "unchecked"


def test_a_batch_coupled_stage_makes_a_card_suspect(model, data, tmp_path):
    """E8, as it is declared."""
    stage = Stage(lambda x, draw: (x - x.mean(0) + 0.5).clamp(0, 1), batch_coupled=True)
    assert "E8" in evaluate(cell_for(defended(model, pixels=stage), data, n=10), tmp_path)["verdict"]["failed_checks"]


def test_a_capped_number_of_draws_is_said(model, data, tmp_path):
    """E32, with the cosine that was reached; where the plan lengthens, the attack takes more steps."""
    cell = cell_for(defended(model, pixels=noisy(0.3)), data, n=16, most_draws=2)
    card = evaluate(cell, tmp_path)
    assert card["defense"]["eot_cosine"] < 0.9 and "E32" in card["verdict"]["failed_checks"]
    judge = DefendedJudge(cell_for(defended(model, pixels=noisy(0.3)), data, n=16, most_draws=2, lengthen=3))
    seen = []
    objective = judge.objective
    judge.objective = lambda *given: seen.append(given) or objective(*given)
    pilot, _ = judge.pilot([0, 1, 2], [0])
    judge._run(judge.of_way("bpda")[0], judge.show([0]), pilot)
    assert seen[-1][3] == 2 and seen[-1][5] == 3 * 6 + 1


def test_ordinary_protocols_run_on_a_random_model_and_are_not_believed(model, data, tmp_path):
    """Each forward has new draws; E6 and E33 say what it is worth."""
    noise = defended(model, pixels=noisy(0.02))
    for name in ("pgd", "autoattack_rand"):
        card = evaluate(Cell(noise, first(data, 8), plan(name, eps=EPS, steps=3, targets=2, classes=5)), tmp_path)
        assert card["robust_accuracy"] <= card["clean_accuracy"] and {"E6", "E33"} <= set(card["verdict"]["failed_checks"])
        assert card["defense"] == {**dict.fromkeys(cards.BLOCKS["defense"]), "name": "made", "settings": {}}


def test_the_points_of_a_are_made_once_for_all_defences_of_a_model(model, data, make, tmp_path, monkeypatch):
    """A second defence takes them from the first, and finds what it finds alone; other weights, radii and seeds have their own."""
    made = []
    search = APGD.run
    monkeypatch.setattr(APGD, "run", lambda self, objective, x, *more: made.append(len(x)) or search(self, objective, x, *more))
    cells = {name: cell_for(defended(model, name, pixels=stage), data, "oblivious") for name, stage in
             (("blur", blurred()), ("noise", noisy(0.02)))}  # fmt: skip
    evaluate(cells["blur"], tmp_path, "blur", batch_size=15)
    first_time = sum(made)
    made.clear()
    evaluate(cells["noise"], tmp_path, "noise", batch_size=7)
    assert sum(made) < first_time / 4, "but those that the first defence alone got wrong"
    shared = verdicts_of(cells["noise"], tmp_path, "noise")
    evaluate(cells["noise"], tmp_path / "alone", "noise")
    alone = verdicts_of(cells["noise"], tmp_path / "alone", "noise")
    assert all(same(shared[name], alone[name]) for name in shared)
    ids = {transfer_id(cell, move) for cell in cells.values() for move in cell.moves}
    assert len(ids) == len(list((tmp_path / "transfer").iterdir())) == 2
    (weights, _), blur = make, blurred()
    others = [cell_for(defended(weights(seed=3), "blur", pixels=blur), data, "oblivious"), replace(cells["blur"], seed=1),
              cell_for(defended(model, "blur", pixels=blur), data, "oblivious", eps=0.01),
              cell_for(defended(model, "blur", pixels=blur), data, "oblivious", n=30)]  # fmt: skip
    assert len(ids | {transfer_id(cell, move) for cell in others for move in cell.moves}) == 2 * (1 + len(others))


def test_of_the_kept_points_only_those_that_are_asked_for_are_read(model, data, tmp_path, monkeypatch):
    """A set may be larger than memory; and a file that somebody deletes is made again."""
    cell = cell_for(defended(model, "blur", pixels=blurred()), data, "oblivious")
    made, read = [], []

    def make(places):
        """One number an image."""
        made.append(len(places))
        return torch.full((len(places), 3, 6, 6), float(len(made)))

    kept = Transferred(tmp_path)
    for rows in ([0, 1], [2, 3], [4, 5]):
        kept.of(cell, cell.moves[0], rows, make)
    arrays = cards.read_arrays
    monkeypatch.setattr(cards, "read_arrays", lambda *given: read.append(found := arrays(*given)) or found)
    assert kept.of(cell, cell.moves[0], [3, 4], make)[:, 0, 0, 0].tolist() == [2, 3] and made == [2, 2, 2]
    assert sum("points" in one for one in read) == 2, "two of three files"
    paths = sorted(next(tmp_path.iterdir()).iterdir())
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [*paths, self / "part-gone.npz"])
    assert kept.of(cell, cell.moves[0], [0], make)[:, 0, 0, 0].tolist() == [1]
