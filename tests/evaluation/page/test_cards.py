"""Cards: what the hub reads of them, and what they must not tell; pages of results that no recipe made."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from models import fine_tuned, tiny_tensors, write_model
from ruamel.yaml import YAML

from mergebench.adapters import cards as adapter_cards
from mergebench.checkpoint.lineage import parents, portable
from mergebench.evaluation import page
from mergebench.evaluation.page import card, origin
from mergebench.evaluation.page.parts import lasted
from mergebench.training import plot, report
from tests.conftest import Cli
from tests.evaluation.page import documents
from tests.evaluation.page.test_page import Tree, alone, tree_of

HOME = "/home/somebody"


def text_of(out: Path, models: list[str], base: str | None = None, method: str = "ties", **more: Any) -> str:
    recipe = {"merge_method": method, "base_model": base, "models": [{"model": model} for model in models]}
    return card.text(out, documents.provenance(mergebench="0.1", recipe=recipe, **more))


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base (its config names what it was made from, its card a licence), a (the same licence), b (another), out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for name, licence in (("base", "apache-2.0"), ("a", "apache-2.0"), ("b", "mit"), ("out", None)):
        Path(name).mkdir()
        if licence:
            Path(name, "README.md").write_text(f"---\nlicense: {licence}\ntags:\n- x\n---\n# {name}\nlicense: none\n")
    Path("base/config.json").write_text('{"_name_or_path": "org/older"}')
    Path("a/adapter_config.json").write_text('{"base_model_name_or_path": "org/older"}')
    Path("out/config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return tmp_path


def test_the_hub_reads_it(local: Path) -> None:
    data = ModelCard(text_of(Path("out"), ["a", "org/tuned@v1+org/lora", "org/tuned"], "org/base")).data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": ["org/base", "org/tuned", "org/lora"],
        "base_model_relation": "merge",
        "tags": ["merge", "mergebench"],
    }


def test_what_a_model_was_made_from_is_not_its_id(local: Path) -> None:
    """`_name_or_path` of a local model, `base_model_name_or_path` of a local adapter: neither is the input itself."""
    data = ModelCard(text_of(Path("out"), ["base+a"], "base")).data.to_dict()
    assert data.keys().isdisjoint({"base_model", "base_model_relation"})


def test_a_snapshot_in_the_hubs_cache_has_its_id(local: Path) -> None:
    """Named by its directory, a file in it, or a link to it."""
    place = local / "cache/models--org--its-name/snapshots" / ("0a" * 20)
    place.mkdir(parents=True)
    (place / "model.safetensors").touch()
    Path("link").symlink_to(place)
    for name in (str(place), str(place / "model.safetensors"), "link"):
        text = text_of(Path("out"), ["a", name], "base")
        assert ModelCard(text).data.to_dict()["base_model"] == ["org/its-name"]
        assert str(local) not in text
    text = text_of(Path("out"), [str(place)])
    reference = f"org/its-name@{'0a' * 20}"
    assert f"- model: [`{reference}`](https://huggingface.co/org/its-name)" in text
    assert f"- model: {reference}\n" in text  # in the recipe


def test_a_licence_where_all_agree(local: Path) -> None:
    assert ModelCard(text_of(Path("out"), ["a"], "base")).data.license == "apache-2.0"
    text = text_of(Path("out"), ["a", "b", "org/tuned"], "base")
    assert ModelCard(text).data.license is None
    for line in ("- `a`: apache-2.0", "- `b`: mit", "- `org/tuned`: not stated here"):
        assert line in text.splitlines()
    Path("b/README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n")
    assert parents(["b"])[0].licence is None
    Path("b/README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: 'mit'\r\n---\r\n")
    assert parents(["b"])[0].licence == "mit"


def test_the_licences_of_what_the_hub_does_not_list(local: Path) -> None:
    """A merged adapter is an adapter of the base; what it was merged from has a licence too."""
    made = {"name": "linear", "density": None}
    entries = [{"adapter": name, "weight": 0.5, "base_model": "base"} for name in "ab"]
    about = {"adapters": entries, "method": made, "copied": True}
    data = ModelCard(adapter_cards.card(Path("out"), about)).data
    assert data.license is None
    entries[1]["adapter"] = "a"
    assert ModelCard(adapter_cards.card(Path("out"), about)).data.license == "apache-2.0"


def test_links_and_no_place_of_this_machine(local: Path) -> None:
    there = local / "base"
    edits = [documents.edit(probe={"file": f"{HOME}/probe.safetensors", "sha256": "ab"})]
    text = text_of(Path("out"), [str(local / "a"), f"org/tuned+{HOME}/lora"], str(there), edits=edits)
    assert "[`org/tuned`](https://huggingface.co/org/tuned) + " in text
    assert "- base: `../base`" in text
    assert str(local) not in text
    assert not re.search(r"(?<![\w.])/home/", text)


def test_the_recipe_is_as_from_the_result(local: Path) -> None:
    text = text_of(Path("deep/er/out"), ["a", "rel", "org/tuned"], "base", folders=[str(local / "recipes")])
    Path("recipes/rel").mkdir(parents=True)
    assert "model: rel\n" in text  # not there yet: a name
    text = text_of(Path("deep/er/out"), ["./a", "../x/rel", "org/tuned"], "base")
    (told,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert [one["model"] for one in YAML(typ="safe").load(told)["models"]] == ["../../../a", "../x/rel", "org/tuned"]


def test_lists_of_numbers_stand_on_a_line() -> None:
    document = {"models": [{"model": "a", "parameters": {"weight": [0, 0.25, 1]}}], "layer_range": [0, 4]}
    text = card.as_yaml(document)
    assert "weight: [0, 0.25, 1]" in text and "layer_range: [0, 4]" in text
    assert YAML(typ="safe").load(text) == document


def test_input_files_are_named_without_this_machine(tmp_path: Path) -> None:
    cached = f"{HOME}/.cache/huggingface/hub/models--org--a--b/snapshots/0a1b/model.safetensors"
    found = portable(
        {"inputs": [{"file": cached}, {"file": str(tmp_path / "m/x.bin")}, {"file": "m/x.bin"}]}, tmp_path / "o"
    )
    assert [one["file"] for one in found["inputs"]] == ["org/a--b@0a1b/model.safetensors", "../m/x.bin", "m/x.bin"]


def test_a_recipe_with_slices_lists_its_models(tmp_path: Path) -> None:
    sources = [{"sources": [{"model": name, "layer_range": [0, 2]}]} for name in ("m/one", "m/two", "m/one")]
    recipe = {"merge_method": "passthrough", "slices": sources}
    tree = tree_of(alone(tmp_path / "d", "mergebench.json", documents.provenance(recipe=recipe)))
    pairs = dict(zip(tree.texts["dt"], tree.texts["dd"], strict=True))
    assert pairs["models"] == "m/one\nm/two"
    assert "2 models merged with passthrough" in tree.texts["p"]
    assert "None" not in pairs.values()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tensors = tiny_tensors()
    write_model(Path("base"), tensors)
    write_model(Path("ft"), fine_tuned(tensors, 1))
    return tmp_path


@pytest.mark.parametrize(
    ("args", "title", "said"),
    [
        (["task-vector", "ft", "--base", "base", "--out", "made"],
         "made: task-vector", "What ft adds to base."),
        (["adapters", "extract", "--base", "base", "--model", "ft", "--rank", "2", "--out", "made"],
         "made: adapters extract", "What a fine-tune adds to the linear layers of its base"),
    ],
)  # fmt: skip
def test_what_no_recipe_made_is_shown(place: Path, cli: Cli, args: list[str], title: str, said: str) -> None:
    done = cli(*args)
    assert done.code == 0, done.err
    done = cli("report", "made", "--json")
    assert json.loads(done.out) == {"out": "made/report.html", "figures": []}
    text = Path("made/report.html").read_text(encoding="utf-8")
    tree = Tree(text)
    assert tree.texts["h1"] == [title]
    assert said in " ".join(tree.texts["p"] + tree.texts["dd"])
    assert "None" not in " ".join(tree.texts.get("dd", [])).split()
    assert "was not measured" not in text and "Not drawn" not in text
    assert os.fspath(place) not in text


def test_tables_pictures_and_escapes_of_a_card(tmp_path: Path) -> None:
    alone(tmp_path / "d", "mergebench.json", {"command": "cil run", "mergebench": "0.1", "seconds": 2.5})
    lines = ["| method | A\\_B |", "| --- | ---: |", "| a\\|b | **1.0** |", "", "In \\%. Text of", "two lines.", ""]
    (tmp_path / "d/results.md").write_text("\n".join(lines))
    (tmp_path / "d/results.png").write_bytes(b"\x89PNG\r\n")
    text = page.write(tmp_path / "d").read_text(encoding="utf-8")
    tree = Tree(text)
    assert tree.texts["h1"] == ["d: cil run"]
    assert tree.tables[0] == [["method", "A_B"], ["a|b", "1.0"]]
    assert "In %. Text of two lines." in tree.texts["p"]
    assert [one["src"] for one in tree.all("img")] == ["data:image/png;base64,iVBORw0K"]
    assert "img-src data:" in text
    assert dict(zip(tree.texts["dt"], tree.texts["dd"], strict=True))["took"] == "2.5 s"


def test_a_directory_of_results_says_which(place: Path, cli: Cli) -> None:
    assert cli("task-vector", "ft", "--base", "base", "--out", "merged/tv").code == 0
    ran = cli("report", "merged")
    assert (ran.code, ran.err) == (2, "error: merged: nothing to show\nhint: name one of its results: tv\n")


RUNS = [
    {"row": row, "seed": seed, "directory": f"{row}/seed-{seed}", "model": "base", "kind": "full", "lr": 0.1,
     "steps": 2, "seconds": 1.0, "parameters": 10 + seed, "bytes": 20, "saved_by_autograd": 5, "peak_memory": 7,
     "test": {"metric": "accuracy", "value": value}, "history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]}
    for row, values in {"one": (0.5, 0.7), "two": (0.75, 0.85)}.items() for seed, value in enumerate(values)
]  # fmt: skip


def test_a_training_is_drawn_for_the_page(tmp_path: Path, cli: Cli) -> None:
    """In the page's colours, which change at night; the pictures beside the card are for other readers."""
    out = tmp_path / "trained"
    made = {"command": "train", "mergebench": "0.1", "config": {"rows": {"one": {}, "two": {}}}, "runs": RUNS}
    alone(out, "mergebench.json", made)
    (out / "README.md").write_text(report.card(out, made))
    plot.write(RUNS, out)
    assert {path.name for path in out.glob("*.png")} == {"scores.png", "curves.png"}
    done = cli("report", out, "--figures", tmp_path / "figures")
    assert done.code == 0, done.err
    assert sorted(path.name for path in (tmp_path / "figures").glob("*.pdf")) == ["curves.pdf", "scores.pdf"]
    text = (out / "report.html").read_text(encoding="utf-8")
    tree = Tree(text)
    assert not tree.all("img") and len(tree.all("svg")) == 2 * 2
    found = "two has the best test accuracy, 80.0 ± 5.0%; the next of 2 rows, one, has 60.0 ± 10.0% "
    assert tree.texts["p"][1].replace("\u00a0", " ") == f"{found}(mean of 2 seeds ± its standard error)."
    assert "two 80.0 ± 5.0" in str([one["aria-label"] for one in tree.all("div") if one.get("role") == "img"])
    assert tree.texts["li"] == [f"{row}: base + trained/{row}/seed-0 to trained/{row}/seed-1" for row in ("one", "two")]
    rows = csv.DictReader(io.StringIO(cli("report", out, "--format", "csv").out))
    assert [(row["row"], row["test"], row["test ±"]) for row in rows] == [
        ("one", "60.0", "10.0"),
        ("two", "80.0", "5.0"),
    ]
    assert r"80.0 $\pm$ 5.0" in cli("report", out, "--format", "latex").out
    page.write(out)  # which knows of no plots: the card's pictures
    assert len(Tree((out / "report.html").read_text()).all("img")) == 2


def test_rows_with_tasks_of_their_own_are_not_ranked() -> None:
    said = report.finding(RUNS, apart=True).replace("\u00a0", " ")
    assert said.startswith("2 rows, each on a task of its own: test accuracy from 60.0 ± 10.0% of one to 80.0 ± 5.0%")


def test_times_and_dates_are_in_words() -> None:
    assert [lasted(seconds) for seconds in (0.04, 6.405, 61.2, 2924.9, 12600)] == [
        "0.04 s",
        "6.4 s",
        "61 s",
        "49 min",
        "3.5 h",
    ]
    assert origin._date("2026-11-30T20:29:06+01:00") == "2026-11-30 19:29 UTC"
