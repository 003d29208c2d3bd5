"""A recipe that merges, edits and measures, in one command: what its edits did stands beside what was before them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergebench.checkpoint.format import Base
from mergebench.deltas.formats.native import Writing, read_file, write_file
from mergebench.deltas.open import open_model
from mergebench.editing.patches import open_patch
from mergebench.editing.probes.probe import Probe
from mergebench.editing.undo import unedited
from mergebench.errors import ModelError
from mergebench.evaluation import Results
from mergebench.evaluation.compare.comparison import compare
from tests.conftest import Cli
from tests.evaluation.test_firing import write_family
from tests.language import write_rows, write_texts


@pytest.fixture(autouse=True)
def quick(one_thread: None) -> None:
    """Tiny matrices."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with texts of two classes and two probes of width 16."""
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "texts.jsonl", count=9)
    rows = [json.loads(line) for line in Path("texts.jsonl").read_text(encoding="utf-8").splitlines()]
    write_rows(tmp_path / "labelled.jsonl", [row | {"label": n % 2} for n, row in enumerate(rows)])
    for number in (1, 2):
        torch.manual_seed(number)
        Probe(torch.randn(2, 16), torch.zeros(2), about={"layer": 1, "test_accuracy": 0.9}).save(
            tmp_path / f"probe{number}.safetensors"
        )
    return tmp_path


def write_recipe(here: Path, family: str, edits: list[dict[str, Any]], dtype: str = "bfloat16") -> None:
    """Two models and a recipe of their mean, stored in bfloat16."""
    for number, name in enumerate("ab"):
        if not (here / name).exists():
            write_family(here / name, family, seed=number)
    tasks = [
        {"name": "fires", "kind": "firing", "data": "texts.jsonl", "max_length": 50},
        {"name": "seen", "kind": "probe", "data": "labelled.jsonl", "probe": "probe1.safetensors", "of": "undesired"},
    ]
    recipe = {"merge_method": "linear", "models": [{"model": name, "parameters": {"weight": 1}} for name in "ab"]}
    recipe |= {"dtype": dtype, "edits": edits, "evaluate": {"suite": {"tasks": tasks}}}
    Path("recipe.yaml").write_text(json.dumps(recipe))


