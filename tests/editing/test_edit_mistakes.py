"""A user's mistakes with probes, edits and patches: one line, a hint, the right exit code, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import hashes, write_model, write_recipe
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import Cli
from tests.editing.conftest import CONFIG, GATE, WIDTH, gated, write_probe

USAGE, MODEL, FAILED = 2, 3, 1


def probe_of(width: int, **changes: Tensor) -> dict[str, Tensor]:
    return {"weight": torch.randn(2, width, generator=torch.Generator().manual_seed(1)), **changes}


def nan(width: int) -> Tensor:
    weight = torch.ones(2, width)
    weight[1, 3] = float("nan")
    return weight


CASES: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "no probe": ({"--probe": "nowhere.safetensors"}, USAGE, ["no such file: nowhere.safetensors"]),
    "a model for a probe": ({"--probe": "model/model.safetensors"}, MODEL, ["not a probe"]),
    "a probe of the wrong width": ({"tensors": probe_of(8)}, MODEL, ["width 8", f"{WIDTH}"]),
    "a probe with NaN": ({"tensors": {"weight": nan(WIDTH)}}, FAILED, ["weight", "not finite"]),
    "a probe of zeros": ({"tensors": {"weight": torch.zeros(2, WIDTH)}}, MODEL, ["zero"]),
    "a probe of three classes": ({"tensors": {"weight": torch.ones(3, WIDTH)}}, MODEL, ["not a probe", "[3, 16]"]),
    "no mean-diff in it": ({"tensors": probe_of(WIDTH), "--direction": "mean-diff"}, USAGE, ["mean_diff"]),
    "no such direction": ({"--direction": "row2"}, USAGE, ["row2", "row1, diff"]),
    "a target that matches nothing": ({"--target": "layers.*.nowhere"}, USAGE, ["matches no matrix"]),
    "a role that the model has not": ({"--target": "q_proj"}, MODEL, ["no q_proj"]),
    "a misspelt role": ({"--target": "gate_porj"}, USAGE, ["gate_porj", "did you mean 'gate_proj'"]),
    "more rows than there are": ({"--rows": "481"}, USAGE, ["481", "480 candidates"]),
    "more than all": ({"--rows": "101%"}, USAGE, ["101%", "480 candidates"]),
    "rows in words": ({"--rows": "many"}, USAGE, ["'many' is no number of rows"]),
    "a comma": ({"--rows": "4,65%"}, USAGE, ["'4,65%' is no number of rows"]),
    "no such selection": ({"--select": "min"}, USAGE, ["select", "min-cos, max-cos, random"]),
    "no such operation": ({"--op": "plus"}, USAGE, ["op", "add, subtract"]),
    "layers that are not there": ({"--layers": "10-14"}, USAGE, ["10-14", "0-11"]),
    "layers in words": ({"--layers": "first"}, USAGE, ["'first' cannot be read"]),
    "an alpha that overflows": ({"--alpha": "3.3e38"}, FAILED, ["do not fit into BF16"]),
    "an alpha beyond float32": ({"--alpha": "1e39"}, USAGE, ["--alpha: must be within", "1e+39"]),
    "no model": ({"--model": "nowhere"}, MODEL, ["nowhere"]),
    "no --out": ({"--out": None}, USAGE, ["--out: missing"]),
    "the model for --out": ({"--out": "model"}, USAGE, ["model"]),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_model(tmp_path / "model", gated(torch.bfloat16), config=CONFIG)
    save_file(probe_of(WIDTH), tmp_path / "probe.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(**given: Any) -> list[str]:
    options = {"--model": "model", "--probe": "probe.safetensors", "--out": "out", **given}
    return ["edit", *(part for key, value in options.items() if value is not None for part in (key, value))]


def refused(ran: Any, code: int, says: list[str]) -> None:
    lines = [line for line in ran.err.splitlines() if not line.startswith("left: .out.partial ")]
    assert (ran.code, ran.out) == (code, ""), ran.err
    assert lines[0].startswith("error: ") and len(lines) <= 2 and "Traceback" not in ran.err
    for text in says:
        assert text in ran.err


@pytest.mark.parametrize("what", CASES)
def test_one_line_and_nothing_written(what: str, folder: Path, cli: Cli) -> None:
    given, code, says = CASES[what]
    given = dict(given)
    if "tensors" in given:
        save_file(given.pop("tensors"), folder / "probe.safetensors")
    before = hashes(folder)
    ran = cli(*arguments(**given))

    refused(ran, code, says)
    left = {name for name in hashes(folder) if not name.startswith(".out.partial")}
    assert left == before.keys() and {name: hashes(folder)[name] for name in before} == before


def test_a_row_that_is_not_finite(folder: Path, cli: Cli) -> None:
    tensors = gated(torch.bfloat16)
    tensors[GATE.format(4)][7, 2] = float("inf")
    write_model(folder / "model", tensors, config=CONFIG)
    ran = cli(*arguments())

    refused(ran, FAILED, [GATE.format(4), "row 7", "not finite"])
    assert not (folder / "out").exists()


def test_a_probe_fitted_on_another_model_is_a_warning(folder: Path, cli: Cli) -> None:
    write_probe(folder / "probe.safetensors", probe_of(WIDTH)["weight"], model={"identity": "0123456789abcdef"})
    for more in ({}, {"--out": None}):
        ran = cli(*arguments(**more), *(["--dry-run"] if more else []))

        assert ran.code == 0
        (line,) = (line for line in ran.err.splitlines() if "another model" in line)
        assert line.startswith("warning: ") and "0123456789abcdef" in line and "this one (" in line


def test_a_probe_no_better_than_the_majority_is_a_warning(folder: Path, cli: Cli) -> None:
    for accuracy, said in ((0.59, True), (0.61, False)):  # 0.5 + 2 sqrt(0.6 * 0.4 / 100) = 0.598
        about = {"test_accuracy": accuracy, "majority": 0.5, "n_test": 100}
        write_probe(folder / "probe.safetensors", probe_of(WIDTH)["weight"], **about)
        ran = cli(*arguments(**{"--out": None}), "--dry-run")

        assert ran.code == 0 and ran.err.count(f"{accuracy:.1%} of 100") == said


def test_a_dry_run_writes_nothing(folder: Path, cli: Cli) -> None:
    before = hashes(folder)
    ran = cli(*arguments(**{"--rows": "10%"}), "--dry-run")

    assert ran.code == 0 and hashes(folder) == before
    for text in ("surgery: 48 of 480 rows of gate_proj", "480 rows in 12 layers", "median row norms", "z"):
        assert text in ran.out
    assert "noise" in ran.err


Break = Callable[[Path], None]


def _cut(patch: Path) -> None:
    patch.write_bytes(patch.read_bytes()[:-10])


def _unsorted(patch: Path) -> None:
    from safetensors import safe_open

    tensors = load_file(patch)
    with safe_open(patch, "pt") as opened:
        metadata = opened.metadata()
    name = next(name for name in tensors if name.endswith(".rows") and len(tensors[name]) > 1)
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, patch, metadata)


def _half(patch: Path) -> None:
    from safetensors import safe_open

    tensors = load_file(patch)
    with safe_open(patch, "pt") as opened:
        metadata = opened.metadata()
    del tensors[next(name for name in tensors if name.endswith(".amount"))]
    save_file(tensors, patch, metadata)


@pytest.mark.parametrize(
    ("damage", "code", "says"),
    [
        (lambda patch: patch.unlink(), MODEL, "no such file"),
        (lambda patch: shutil.copy("probe.safetensors", patch), MODEL, "not a patch"),
        (_cut, FAILED, "damaged"),
        (_unsorted, FAILED, "not in order"),
        (_half, FAILED, "not readable as a patch"),
    ],
)
def test_a_patch_that_is_none(damage: Break, code: int, says: str, folder: Path, cli: Cli) -> None:
    assert cli(*arguments()).code == 0
    damage(folder / "out" / "patch.safetensors")
    before = hashes(folder)
    ran = cli("patch", "apply", "--model", "model", "--patch", "out/patch.safetensors", "--out", "again")

    refused(ran, code, [says])
    assert hashes(folder) == before


RECIPES = {
    "a list of words": (["surgery"], "edits.0: must be a mapping"),
    "a mapping": ({"edit": "surgery"}, "edits: must be a list of edits"),
    "no name": ([{"probe": "probe.safetensors"}], "edits.0.edit: missing"),
    "no such edit": ([{"edit": "surgrey", "probe": "p"}], "edits.0.edit: no edit is called 'surgrey'"),
    "no such parameter": (
        [{"edit": "surgery", "probe": "p", "row": 3}],
        "edits.0.row: 'surgery' has no such",
    ),
    "alpha in words": ([{"edit": "surgery", "probe": "p", "alpha": "big"}], "edits.0.alpha: must be a number"),
    "another selection": ([{"edit": "surgery", "probe": "p", "select": "min"}], "edits.0.select: must be one of"),
    "no such probe": ([{"edit": "surgery", "probe": "p"}], "edits.0: no such file: p"),
    "too many rows": (
        [{"edit": "surgery", "probe": "probe.safetensors", "rows": 500}],
        "edits.0: rows: 500 asks",
    ),
}


@pytest.mark.parametrize("what", RECIPES)
def test_a_recipes_edits(what: str, folder: Path, cli: Cli) -> None:
    written, says = RECIPES[what]
    write_recipe(folder / "recipe.yaml", "passthrough", ["model"], edits=written)
    before = hashes(folder)
    ran = cli("merge", "recipe.yaml", "--out", "out")

    refused(ran, USAGE, ["recipe.yaml:", says])
    assert hashes(folder) == before


SPLITS = ("validation", "test")


def test_an_edit_and_search_or_tasks(folder: Path, cli: Cli) -> None:
    step = [{"edit": "surgery", "probe": "probe.safetensors"}]
    write_recipe(folder / "emr.yaml", "emr", ["model"], "model", edits=step)
    refused(cli("merge", "emr.yaml"), USAGE, ["edits"])
    tasks = [{"name": "fires", "kind": "firing", "data": f"{split}.jsonl", "split": split} for split in SPLITS]
    for split in SPLITS:
        (folder / f"{split}.jsonl").write_text(json.dumps({"id": split, "text": split}))
    write_recipe(folder / "ties.yaml", "ties", ["model"], "model", edits=step, evaluate={"suite": {"tasks": tasks}})
    ran = cli("search", "ties.yaml", "--over", "density,step=0.2:1")
    refused(ran, USAGE, ["task 'fires' is of one patch, a search makes another", "name its patch (patch: FILE)"])
