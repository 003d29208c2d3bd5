"""Edits on the page: what they did, where in the model, how they are undone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mergebench.checkpoint.card import code, escape
from mergebench.checkpoint.drawing import BLUE
from mergebench.editing.summary import UNDO, facts, layers_of, sentence
from mergebench.evaluation import Results, page
from mergebench.evaluation.page import card, figures
from mergebench.evaluation.tables.results import legend, markdown
from tests.evaluation.page import documents
from tests.evaluation.page.test_page import HOSTILE, Tree, alone, tree_of

SENTENCE = "surgery with probe.safetensors of 1,229 of 26,460 rows of gate_proj, step 3.2"


def test_one_edit(tmp_path: Path) -> None:
    tree = tree_of(alone(tmp_path / "d", "mergebench.json", documents.provenance(edits=[documents.edit()])))
    assert tree.texts["h2"] == ["Edit", "Provenance"]
    assert f"2 models merged with pcb, then {SENTENCE}" in tree.texts["p"]
    assert "Surgery changed 0.65% of the model's parameters." in tree.texts["p"]
    pairs = dict(zip(tree.texts["dt"], tree.texts["dd"], strict=True))
    assert pairs["rows"] == "1,229 of 26,460 rows of gate_proj, in 3 layers"
    assert pairs["share"] == "0.65% of the model's parameters"
    assert pairs["step"].startswith("3.2 times the median norm")
    assert pairs["cosine"] == "-0.210 to -0.051 with the direction"
    assert pairs["probe"] == "probe.safetensors (layer 25, test accuracy 81.2%, SHA-256 cdcdcdcdcdcd…)"
    assert pairs["patch"] == "patch.safetensors"
    (figure,) = [one for one in tree.all("div") if one.get("role") == "img"]
    assert figure["aria-label"] == "Edited rows by layer: 0: 12, 3: 1000, 10: 217."


def test_bars_are_as_high_as_the_counts(tmp_path: Path) -> None:
    counts = {"0": 12, "3": 1000, "10": 217}
    page.write(alone(tmp_path / "d", "mergebench.json", documents.provenance(edits=[documents.edit()])))
    svg, _ = re.findall(r"<svg.*?</svg>", (tmp_path / "d" / "report.html").read_text(), re.DOTALL)  # wide and narrow
    bars = re.findall(
        r'<path d="M ([\d.]+) ([\d.]+)\s+L [\d.]+ [\d.]+\s+L [\d.]+ ([\d.]+)[^"]*z[^>]*var\(--blue\)', svg
    )
    heights = [abs(float(bottom) - float(top)) for _, bottom, top in bars]
    assert len(heights) == 11  # the layers between have none
    assert [round(1000 * height / max(heights)) for height in heights] == [counts.get(str(n), 0) for n in range(11)]
    lefts = [float(left) for left, *_ in bars]
    assert lefts == sorted(lefts)


def test_several_edits_one_of_them_a_patch_taken_out(tmp_path: Path) -> None:
    old = documents.edit(patch="/elsewhere/patch.safetensors", reverted=True)
    edits = [documents.edit(warnings=[HOSTILE]), {k: v for k, v in old.items() if k not in ("by_layer", "cosine")}]
    tree = tree_of(alone(tmp_path / "d", "mergebench.json", documents.provenance(edits=edits)))
    assert tree.texts["h2"] == ["Edits", "Provenance"]
    assert {f"1. {SENTENCE}.", f"2. {SENTENCE}, taken back."} <= set(tree.texts["p"])
    undo = [fact for term, fact in zip(tree.texts["dt"], tree.texts["dd"], strict=True) if term.startswith("undone")]
    assert undo == ["mergebench patch revert patch.safetensors --model . --out ../DIR"]
    assert len([one for one in tree.all("div") if one.get("role") == "img"]) == 1
    assert HOSTILE in tree.texts["dd"]


def test_a_model_that_was_only_edited(tmp_path: Path) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": "org/small"}]}
    provenance = documents.provenance(recipe=recipe, edits=[documents.edit()], mergebench="0.1")
    tree = Tree(page.write(alone(tmp_path / "d", "mergebench.json", provenance)).read_text())
    assert tree.texts["h1"] == ["d: edit"]
    assert f"org/small, then {SENTENCE}" in tree.texts["p"]
    text = card.text(tmp_path / "d", provenance)
    assert "One model edited by mergebench 0.1." in text
    assert "- model: [`org/small`](https://huggingface.co/org/small)" in text


def test_the_card() -> None:
    provenance = documents.provenance(mergebench="0.1", edits=[documents.edit()] * 2)
    text = card.text(Path("merged/x"), provenance, "| table |")
    assert "2 models merged with `pcb` (arXiv:2410.02396), then edited, by mergebench 0.1." in text
    assert text.index("## Edits") < text.index(f"\n{escape(SENTENCE)}:\n") < text.index("## Evaluation")
    for term, fact in facts(documents.edit()):
        assert text.count(f"- {term}: ") == 2
        assert (code(fact) if term in ("patch", UNDO) else escape(fact)) in text
    assert "## Edit" not in card.text(Path("merged/x"), documents.provenance(mergebench="0.1"))


def test_the_tables_say_what_the_row_before_is() -> None:
    results = documents.results({"linear": "baseline", "pcb unedited": "baseline", "pcb": "merged"}, ("t",))
    plain = legend(results)
    told = Results({**results.made, "unedited": {"pcb unedited": [SENTENCE, "b"]}}, results.records)
    assert legend(told) == plain.replace("; bold", f"; pcb unedited: before {SENTENCE}, then b; bold")
    assert f"pcb unedited: before {SENTENCE}".replace("_", r"\_") in markdown(told)


@pytest.mark.parametrize(
    "about", [{}, {"edit": "mine"}, {"edit": "mine", "rows": 3, "of": 4, "target": "x", "z": None}]
)
def test_what_is_not_known_is_not_told(about: dict[str, object], tmp_path: Path) -> None:
    """Patches of other packages say of themselves what they like."""
    edit = json.loads(json.dumps({**about, "patch": "p.safetensors"}))
    assert sentence(edit).startswith(str(about.get("edit", "a patch")))
    assert [term for term, _ in facts(edit)][-2:] == ["patch", "undone, in this directory, by"]
    assert layers_of(edit) == []
    tree = tree_of(alone(tmp_path / "d", "mergebench.json", documents.provenance(edits=[edit])))
    assert tree.texts["h2"] == ["Edit", "Provenance"]


def test_bars_of_values_below_zero_and_long_texts_have_room() -> None:
    rows = [("a", -0.4, 0.3, BLUE, "-0.40 ± 0.30"), ("b", 0.5, 0.1, BLUE, "0.500000000 ± 0.100000000")]
    svg = figures.bars("one", "", "", rows).svg(figures.WIDTH)
    bars = [tuple(map(float, one)) for one in re.findall(r'd="M ([\d.]+) [\d.]+\s+L ([\d.]+) [^"]*z', svg)]
    (left, zero), (again, right) = (sorted(bar) for bar in bars[-2:])
    assert zero == again
    assert (zero - left) / (right - zero) == pytest.approx(0.4 / 0.5, rel=1e-3)
    found = re.search(r'<clipPath[^>]*>\s*<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', svg)
    assert found is not None
    unit = (right - zero) / 0.5
    assert float(found[1]) <= zero - 0.7 * unit + 0.01  # the whisker's end
    ends = [float(x) for x in re.findall(r'text-anchor: end[^>]* x="([\d.]+)"', svg)]
    assert float(found[1]) + float(found[2]) >= max(ends) > zero + 0.6 * unit + 5 * len(rows[1][-1])  # 5 a letter
