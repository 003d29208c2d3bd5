"""What `plan` shows of slices, tokens, whole matrices, staging and time; --json has the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import CONFIG, fine_tuned, tiny_tensors, write_model

from mergebench.checkpoint.target import partial
from tests.conftest import Cli


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("base", "a", "b")):
        write_model(Path("models") / name, fine_tuned(tiny_tensors(), number), config=CONFIG | {"num_hidden_layers": 2})


def test_slices_a_source_a_line(cli: Cli) -> None:
    Path("recipe.yaml").write_text(
        "merge_method: linear\nslices:\n"
        "- sources: [{model: models/a, layer_range: [0, 2]}, {model: models/b, layer_range: [0, 2]}]\n"
        "- sources: [{model: models/b, layer_range: [1, 2]}]\n"
    )
    out = cli("plan", "recipe.yaml").out
    assert [line for line in out.splitlines() if line.startswith(("  base", "  slice", "  model"))] == [
        "  base      none",
        "  slice     models/a, layers 0 to 1",
        "  slice     and models/b, layers 0 to 1",
        "  slice     models/b, layer 1",
    ]
    found = json.loads(cli("plan", "recipe.yaml", "--json").out)
    assert (found["models"], found["base"]) == (["models/a", "models/b"], None)
    assert found["slices"][1] == {"sources": [{"model": "models/b", "layer_range": [1, 2]}]}


def test_a_layer_that_is_not_there(cli: Cli) -> None:
    Path("recipe.yaml").write_text(
        "merge_method: passthrough\nslices:\n- sources: [{model: models/a, layer_range: [1, 9]}]\n"
    )
    code, _, err = cli("plan", "recipe.yaml")
    assert code == 3
    assert err == (
        "error: recipe.yaml:3:31: slices.0.sources.0.layer_range: [1, 9]: models/a has 2 layers\n"
        "hint: they are 0 to 1, the end is not included\n"
    )


def test_whole_matrices_staging_and_time(cli: Cli) -> None:
    Path("recipe.yaml").write_text(
        "merge_method: tsv_m\nbase_model: models/base\nmodels: [{model: models/a}, {model: models/b}]\n"
    )
    found = json.loads(cli("plan", "recipe.yaml", "--json", "--out", "deep/out", "--workers", "2").out)
    assert found["staging"] == str(partial(Path("deep/out"))) == "deep/.out.partial"
    whole = found["largest_matrix"]
    assert (whole["count"], whole["shape"]) == (2, [8, 8]) and 2 * whole["memory"] <= found["peak_memory"] + 1
    assert 1 <= found["seconds"] <= 3 and 1 <= found["seconds_from_disk"] <= 3
    lines = {line.split()[0]: line for line in cli("plan", "recipe.yaml", "--workers", "2").out.splitlines()}
    assert lines["matrices"].startswith("  matrices  2 tensors whole, the largest 8 x 8: ")
    assert lines["time"] == "  time      about 2 s" or torch.cuda.is_available()


@pytest.mark.parametrize("given", ["10B", "999kB", "20MB"])
def test_too_little_memory_is_named_as_given(cli: Cli, given: str) -> None:
    Path("recipe.yaml").write_text("merge_method: linear\nmodels: [{model: models/a}, {model: models/b}]\n")
    code, _, err = cli("plan", "recipe.yaml", "--memory", given)
    assert code == 2 and err.startswith(f"error: --memory {given}: 'linear' needs at least ")