EDITS = [{"edit": "surgery", "probe": f"probe{n}.safetensors", "rows": "40%", "alpha": 0.7} for n in (1, 2)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("count", [1, 2])
def test_unedited_is_the_merge_without_edits(here: Path, cli: Cli, family: str, count: int) -> None:
    write_recipe(here, family, EDITS[:count])
    assert cli("merge", "recipe.yaml", "--no-eval", "--out", "edited", "-q").code == 0
    assert cli("merge", "recipe.yaml", "--no-eval", "--out", "plain", "--set", "edits=[]", "-q").code == 0
    edited, plain = open_model("edited"), open_model("plain").state_dict()
    provenance = json.loads(Path("edited/mergebench.json").read_text())
    patches = [open_patch(Path("edited") / edit["patch"]) for edit in provenance["edits"]]
    assert len(patches) == count
    found = unedited(edited, patches).state_dict()
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in edited.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_merge_edit_and_measure_in_one_command(here: Path, cli: Cli) -> None:
    write_recipe(here, "llama", EDITS)
    done = cli("merge", "recipe.yaml")
    assert done.code == 0, done.err
    results = Results.load(Path("merged/recipe"))
    assert [(record.model, record.role) for record in results.records if record.task == "fires"] == [
        ("a", "input"), ("b", "input"), ("linear unedited", "baseline"), ("linear", "merged"),
    ]  # fmt: skip
    before, after = results.of("linear unedited"), results.of("linear")
    assert all(before[task].value != after[task].value for task in ("fires", "seen"))

    Path("two.yaml").write_text(
        json.dumps(
            {
                "tasks": [
                    {"name": name, "kind": "firing", "data": "texts.jsonl", "max_length": 50, "patch": str(patch)}
                    for name, patch in (
                        ("one", "merged/recipe/patch-1.safetensors"),
                        ("two", "merged/recipe/patch-2.safetensors"),
                    )
                ]
                + [
                    {
                        "name": "seen",
                        "kind": "probe",
                        "data": "labelled.jsonl",
                        "probe": "probe1.safetensors",
                        "of": "undesired",
                    }
                ]
            }
        )
    )
    assert cli("merge", "recipe.yaml", "--no-eval", "--out", "plain", "--set", "edits=[]", "-q").code == 0
    assert cli("eval", "two.yaml", "plain", "merged/recipe", "-q").code == 0
    plain = Results.load(Path("evaluations/two"))
    assert plain.of("plain")["seen"].predictions == before["seen"].predictions
    assert plain.of("recipe")["seen"].predictions == after["seen"].predictions
    assert len({plain.of("plain")[name].value for name in ("one", "two")} | {before["fires"].value}) == 3

    found = compare("linear unedited", "linear", "merged/recipe")
    assert [pair.task for pair in found.pairs] == ["fires", "seen"]
    title, *rows = [
        line for line in done.out.splitlines() if line.startswith((" linear against", " fires ", " seen "))
    ][-3:]
    assert title.split() == ["linear", "against", "linear", "unedited", "difference", "p", "lost", "won"]
    for row, pair in zip(rows, found.pairs, strict=True):
        change = after[pair.task].value - before[pair.task].value  # of undesired texts a higher loss is better too
        assert float(row.split()[1].replace("−", "-")) == pytest.approx(change, rel=5e-3)
        assert [int(count) for count in re.findall(r"(\d+) \(", row)] == [len(pair.flips.lost), len(pair.flips.won)]
    text = Path("merged/recipe/evaluation.md").read_text()
    edit = r"surgery with probe{}.safetensors of 19 of 48 rows of gate\_proj, step {}"
    made = json.loads(Path("merged/recipe/mergebench.json").read_text())
    steps = [f"{one['relative_step']:.3g}" for one in made["edits"]]
    edits = [edit.format(number, step) for number, step in enumerate(steps, 1)]
    assert f"linear unedited: before {edits[0]}, then {edits[1]}" in text
    card = Path("merged/recipe/README.md").read_text()
    assert text.splitlines()[0] in card
    for number in (1, 2):
        assert f"`mergebench patch revert patch-{number}.safetensors --model . --out ../DIR`" in card


def test_what_was_measured_before_its_edits_is_known_again(here: Path, cli: Cli) -> None:
    write_recipe(here, "llama", EDITS[:1])

    def known(*more: str) -> int:
        assert cli("merge", "recipe.yaml", "--overwrite", "-q", *more).code == 0
        return int(Results.load(Path("merged/recipe")).made["known"])

    assert (known(), known()) == (0, 8)
    assert known("--set", "edits.0.alpha=0.1") == 2  # what a and b show the probe; all others have other neurons
    Path("merged/recipe/evaluation.json").unlink()
    assert known("--resume") == 8


def test_the_row_before_has_a_name_of_its_own(here: Path, cli: Cli) -> None:
    write_recipe(here, "llama", EDITS[:1])
    recipe = json.loads(Path("recipe.yaml").read_text())
    shutil.move(here / "a", here / "linear unedited")
    recipe["models"][0]["model"] = "linear unedited"
    recipe["evaluate"]["baselines"] = [{"linear": {"weight": 0.5}}, "linear"]
    Path("recipe.yaml").write_text(json.dumps(recipe))
    assert cli("merge", "recipe.yaml", "-q").code == 0
    assert Results.load(Path("merged/recipe")).models == [
        "linear unedited (input)", "b", "linear weight 0.5", "linear (defaults)", "linear unedited", "linear",
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(7, 5), (6, 6), (3, 7, 5)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("step", [1, 2])
def test_rows_are_put_back_wherever_they_lie(
    tmp_path: Path, shape: tuple[int, ...], transposed: bool, step: int
) -> None:
    """Also those of experts in one tensor, numbered through; also where all of them changed."""
    torch.manual_seed(0)
    tensor, width = torch.randn(shape), shape[-2 if transposed else -1]
    expected = (tensor.mT if transposed else tensor).reshape(-1, width).clone()
    numbers = torch.arange(0, len(expected), step)
    originals = torch.randn(len(numbers), width).to(torch.bfloat16)
    expected[numbers] = originals.float()
    save_file({"up.weight": tensor}, tmp_path / "edited.safetensors")
    settings = {"columns": shape[-1]} if transposed else {}
    parts = {"rows": numbers, "amount": torch.ones(len(numbers))}
    writing = Writing("row_patch", settings, parts, {"direction": "direction"}, originals)
    write_file(tmp_path / "patch.safetensors", {"up.weight": writing}, {"direction": torch.ones(width)})
    found = unedited(open_model(str(tmp_path / "edited.safetensors")), [open_patch(tmp_path / "patch.safetensors")])
    back = found.state_dict()["up.weight"]
    assert torch.equal((back.mT if transposed else back).reshape(-1, width), expected)


def test_what_was_not_kept_is_not_put_back(tmp_path: Path) -> None:
    save_file({"up.weight": torch.zeros(3, 2)}, tmp_path / "m.safetensors")
    parts = {"b": torch.ones(3, 1), "a": torch.ones(1, 2)}
    write_file(tmp_path / "delta.safetensors", {"up.weight": Writing("low_rank", {}, parts)})
    model = open_model(str(tmp_path / "m.safetensors"))
    file = read_file(tmp_path / "delta.safetensors")
    delta = file.on("up.weight", Base(model.reference, model.tensors, {}))
    with pytest.raises(ModelError, match=r"does not keep 'up\.weight' as it was"):
        file.undo("up.weight", delta)
