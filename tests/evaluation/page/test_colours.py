"""A model has one colour in all figures of a page; figures go to files; widths follow rules."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex

from mergebench.checkpoint.drawing import COLOURS, GREY, SERIES
from mergebench.evaluation import Results, page
from mergebench.evaluation.page import flipped, layers, scores
from mergebench.evaluation.page.figures import FULL, THIRD, WIDTH, Figure, drawn
from mergebench.evaluation.page.parts import Gallery, Table, cells
from mergebench.evaluation.page.sources import MERGE, Sources, read
from tests.conftest import Cli
from tests.evaluation.page import documents


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return documents.write_all(tmp_path_factory.mktemp("colours") / "merged")


def galleries(writer: Any, sources: Sources) -> list[Figure]:
    return [
        figure
        for section in writer.sections(sources)
        for part in section.parts
        if isinstance(part, Gallery)
        for figure in part.figures
    ]


def colours(figure: Figure) -> dict[str, str]:
    """By the name in the legend or beside the bar."""
    (axes,) = figure.draw(WIDTH).axes
    found = {str(line.get_label()): to_hex(line.get_color()) for line in axes.get_lines()}
    found |= {
        str(one.get_label()): to_hex(one.lines[0].get_color()) for one in axes.containers if hasattr(one, "lines")
    }
    labels = [text.get_text() for text in axes.get_yticklabels()]
    bars = [patch for patch in axes.patches if patch.get_height() == pytest.approx(0.68)]
    found |= {label: to_hex(bar.get_facecolor()) for label, bar in zip(labels, bars, strict=False)}
    return {name: colour for name, colour in found.items() if not name.startswith("_")}


def test_a_model_has_one_colour_in_every_figure(whole: Path) -> None:
    sources = read(whole)
    seen: dict[str, set[str]] = {}
    for figure in [*galleries(scores, sources), *galleries(layers, sources)]:
        for name, colour in colours(figure).items():
            seen.setdefault("pcb" if name == MERGE else name, set()).add(colour)
    models = {name: seen[name] for name in ("base", "tweets", "nouns", "linear", "pcb")}
    assert all(len(found) == 1 for found in models.values()), models
    assert len(set.union(*models.values())) == 5  # and no two models the same
    assert (models["pcb"], models["base"]) == ({SERIES[0]}, {GREY})
    for figure in galleries(flipped, sources):
        name = figure.name.removeprefix("flips-")
        (axes,) = figure.draw(WIDTH).axes
        assert {to_hex(patch.get_facecolor()) for patch in axes.patches} == models[name]


def test_names_of_many_models_have_looks_of_their_own() -> None:
    roles = {f"m{number}": "input" for number in range(16)} | {"base": "base", "ties": "baseline", "pcb": "merged"}
    looks = Sources(Path("x"), documents.results(roles, ("t",), n=4), None, None, None).looks
    assert len({looks[name] for name in roles}) == len(roles)


def test_dots_are_not_joined_and_whiskers_are_errors() -> None:
    results = documents.results()
    gallery = scores._across(results, Sources(Path("x"), results, None, None, None).looks)
    (axes,) = gallery.figures[0].draw(FULL).axes
    assert len(axes.containers) == len(documents.ROLES)
    for container, model in zip(axes.containers, documents.ROLES, strict=True):
        line, _, (bars,) = container.lines
        assert line.get_linestyle() == "None"
        records = results.of(model)
        assert list(line.get_xdata()) == pytest.approx([100 * records[task].value for task in documents.TASKS])
        half = [(segment[1][0] - segment[0][0]) / 2 for segment in bars.get_segments()]
        assert half == pytest.approx([100 * (records[task].stderr or 0) for task in documents.TASKS])
    lowest = min(100 * (record.value - (record.stderr or 0)) for record in results.records)
    assert axes.get_xlim()[0] == 10 * (lowest // 10)
    assert f"The axis begins at {10 * (lowest // 10):.0f}." in gallery.caption
    assert [text.get_text() for text in axes.get_yticklabels()] == list(documents.TASKS)


def test_a_lone_last_plot_takes_the_whole_width(whole: Path) -> None:
    figures = galleries(scores, read(whole))
    three, (dots,) = [figure._replace(like=False) for figure in figures[:3]], figures[3:]
    assert [bool(one.narrow) for one in drawn(three)] == [False, False, True]
    assert [bool(one.narrow) for one in drawn(three[:2])] == [False, False]
    assert [bool(one.narrow) for one in drawn([three[0], dots, three[1]])] == [True, True, True]
    (wide,) = drawn([dots])
    assert (f'viewBox="0 0 {FULL:g} ', f'viewBox="0 0 {WIDTH:g} ') == (wide.svg[5:22], wide.narrow[5:22])


def test_three_on_one_scale_are_of_one_size(whole: Path) -> None:
    """A bar that is twice as long says twice as much."""
    three = galleries(scores, read(whole))[:3]
    assert all(one.like for one in three)
    assert [(one.third, one.svg[5:22]) for one in drawn(three)] == [(True, f'viewBox="0 0 {THIRD:g} ')] * 3
    assert [one.third for one in drawn(three[:2])] == [False, False]
    bars = [figure.draw(THIRD).axes[0] for figure in galleries(flipped, read(whole))]
    assert len({axes.get_xlim() for axes in bars}) == 1


def test_rows_that_begin_alike_say_it_once() -> None:
    table = Table(["a", "b"], [cells(*row) for row in ("ax", "ay", "bx", "by", "bz", "ax")], "")
    assert table.spans == [1] * 6
    assert table._replace(grouped=True).spans == [2, 0, 3, 0, 0, 1]


def test_figures_go_to_files(whole: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli("report", whole, "--out", tmp_path / "p.html", "--figures", tmp_path / "figures")
    assert done.code == 0, done.err
    files = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert done.out.splitlines() == [f"{tmp_path}/p.html", *done.out.splitlines()[1:]]
    assert sorted(Path(line).name for line in done.out.splitlines()[1:]) == files
    assert {"across-tasks.pdf", "across-tasks.png", "task-nouns.pdf", "flips-pcb.png", "norms.pdf"} <= set(files)
    assert len(files) == 2 * 14
    for name in files:
        begins = (tmp_path / "figures" / name).read_bytes()[:5]
        assert begins == (b"%PDF-" if name.endswith("pdf") else b"\x89PNG\r")
    again = page.write_figures(str(whole), str(tmp_path / "again"))  # paths as text, the same bytes
    assert [file.read_bytes() for file in again] == [(tmp_path / "figures" / file.name).read_bytes() for file in again]


def test_rules_of_the_style_sheet(whole: Path) -> None:
    """Colours are declared once; only what is in a scrolling box may be wider than the window."""
    text = page.write(str(whole)).read_text(encoding="utf-8")
    style = text[text.index("<style>") : text.index("</style>")]
    for name, (day, night) in COLOURS.items():
        assert re.findall(rf"--{name}: (#\w+);", style) == [day, night]
    assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= COLOURS.keys()
    assert text.count("<table") == text.count('<div class="wide"') > 0
    assert re.findall(r'<div class="wide"[^>]*>\s*<table', text).__len__() == text.count("<table")
    assert "min-width: 100%" in style and "overflow-x: auto" in style


def test_a_page_without_results_has_looks() -> None:
    looks = Sources(Path("x"), None, None, None, documents.profile()).looks
    assert looks[MERGE].colour == SERIES[0]
    assert looks["tweets"] != looks["nouns"]
    assert Sources(Path("x"), Results({}, ()), None, None, None).looks[MERGE].colour == SERIES[0]
