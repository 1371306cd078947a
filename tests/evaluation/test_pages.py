"""Laws of the page: every card's number with n, error and verdict; nothing from the network; Markdown and CSV say the same."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from aft.evaluation import zero_shot
from aft.evaluation.collect import collect
from aft.evaluation.compare import compare
from aft.evaluation.pages import Content, build, write_report
from aft.evaluation.pages.examples import Example, Examples, Picture
from aft.evaluation.pages.tables import MARKS, anchor, groups_of, metrics_of
from aft.evaluation.report import write_csv
from tests.made_up_cards import HASH, made_up, stored

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "link", "input", "br", "img"}
SVG = {"line", "path"}


class Page(HTMLParser):
    """A page as elements: every tag is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.ids: list[str] = []
        self.inside: list[str | None] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        told = dict(attrs)
        self.elements.append((tag, told))
        if "id" in told:
            self.ids.append(told["id"])
        if tag not in VOID:
            self.open.append(tag)
            self.inside.append(told.get("id"))

    def handle_startendtag(self, tag, attrs):
        assert tag in SVG
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.inside.pop()

    def handle_data(self, data):
        for name in filter(None, self.inside):
            self.texts[name] = self.texts.get(name, "") + data

    def all(self, tag, **wanted):
        return [told for name, told in self.elements if name == tag and all(told.get(key) == value for key, value in wanted.items())]


@pytest.fixture
def folder(tmp_path):
    """Two models on two data sets at two radii, and clean; a suspect, an external and an unchecked figure among them."""
    for label, robust in (("before", 0.125), ("after", 0.375)):
        for data in ("toy", "else"):
            for eps in (1, 2):
                sha = {"before": "a", "after": "b"}[label] * 64
                stored(tmp_path, label, made_up(0.5, robust / eps, eps / 255, data=data, sha256=sha, n=200))
        stored(tmp_path, label, made_up(0.515, None, sha256=sha, n=1000))
    doubt = {"status": "suspect", "failed_checks": ["E15", "E2"]}
    words = {"checks": {"images": 64, "made": ["E2", "E15"], "failed": {"E15": "six times the steps break 7 more"}}}
    odd = {"verdict": doubt, "metrics": words, "dirty": True, "command": "python eval.py <odd> & 'more'"}
    stored(tmp_path, "odd", made_up(0.25, 0.2, sha256="c" * 64, **odd))
    stored(tmp_path, "told", made_up(0.75, 0.5, sha256="d" * 64, external={"robust_accuracy": 0.1, "source": "Somebody, 2026"},
                                     verdict={"status": "unchecked", "failed_checks": []}))  # fmt: skip
    return tmp_path


@pytest.fixture
def found(folder):
    """Its cards."""
    return collect([folder])


def page_of(found, **more):
    """The page, parsed, and its text."""
    text = build.page_of(Content(found, **more))
    return Page(text), text


def test_every_card_is_told_with_all_that_belongs_to_its_numbers(found):
    """Number, error, n, verdict, attacks, command, commit, dirty flag, versions and hashes, where its anchor is."""
    page, _ = page_of(found)
    for label, card in found.labelled:
        told = " ".join(page.texts[anchor(label, card)].split())
        share, error, n = card["clean_accuracy"], card["standard_error"]["clean"], card["data"]["n"]
        assert f"{100 * share:.2f} ± {100 * error:.2f} %, n = {n:,}, {card['verdict']['status']}" in told
        if card["robust_accuracy"] is not None:
            assert f"{100 * card['robust_accuracy']:.1f} ±{100 * card['standard_error']['robust']:.1f}" in told and "100 steps" in told
        for needed in (card["command"], card["commit"], card["model"]["sha256"], card["data"]["index_sha256"], "python 3", card["cell"]):
            assert needed in told
        assert ("with local changes (dirty)" in told) == card["dirty"]
    odd = " ".join(page.texts[anchor("odd", dict(found.labelled)["odd"])].split())
    assert "suspect E15 E2" in odd and "six times the steps break 7 more" in odd


