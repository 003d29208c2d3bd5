"""Adapters of the hub, out of a cache laid out as huggingface_hub does it: as good as their directories, everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import hashes
from safetensors.torch import save_file

from tests.conftest import Cli
from tests.robust.test_hub import REVISIONS, Hub


def write_adapter(directory: Path, seed: int) -> Path:
    directory.mkdir()
    draw = torch.Generator().manual_seed(seed)
    names = [
        f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_{side}.weight" for layer in (0, 1) for side in "AB"
    ]
    shapes = {"A": (2, 4), "B": (6, 2)}
    factors = {name: torch.randn(shapes[name[-8]], generator=draw) for name in names}
    save_file(factors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two adapters here and on the hub, one at another revision, and two bases."""
    monkeypatch.chdir(tmp_path)
    hub = Hub(tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub.home / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.add("acme/lora-a", write_adapter(tmp_path / "a", 1))
    hub.add("acme/lora-b", write_adapter(tmp_path / "b", 2), branch="old")
    for seed, base in enumerate(("base", "newer")):
        (tmp_path / base).mkdir()
        draw = torch.Generator().manual_seed(seed)
        layers = {f"model.layers.{at}.mlp.up_proj.weight": torch.randn(6, 4, generator=draw) for at in (0, 1)}
        save_file(layers, tmp_path / base / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / base / "config.json").write_text("{}")
    return tmp_path


A, B, BASE = "acme/lora-a", "acme/lora-b@old", ("--base", "base")


@pytest.mark.parametrize(
    "command",
    [
        ("adapters", "merge", A, B),
        ("adapters", "merge", A, B, "--method", "ema"),
        ("adapters", "merge", A, B, "--method", "ties", *BASE),
        ("adapters", "fold", A, *BASE),
        ("adapters", "convert", B, *BASE),
        ("adapters", "truncate", A, "--budget", "1"),
        ("port", B, "--old", "base", "--new", "newer"),
        ("port", A, "--old", "base", "--new", "newer", "--difference"),
    ],
    ids=" ".join,
)
def test_writes_what_the_directory_gives(place: Path, cli: Cli, command: tuple[str, ...]) -> None:
    there = [{A: "a", B: "b"}.get(word, word) for word in command]
    for words, out in ((command, "by-name"), (there, "by-path")):
        code, _, err = cli(*words, "--out", out)
        assert code == 0, err
    said = ("README.md", "mergebench.json")  # they name the input
    named, by_path = ({n: h for n, h in hashes(place / out).items() if n not in said} for out in ("by-name", "by-path"))
    assert named == by_path and named


def test_a_file_of_deltas(place: Path, cli: Cli) -> None:
    for to in ("delta", "dense"):
        assert cli("adapters", "convert", A, *BASE, "--to", to, "--out", f"{to}.safetensors").code == 0
        assert cli("adapters", "convert", "a", *BASE, "--to", to, "--out", f"{to}-too.safetensors").code == 0
        one, other = ({t["name"]: t for t in _tensors(cli, f"base+{file}.safetensors")} for file in (to, f"{to}-too"))
        assert one == other


def _tensors(cli: Cli, model: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(cli("inspect", model, "--json").out)["tensors"]
    return found


def test_shown_by_its_name(place: Path, cli: Cli) -> None:
    code, by_name, err = cli("adapters", "inspect", A, B)
    assert (code, err) == (0, "") and by_name.split("\n")[0].split() == ["lora-a", "lora-b"]
    here = cli("adapters", "inspect", "a", "b").out
    assert by_name.split() == ["lora-a", "lora-b", *here.split()[2:]]
    assert cli("inspect", A).out == cli("adapters", "inspect", A).out
    assert json.loads(cli("inspect", B, "--json").out)[0]["adapter"] == B
    found = json.loads(cli("adapters", "drift", A, B, "--json").out)
    assert found["names"] == ["lora-a", "lora-b"]
    assert found["norms"] == json.loads(cli("adapters", "drift", "a", "b", "--json").out)["norms"]
    checked = json.loads(cli("port", A, "--old", "base", "--new", "newer", "--check", "--json").out)
    here_too = json.loads(cli("port", "a", "--old", "base", "--new", "newer", "--check", "--json").out)
    assert checked | {"patch": "a"} == here_too


def test_provenance_names_the_commit(place: Path, cli: Cli) -> None:
    """A branch moves: what was merged is found again by its commit."""
    assert cli("adapters", "merge", A, B, "--out", "out").code == 0
    made = json.loads((place / "out" / "mergebench.json").read_text())
    names = [entry["adapter"] for entry in made["adapters"]]
    assert names == [f"{A}@{REVISIONS['main']}", f"acme/lora-b@{REVISIONS['old']}"]
    assert cli("adapters", "merge", *names, "--out", "again").code == 0
    assert (place / "again" / "adapter_model.safetensors").read_bytes() == (
        place / "out" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "command",
    [
        ("adapters", "merge", "a", "{}", "--out", "out"),
        ("adapters", "inspect", "{}"),
        ("adapters", "drift", "a", "{}"),
        ("adapters", "fold", "{}", *BASE, "--out", "out"),
        ("adapters", "convert", "{}", *BASE, "--out", "out"),
        ("adapters", "truncate", "{}", "--budget", "1", "--out", "out"),
        ("inspect", "base+{}"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_what_is_not_found(place: Path, cli: Cli, command: tuple[str, ...]) -> None:
    """One message, and the neighbour that may have been meant."""
    (place / "adapters").mkdir()
    write_adapter(place / "adapters" / "lora-math", 3)
    for name, hint in (
        ("./none", "looked for in the working directory"),
        ("./adapters/lora-mth", "adapters/lora-math'?"),
    ):
        code, out, err = cli(*[word.replace("{}", name) for word in command])
        first, second = err.splitlines()
        assert (code, out, first) == (3, "", f"error: adapter '{name}': no such file or directory")
        assert hint in second
    code, out, err = cli(*[word.replace("{}", "acme/none") for word in command])
    assert (code, out) == (3, "")
    assert err.startswith("error: adapter 'acme/none': not found locally, in the hub cache or on the hub")
