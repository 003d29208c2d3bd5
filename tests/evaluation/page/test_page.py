"""The page as a parser sees it: what it shows, what it must not hold, and what it does without."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mergebench.errors import RecipeError, RunError
from mergebench.evaluation import Results, page, save
from mergebench.evaluation.compare.comparison import compare
from mergebench.evaluation.page import flipped, layers, scores, searched
from mergebench.evaluation.page.sources import Sources
from mergebench.evaluation.tables.flips import difference_sheets
from mergebench.evaluation.tables.results import rows_of
from mergebench.evaluation.task import Item
from tests.conftest import Cli
from tests.evaluation.page import documents

VOID = {"meta", "br", "hr", "link", "img"}
HOSTILE = "</text></svg><script>alert(1)</script>$x_$ \"q\" 'a' {{ 7 * 7 }} & <b>"


class Tree(HTMLParser):
    """Elements, text by element, tables as rows of cells; refuses what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.tables: list[list[list[str]]] = []
        self.spanned = 0  # rows to come that begin with the cell above
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([self.tables[-1][-1][0]] if self.spanned else [])
            self.spanned = max(self.spanned - 1, 0)
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")
            self.spanned = int(dict(attrs).get("rowspan") or 1) - 1 if tag == "th" else self.spanned

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data
        if {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def tree_of(directory: Path) -> Tree:
    return Tree(page.write(directory).read_text(encoding="utf-8"))


def alone(directory: Path, name: str, document: Any) -> Path:
    """A directory with one document."""
    directory.mkdir(exist_ok=True)
    if isinstance(document, Results):
        save(document, directory)
    else:
        (directory / name).write_text(json.dumps(document))
    return directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that has everything, and its page."""
    directory = documents.write_all(tmp_path_factory.mktemp("page") / "merged")
    page.write(directory)
    return directory


def text_of(directory: Path) -> str:
    return (directory / "report.html").read_text(encoding="utf-8")


def test_everything_is_there(whole: Path) -> None:
    tree = Tree(text_of(whole))
    assert tree.texts["h1"] == tree.texts["title"] == ["merged: search"]
    assert tree.texts["h2"] == [
        "Results", "Task by task", "Across tasks", "Search", "Flips against base", "Layer by layer", "Provenance",
    ]  # fmt: skip
    results = Results.load(whole)
    rows = [[row.model, row.role, *(cell.text for cell in row.cells)] for row in rows_of(results)]
    assert [[cell.removesuffix(" ★") for cell in row] for row in tree.tables[0][1:]] == rows
    best = {cell.text for row in rows_of(results) for cell in row.cells if cell.best}
    assert {text for text in tree.texts["strong"] if "±" in text} == {f"{text} ★" for text in best if "±" in text}
    figures = [one for one in tree.all("div") if one.get("role") == "img"]
    kinds = [one.get("class") for one in figures]  # in thirds: three bars; full: the dots, and the last of three others
    assert (len(figures), kinds.count("third"), kinds.count("full")) == (3 + 1 + 3 + 2 + 3 + 2, 3, 3)
    assert len(tree.all("svg")) == len(figures) + 3 + 3
    assert all(one["aria-label"] for one in figures)
    assert all(one.get("scope") in ("col", "row") for one in tree.all("th"))
    levels = [name for name, _ in tree.tags if name in ("h1", "h2")]
    assert levels == ["h1"] + ["h2"] * 7


def test_one_file_that_asks_for_nothing(whole: Path) -> None:
    text = text_of(whole)
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<img|\bon[a-z]+=", text)
    assert set(re.findall(r"url\((?!#)|\bsrc=|href=\"(?!#)", text)) == set()
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', text)) == set(ids)
    assert not re.search(
        r"#[0-9a-f]{6}\b", "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    )  # all follow the theme


def test_equal_documents_equal_bytes(whole: Path, tmp_path: Path) -> None:
    again = page.write(documents.write_all(tmp_path / "merged"))
    assert again.read_bytes() == (whole / "report.html").read_bytes()


def test_flips_are_those_that_compare_counts(whole: Path) -> None:
    tree = Tree(text_of(whole))
    results = Results.load(whole)
    (table,) = (table for table in tree.tables if "NFR" in table[0])
    for model in ("pcb", "linear"):
        comparison = compare("base", model, results)
        found = {row[1]: row for row in table if row[0] == model}
        assert found.keys() == {*documents.TASKS, "pooled"}
        for pair in comparison.pairs:
            shares = [pair.flips.nfr, pair.flips.pfr, pair.flips.nfr_mc, pair.flips.btc, pair.flips.nfr_expected]
            assert found[pair.task][-5:] == [f"{100 * (share or 0):.1f}" for share in shares]
    listed = [row[2] for row in tree.tables[tree.tables.index(table) + 1][1:]]  # the merged model comes first
    pairs = compare("base", "pcb", results).pairs
    assert sorted(listed) == sorted(item for pair in pairs for item in (*pair.flips.lost, *pair.flips.won))


def test_the_tables_of_differences_are_those_of_the_terminal(whole: Path) -> None:
    """Against the base, and the merge against its best rival."""
    sheets = difference_sheets(Results.load(whole))
    assert [sheet.heads[:2] for sheet in sheets][-1] == ["model", "against the best other"]
    found = Tree(text_of(whole)).tables[1 : 1 + len(sheets)]
    assert found == [[list(sheet.heads), *([cell.text for cell in row] for row in sheet.rows)] for sheet in sheets]


def test_flipped_items_say_what_they_ask(tmp_path: Path) -> None:
    known = {f"t-{i}": Item(f"question <{i}> {'x' * 200}", None) for i in range(40)}
    results = replace(documents.results({"base": "base", "pcb": "merged"}, ("t",)), items={"t": known})
    tree = tree_of(alone(tmp_path / "e", "", results))
    (table,) = (table for table in tree.tables if "before" in table[0])
    assert table[0] == ["task", "", "item", "text", "before", "after"] and len(table) > 10
    for row in table[1:]:
        assert row[3].startswith(f"question <{row[2].removeprefix('t-')}> xx") and len(row[3]) == 120


def test_names_and_texts_are_shown_and_never_obeyed(tmp_path: Path) -> None:
    roles = {"base": "base", HOSTILE: "input", f"{HOSTILE}2": "merged"}
    results = documents.results(roles, (HOSTILE, "b\u0000$"), failed=[
        {"model": HOSTILE, "tasks": [HOSTILE], "error": HOSTILE, "hint": None}
    ])  # fmt: skip
    directory = alone(tmp_path / "<script>", "", results)
    document = documents.search()
    document["points"][0] |= {"values": {HOSTILE: HOSTILE}, "tasks": {HOSTILE: 1.0}}
    document["points"][-1]["error"] = HOSTILE
    alone(directory, "search.json", document)
    alone(directory, "mergebench.json", documents.provenance(notes=[HOSTILE], inputs=[{"file": HOSTILE}]))
    text = page.write(directory).read_text(encoding="utf-8")
    assert "Not drawn" not in text
    tree = Tree(text)
    assert not {"script", "b"} & {name for name, _ in tree.tags}
    assert "{{ 7 * 7 }}" in text
    assert "49" not in "".join(tree.texts["h2"])
    cells = {cell for table in tree.tables for row in table for cell in row}
    assert " ".join(HOSTILE.split()) in {" ".join(cell.split()) for cell in cells}


def test_long_lists_and_answers_are_cut(tmp_path: Path) -> None:
    results = documents.results({"base": "base", "pcb": "merged"}, ("t",), n=900)
    tree = tree_of(alone(tmp_path / "e", "", results))
    assert len(tree.tables[3]) == 1 + 200
    assert (tmp_path / "e" / "report.html").stat().st_size < 300_000


@pytest.mark.parametrize(
    ("name", "document", "titles"),
    [
        ("evaluation.json", documents.results({"a": "input"}, ("t",)), ["Results", "Task by task", "Provenance"]),
        ("evaluation.json", Results({"failed": [{"model": "a", "tasks": ["t"], "error": "e", "hint": "h"}]}, ()),
         ["Not measured", "Provenance"]),
        ("mergebench.json", documents.provenance(), ["Provenance"]),
        ("mergebench.json", {}, ["Provenance"]),
        ("search.json", documents.search(), ["Search", "Provenance"]),
        ("search.json", documents.search(1), ["Search", "Provenance"]),
        ("search.json", documents.search(2), ["Search", "Provenance"]),
        ("search.json", {"made": {}, "points": [], "best": None}, ["Provenance"]),
    ],
)  # fmt: skip
def test_a_section_stands_where_there_are_data(tmp_path: Path, name: str, document: Any, titles: list[str]) -> None:
    assert tree_of(alone(tmp_path / "d", name, document)).texts["h2"] == titles


def test_a_section_that_fails_says_so(tmp_path: Path) -> None:
    directory = alone(tmp_path / "d", "evaluation.json", documents.results(tasks=("t",)))
    alone(directory, "search.json", {"points": [{"number": 0, "objective": 1.0, "values": {}}], "best": 0})
    titles = tree_of(directory).texts["h2"]
    assert titles == ["Results", "Task by task", "Not drawn: searched", "Flips against base", "Provenance"]


def test_damaged_statistics_are_passed_over(tmp_path: Path) -> None:
    directory = alone(tmp_path / "d", "mergebench.json", documents.provenance())
    documents.profile().save(directory)
    assert "Layer by layer" in tree_of(directory).texts["h2"]
    (directory / "statistics.json").write_text('{"tensors": 1}')
    assert "Layer by layer" not in tree_of(directory).texts["h2"]


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_a_damaged_document_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "search.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"search\.json"):
        page.write(tmp_path)
    page.attempt(tmp_path)  # a run goes on without
    assert not (tmp_path / "report.html").exists()


def test_the_command(tmp_path: Path, cli: Cli) -> None:
    directory = alone(tmp_path / "d", "mergebench.json", documents.provenance())
    assert cli("report", directory) == (0, f"{directory}/report.html\n", "")
    ran = cli("report", directory, "--out", tmp_path / "new" / "p.html", "--json")
    assert (ran.code, json.loads(ran.out), ran.err) == (
        0,
        {"out": str(tmp_path / "new" / "p.html"), "figures": []},
        "",
    )
    assert (tmp_path / "new" / "p.html").read_bytes() == (directory / "report.html").read_bytes()
    for place, what in [(tmp_path / "none", "no such directory"), (tmp_path / "new", "nothing to show")]:
        ran = cli("report", place)
        assert (ran.code, ran.out) == (2, "")
        assert what in ran.err
    assert not (tmp_path / "new" / "report.html").exists()
    with pytest.raises(RecipeError):
        page.write(directory / "report.html")


# -- what a sentence or a plot is made of ----------------------------------------------------------


def test_the_finding() -> None:
    results = documents.results()
    flips = compare("base", "pcb", results).pooled
    assert flips is not None
    (sentence,) = flipped.finding(results)
    assert sentence.startswith(f"pcb against base over 120 items: +{100 * flips.difference:.1f} [")
    assert sentence.endswith(f"; {len(flips.lost)} items lost, {len(flips.won)} won.")
    rows = {row.model: row.cells[-1].text for row in rows_of(results)}  # no relative: no task's own fine-tune
    (said,) = scores.finding(results)
    assert said.startswith(f"pcb has {rows['pcb']}% accuracy in the mean; ")
    assert said.endswith(f"; the base has {rows['base']}%.")
    p = compare("linear", "pcb", results).pooled
    assert p is not None and p.p is not None and p.p > 0.05
    assert (
        f"the best baseline, linear, has {rows['linear']}%: no significant difference (p = {p.p:.3f}); the base"
        in said.replace("\u00a0", " ")
    )
    results = documents.results(tasks=("tweets", "nouns"))
    rows = {row.model: row.cells[-1].text for row in rows_of(results)}
    assert f"pcb has {rows['pcb']} of what each task's own fine-tune reaches" in scores.finding(results)[0]
    best = max(
        (row for row in rows_of(documents.results({"x": "input", "y": "input"}))), key=lambda r: r.cells[-1].text
    )
    (found,) = scores.finding(documents.results({"x": "input", "y": "input"}))
    assert found == f"The best mean is that of {best.model}: {best.cells[-1].text}% accuracy."


def test_the_search_in_numbers() -> None:
    document = documents.search(60)
    found = searched.read(document)
    points, best = list(found.points), found.best
    assert (len(points), len(found.failed)) == (59, 1)
    assert best is not None and best["objective"] == max(point["objective"] for point in points)
    value, given = (f"{100 * point['objective']:.1f}" for point in (best, points[0]))
    assert searched.finding(document)[0].endswith(f"(mean {value}; as given {given}).")
    assert searched._apart(points, ["tweets", "nouns", "reviews"]) == ("tweets", "nouns")  # reviews never moves
    for point in points:
        point["tasks"]["reviews"] = 1 - point["tasks"]["nouns"]
    assert searched._apart(points, ["tweets", "nouns", "reviews"]) == ("nouns", "reviews")


def test_tasks_of_unlike_metrics_are_not_set_against_each_other(tmp_path: Path) -> None:
    document = documents.search()
    document["made"] |= {"objective": "relative", "metrics": {"tweets": "accuracy", "nouns": "word_perplexity"}}
    text = page.write(alone(tmp_path / "s", "search.json", document)).read_text(encoding="utf-8")
    assert "pull apart" not in text
    best = next(point for point in document["points"] if point["number"] == document["best"])
    row = Tree(text).tables[0][1]
    values = [f"{100 * best['objective']:.1f}", f"{100 * best['tasks']['tweets']:.1f}", f"{best['tasks']['nouns']:.4g}"]
    assert row[0] == f"{best['number']} ★"
    assert row[3:6] == values


@pytest.mark.parametrize("higher", [True, False])
def test_the_front_is_what_none_beats(higher: bool) -> None:
    places = [(p["tasks"]["tweets"], p["tasks"]["nouns"]) for p in searched.read(documents.search(60)).points]
    top = (max if higher else min)(y for _, y in places)
    places += [(0.5, top), (0.4, top), (0.99, top), (0.98, top)]  # as good in one, worse in the other
    sign = 1 if higher else -1

    def beats(b: tuple[float, float], a: tuple[float, float]) -> bool:
        return b != a and all(sign * one >= sign * other for one, other in zip(b, a, strict=True))

    found = searched._front(places, higher)
    assert set(found) == {a for a in places if not any(beats(b, a) for b in places)}
    assert len(found) == len(set(found)) > 0


def test_layers_and_kinds() -> None:
    found = documents.profile(12)
    names = layers._layers(found)
    assert list(names) == [str(number) for number in range(12)]  # in their order; nobody changed the embedding
    group = layers._sum(found, names["2"])
    assert (group.elements, group.squares, group.kept) == (100, (16.0, 9.0), (20, 12))
    found = replace(found, numel={**found.numel, "layers.2.mlp.up.weight": 200})  # a quarter of it was looked at
    group = layers._sum(found, names["2"])
    assert (group.elements, group.squares, group.kept) == (250, (28.0, 36.0), (35, 48))
    counts = {
        f"{stack}.block.{n}.w": found.counts["layers.0.mlp.up.weight"] for stack in ("enc", "dec") for n in (0, 1)
    }
    two = layers._layers(found.__class__("ties", ("a", "b"), 1, True, dict.fromkeys(counts, 50), counts))
    assert list(two) == ["dec.block 0", "dec.block 1", "enc.block 0", "enc.block 1"]
    assert layers._kind("model.layers.3.mlp.experts.17.w1.weight") == "mlp.experts.*.w1.weight"


def test_statistics_in_numbers(tmp_path: Path) -> None:
    sources = Sources(tmp_path, None, None, None, documents.profile())
    (section,) = layers.sections(sources)
    (fold,) = (part for part in section.parts if part.kind == "fold")
    (table,) = fold.parts
    assert table.kind == "table"
    row = next(row for row in table.rows if row[0].text == "layers.1.mlp.up.weight")
    assert [cell.text for cell in row[1:]] == ["50", "2", "3", "25.0", "2.5", "10.00", "22.00"]