def test_no_number_of_a_table_without_its_verdict_and_the_way_to_its_card(found):
    """Each figure's tip has n, error and verdict, it is followed by a verdict for the eye and for the ear, and all but means are links."""
    _, text = page_of(found)
    numbers = re.findall(r'<(a class="how" href="#card-\w+"|span) title="([^"]*)">[^<]*<span class="pm">±[^<]*</span></(?:a|span)> '
                         r'<b class="(\w+)" aria-hidden="true">(.)</b><span class="unseen">(\w+)</span>', text)  # fmt: skip
    groups = groups_of(found.labelled)
    shown = [row for group in groups for row in group.rows] + [row for _, row in build.facts_of(Content(found))["ours"]]
    assert len(numbers) == text.count('<span class="pm">') == sum(len(row.numbers) for row in shown)
    assert {verdict for _, _, verdict, _, _ in numbers} == set(MARKS)
    for _, tip, verdict, mark, said in numbers:
        assert mark == MARKS[verdict] and said == verdict and verdict in tip and re.search(r"± \d+\.\d\d %, n = [\d,]+", tip)


def test_the_page_needs_no_network_and_no_script_to_be_read(found):
    """Sources are data; links to elsewhere are plain links to sources; every other link has its target on the page; ids are unique."""
    page, text = page_of(found)
    for _, told in page.elements:
        for key in ("src", "srcset", "data", "action", "poster", "xlink:href"):
            assert str(told.get(key, "data:")).startswith("data:")
    assert [told["href"] for told in page.all("link")] == ["data:,"]
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(|sendBeacon", text)
    sources = {table["url"] for table in build.literature()["tables"]}
    outside = {told["href"] for told in page.all("a") if not told["href"].startswith("#")}
    assert outside == sources and len(page.ids) == len(set(page.ids))
    assert {told["href"][1:] for told in page.all("a") if told["href"].startswith("#")} <= set(page.ids)
    assert "default-src 'none'" in page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert page.all("form", **{"class": "bar"})[0].keys() == {"class", "hidden"}


def test_tables_can_be_sorted_by_what_is_meant_and_heard(found):
    """Cells carry unrounded values; verdicts sort by how bad they are; heads have a scope and say how they are sorted; captions stand."""
    page, text = page_of(found)
    values = {float(told["data-sort"]) for told in page.all("td") if told.get("data-sort")}
    for _, card in found.labelled:
        assert card["clean_accuracy"] in values and card["data"]["n"] in values
        assert card["robust_accuracy"] is None or (card["external"] or card)["robust_accuracy"] in values
    for verdict, place in (("suspect", "0"), ("unchecked", "1"), ("reliable", "2")):
        assert set(re.findall(rf'<td class="{verdict}" data-sort="(\d)">', text)) == {place}
    heads = page.all("th")
    assert heads and all(told.get("scope") in ("col", "row", "rowgroup") for told in heads)
    assert text.count("<caption>") == text.count("<table ") and text.count('aria-sort="none"') == text.count("<button type=")
    rows = [told for told in page.all("tr") if "data-verdict" in told]
    assert {told["data-verdict"] for told in rows} == set(MARKS)
    assert {told["data-data"] for told in rows} == {"toy", "else", "mean of 2 sets"}


def test_external_and_failed_figures_are_marked_with_their_source_and_reason(found):
    """The lower number in the table, ours beside it; the check's words, not its number alone."""
    _, text = page_of(found)
    assert "10.0 <span class=\"pm\">±3.0*</span>" in text
    body = re.sub(r"<[^>]+>", " ", text)
    assert "measured here 50.0 ±5.0, from outside 10.0. Source: Somebody, 2026" in " ".join(body.split())
    assert "six times the steps break 7 more" in body and "E2" in body and "see docs/checks.md" in body


def test_what_a_card_says_is_text_and_no_markup(tmp_path):
    """Labels, commands and sources come from files of others."""
    evil = made_up(command="<script>alert(1)</script>", external={"robust_accuracy": 0.1, "source": '"><img src=http://x>'})
    stored(tmp_path, "<b>m", evil)
    page, text = page_of(collect([tmp_path]))
    assert "<script>alert" not in text and len(page.all("script")) == 1 and not page.all("img")


def test_cards_that_are_not_shown_are_counted_on_all_outputs(folder, capsys):
    """On the page, in Markdown and on screen."""
    path = next(folder.rglob("*.json"))
    path.with_name("cut.json").write_text("{")
    content = Content(collect([folder]))
    build.again(content, folder / "out")
    for text in ((folder / "out" / "report.html").read_text(), (folder / "out" / "report.md").read_text(), capsys.readouterr().out):
        assert "cut.json" in text and "half written" in text
    assert "<strong>1 card could not be shown.</strong>" in (folder / "out" / "report.html").read_text()


def test_markdown_and_csv_agree_with_the_cards(found, tmp_path):
    """Each row of the page's tables is a row of the Markdown; each card is a line of the CSV."""
    written = write_report(Content(found), tmp_path / "out")
    text = written["markdown"].read_text()
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    for group in groups_of(found.labelled):
        for row in group.rows:
            place = [row.label, row.data, row.protocol, f"{row.n:,}"]
            (line,) = [cells for cells in lines if len(cells) > 6 and [cells[0], *cells[2:4], cells[5]] == place]
            assert line[4].split()[0] == row.verdict and line[6] == f"{row.clean.text} {row.clean.mark}"
            for eps, cell in zip(group.columns, line[7:], strict=False):
                assert cell == (f"{row.robust[eps][0].text} {row.robust[eps][0].mark}" if eps in row.robust else "-")
    rows = {row["cell"]: row for row in csv.DictReader(written["table"].open())}
    for _, card in found.labelled:
        shown = (card["external"] or card)["robust_accuracy"]
        line = rows[card["cell"]]
        assert line["robust_accuracy"] == ("" if shown is None else str(shown)) and line["n"] == str(card["data"]["n"])


def test_the_same_cards_give_the_same_page(found, monkeypatch):
    """Byte for byte, and the page says its size."""
    first, again = (build.page_of(Content(found)) for _ in range(2))
    assert first == again
    said = re.search(r"Size: ([\d,]+) kB", first)[1]
    assert abs(int(said.replace(",", "")) - len(first.encode()) / 1000) <= 1


def test_other_tasks_norms_and_figures_have_tables_of_their_own(tmp_path):
    """One table a task and threat; radii of L2 and L1 are no grey levels; figures such as recall and ECE come with their n and error."""
    stored(tmp_path, "m", made_up())
    stored(tmp_path, "m", made_up(eps=0.5, norm="l2"))
    stored(tmp_path, "m", made_up(eps=12.0, norm="l1"))
    at_5 = {"clean": 0.875, "clean_standard_error": 0.03, "attacked": 0.5, "attacked_standard_error": 0.06}
    recall = {"recall": {way: {"recall_at_5": at_5, "n": n} for way, n in (("image_to_text", 60), ("text_to_image", 90))},
              "calibration": {"bins": 15, "clean": 0.062, "attacked": None, "n": 100},
              "attack_success": {"drop": 0.25, "of_right": 0.5}, "per_class": {"cat": {"n": 1, "clean_accuracy": 1.0}}}  # fmt: skip
    stored(tmp_path, "m", made_up(task="retrieval", chance=None, metrics=recall))
    found = collect([tmp_path])
    told = {group.title: (list(group.columns), group.unit) for group in groups_of(found.labelled)}
    assert told == {
        "classification, L-inf on native pixels": (["2/255"], "1/255"), "classification, L1 on native pixels": (["12 l1"], "pixel range"),
        "classification, L2 on native pixels": (["0.5 l2"], "pixel range"), "retrieval, L-inf on native pixels": (["2/255"], "1/255"),
    }  # fmt: skip
    figures = [(one.name, one.value, one.error, one.n) for one in metrics_of(found.labelled)]
    assert figures == [
        ("recall image to text recall at 5 clean", 0.875, 0.03, 60), ("recall image to text recall at 5 attacked", 0.5, 0.06, 60),
        ("recall text to image recall at 5 clean", 0.875, 0.03, 90), ("recall text to image recall at 5 attacked", 0.5, 0.06, 90),
        ("calibration clean", 0.062, None, 100),
    ]  # fmt: skip
    page, text = page_of(found)
    assert "none on the card" in text and all(title in text for title in told) and page.all("svg")


def test_tuned_class_texts_stand_beside_the_method(tmp_path):
    """A figure of a model that reads other texts says so, on the page and in the CSV."""
    card = made_up(method="tima")
    stored(tmp_path, "tuned", {**card, "model": {**card["model"], "text_transform": "residual"}})
    found = collect([tmp_path])
    assert [row.method for group in groups_of(found.labelled) for row in group.rows] == ["tima (class texts: residual)"]
    (line,) = csv.DictReader(write_csv(found.labelled, tmp_path / "x.csv").open())
    assert (line["method"], line["text_transform"]) == ("tima", "residual")
    assert "tima (class texts: residual)" in page_of(found)[1]


def test_the_mean_is_over_the_same_zero_shot_sets_for_all(tmp_path, monkeypatch):
    """Sets that were trained on do not count; a model that lacks a set has no mean; the verdict is the worst, the error that of a mean."""
    for data, robust, n in (("toy", 0.2, 100), ("else", 0.4, 400), ("seen", 0.9, 100)):
        doubt = {"status": "unchecked" if data == "else" else "reliable", "failed_checks": []}
        stored(tmp_path, "whole", made_up(0.5, robust, data=data, n=n, verdict=doubt))
    stored(tmp_path, "part", made_up(data="toy", sha256="e" * 64))
    (group,) = groups_of(collect([tmp_path]).labelled, ["seen"])
    (mean,) = [row for row in group.rows if row.over]
    (number,) = mean.robust["2/255"]
    assert (mean.label, mean.over, mean.n, mean.verdict) == ("whole", ("else", "toy"), 500, "unchecked")
    assert number.share == pytest.approx(0.3)
    assert number.error == pytest.approx(((0.2 * 0.8 / 100 + 0.4 * 0.6 / 400) ** 0.5) / 2)
    assert "seen left out" in group.notes[0]
    monkeypatch.setitem(zero_shot.PRETRAINED_ON, HASH, ("seen",))
    assert groups_of(collect([tmp_path]).labelled) == [group]
    (alone,) = groups_of(collect([tmp_path]).labelled, ["seen", "else"])
    assert not any(row.over for row in alone.rows) and alone.notes == []


def test_two_cards_of_one_place_that_differ_in_attack_are_both_shown(tmp_path):
    """Steps make another row, another seed another number of the same row."""
    stored(tmp_path, "m", made_up(robust=0.25))
    stored(tmp_path, "m", made_up(robust=0.26, seeds={"attack": 1, "selection": 0, "scoring": None}))
    stored(tmp_path, "m", made_up(robust=0.27, steps=20))
    (group,) = groups_of(collect([tmp_path]).labelled)
    assert sorted(sorted(number.share for number in row.robust["2/255"]) for row in group.rows) == [[0.25, 0.26], [0.27]]


def test_the_radii_of_one_attack_are_one_row(tmp_path):
    """PGD's step is a share of its radius: it must not split the row."""
    for eps, step_size in ((1 / 255, 0.0005), (2 / 255, 0.001)):
        card = made_up(eps=eps, protocol="pgd")
        card["attacks"][0]["step_size"] = step_size
        stored(tmp_path, "m", card)
    (group,) = groups_of(collect([tmp_path]).labelled)
    (row,) = group.rows
    assert set(row.robust) == {"1/255", "2/255"}


def test_published_figures_have_protocol_and_source_and_are_set_apart():
    """Every table of others says tower, attack, pixels, images, source; what docs/methods.md tells of them is among them."""
    told = build.literature()
    assert "cannot be compared" in (build.HERE / "page.html.jinja").read_text() and len(told["reasons"]) >= 8
    pairs = set()
    for table in told["tables"]:
        assert all(table[name] for name in ("by", "tower", "attack", "pixels", "sets", "source")) and table["url"].startswith("https://")
        assert table["read"] in ("source", "summary") and table["figures"], table
        for one in table["figures"]:
            assert one["robust"].keys() <= set(build.RADII) and all(0 <= value <= 100 for value in one["robust"].values())
            pairs |= {(value, -1.0 if one["clean"] is None else one["clean"]) for value in one["robust"].values()}
    rows = re.findall(r"^\|[^|]*\| (\d+\.\d) / (\d+\.\d|not read)[^|]*\|(.*)\|$", (ROOT / "docs" / "methods.md").read_text(), re.MULTILINE)
    read = [(float(robust), -1.0 if clean == "not read" else float(clean)) for robust, clean, rest in rows if "not checked" not in rest]
    assert len(read) >= 8
    for robust, clean in read:
        assert any(abs(robust - ours[0]) < 0.051 and abs(clean - ours[1]) < 0.051 for ours in pairs), (robust, clean)


def test_a_comparison_is_shown_with_its_rule(found, folder, tmp_path):
    """Counts, before, after, difference, paired or not."""
    stored(tmp_path / "old", "after", made_up(0.5, 0.1, 1 / 255, data="toy", n=200))
    content = Content(found, comparison=compare(found, collect([tmp_path / "old"])), against="old")
    page, text = build.page_of(content), build.markdown.text_of(build.facts_of(content))
    words = " ".join(re.sub(r"<[^>]+>", "", page).split())
    assert Page(page).texts["against"].strip() == "Against old"
    assert "1 better, 0 worse, 1 within the error, 0 the same." in words and "the difference is beyond 2 of its standard errors" in words
    assert "| after | toy all, apgd 1/255 | robust | better | 10.0 ±2.1 ✓, n = 200 | 37.5 ±3.4 ✓, n = 200 | 27.5 ±4.0 (unpaired) |" in text


def test_a_page_that_is_too_large_leaves_its_examples_out_and_says_so(found, monkeypatch):
    """The rest is the same."""
    of_model = Examples("m", "how", ["before"], [Example("cat", "cat", "dog", False, [Picture("data:image/png;base64,AAAA", "before")])])
    with_pictures = build.page_of(Content(found, examples=[of_model]))
    assert "data:image/png;base64,AAAA" in with_pictures and "broken" in with_pictures and "Left out" not in with_pictures
    monkeypatch.setattr(build, "LARGEST_PAGE", 1000)
    without = build.page_of(Content(found, examples=[of_model]))
    assert "data:image/png" not in without and "Left out: with them this page would be larger than 2 MB" in without


@pytest.mark.parametrize(("clean", "robust"), [(0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.004, 0.004)])
def test_pictures_stand_at_the_edge(clean, robust, tmp_path):
    """All broken, all right, next to nothing: axes are no points, and all lies inside them."""
    from aft.evaluation.pages import charts

    stored(tmp_path, "m", made_up(clean, robust))
    (group,) = groups_of(collect([tmp_path]).labelled)
    models = [charts.model_key(group.rows[0])]
    for panel in charts.curves(group, models) + charts.clean_and_robust(group, models):
        assert len(panel.x_ticks) >= 2 and len(panel.y_ticks) >= 3
        for line in panel.lines:
            for point in line.points:
                for x, y in ((point.x, point.y), *((x, y) for x1, y1, x2, y2 in point.bars for x, y in ((x1, y1), (x2, y2)))):
                    assert charts.LEFT - 0.01 <= x <= charts.WIDTH - charts.RIGHT + 0.01
                    assert charts.TOP - 0.01 <= y <= charts.HEIGHT - charts.BOTTOM + 0.01


def test_points_of_pictures_stand_where_their_numbers_are(found):
    """Linear in eps and accuracy, inside the axes, with bars of one standard error and words with n and verdict; colours by model."""
    from aft.evaluation.pages import charts

    group = groups_of(found.labelled)[0]
    models = list(dict.fromkeys(charts.model_key(row) for row in group.rows))
    for panel in charts.curves(group, models) + charts.clean_and_robust(group, models):
        for line in panel.lines:
            for point in line.points:
                assert charts.LEFT <= point.x <= charts.WIDTH - charts.RIGHT and charts.TOP <= point.y <= charts.HEIGHT - charts.BOTTOM
                assert "n = " in point.words and any(verdict in point.words for verdict in MARKS) and point.bars
    (panel,) = [one for one in charts.curves(group, models) if one.title == "else"]
    ticks = {float(text): y for y, text in panel.y_ticks}
    line = panel.lines[[row.label for row in group.rows if row.data == "else"].index("before")]
    per_point = (ticks[0] - max(ticks.values(), key=lambda y: -y)) / max(ticks)
    assert [round((ticks[0] - point.y) / per_point, 3) for point in line.points] == [50, 12.5, 6.25]
    x0, x1, x2 = (point.x for point in line.points)
    assert x2 - x1 == pytest.approx(x1 - x0)
    x, low, _, high = line.points[1].bars[0]
    assert x == x1 and (low - high) / per_point == pytest.approx(200 * (0.125 * 0.875 / 200) ** 0.5)
