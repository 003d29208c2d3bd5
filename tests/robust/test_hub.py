"""Models of the hub, out of a cache laid out as huggingface_hub does it; never by network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import INDEX, SINGLE, fine_tuned, read_model, tiny_tensors, write_model, write_recipe

from tests.conftest import Cli

REVISIONS = {"main": "a" * 40, "old": "b" * 40}


class Hub:
    """A cache directory; `add` puts a repository's revision there: blobs by hash, snapshots of links to them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}

    def add(self, name: str, source: Path, branch: str = "main") -> Path:
        repository = self.home / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / REVISIONS[branch]
        for folder in (snapshot, repository / "blobs", repository / "refs"):
            folder.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            blob = f"{branch}-{hash(path.name) & 0xFFFFFFFF:08x}"
            (repository / "blobs" / blob).write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
        (repository / "refs" / branch).write_text(REVISIONS[branch])
        return snapshot


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub(tmp_path / "cache")


@pytest.fixture
def base(tmp_path: Path) -> dict[str, torch.Tensor]:
    tensors = tiny_tensors()
    write_model(tmp_path / "base", tensors)
    return tensors


def test_snapshots_of_links(tmp_path: Path, hub: Hub, base: dict[str, torch.Tensor], shell: Cli) -> None:
    """A whole merge: a sharded repository, one at another revision, and a directory."""
    first, second = fine_tuned(base, 1), fine_tuned(base, 2)
    hub.add("org/first", write_model(tmp_path / "first", first, shards=3, side_files={"tokenizer.json": "{}"}))
    hub.add("org/second", write_model(tmp_path / "second", second), branch="old")
    write_recipe(tmp_path / "recipe.yaml", "linear", ["org/first", "org/second@old", "base"])
    code, out, err = shell("merge", "recipe.yaml", "--out", "out", "-q", cwd=tmp_path, **hub.environment)
    assert (code, out, err) == (0, "out\n", "")
    merged = read_model(tmp_path / "out")
    assert list(merged) == list(read_model(tmp_path / "first"))
    for name, value in merged.items():
        models = [model[name] for model in (first, second, base)]
        if value.is_floating_point():
            torch.testing.assert_close(value, sum(models) / 3)  # type: ignore[arg-type]
        else:
            assert torch.equal(value, first[name])
    tokenizer = tmp_path / "out" / "tokenizer.json"
    assert tokenizer.read_text() == "{}" and not tokenizer.is_symlink()


def test_not_in_the_cache(tmp_path: Path, hub: Hub, shell: Cli) -> None:
    code, out, err = shell("inspect", "org/name", cwd=tmp_path, **hub.environment)
    assert (code, out) == (3, "")
    assert err.startswith("error: model 'org/name': not found locally, in the hub cache or on the hub")
    assert len(err.splitlines()) == 2


def test_part_of_it_is_in_the_cache(tmp_path: Path, hub: Hub, base: dict[str, torch.Tensor], shell: Cli) -> None:
    """Without a network, what some other tool left there is an error that says so."""
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    hub.add("org/half", tmp_path / "half")
    code, _, err = shell("inspect", "org/half", cwd=tmp_path, **hub.environment)
    assert (code, err) == (3, "error: model 'org/half': the directory holds no .safetensors file\n")
    write_model(tmp_path / "sharded", base, shards=2)
    (hub.add("org/sharded", tmp_path / "sharded") / "model-00002-of-00002.safetensors").unlink()
    code, _, err = shell("inspect", "org/sharded", cwd=tmp_path, **hub.environment)
    assert code == 1 and "it names 'model-00002-of-00002.safetensors', which is missing" in err
    assert "download it again" in err


@pytest.mark.parametrize("missing", ["weights", "shard"])
def test_part_of_it_is_downloaded(
    tmp_path: Path, base: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, cli: Cli, missing: str
) -> None:
    """With a network, it is completed."""
    snapshot = write_model(tmp_path / "snapshot", base, shards=2 if missing == "shard" else 1)
    file = snapshot / ("model-00001-of-00002.safetensors" if missing == "shard" else SINGLE)
    raw = file.read_bytes()
    file.unlink()

    def download(name: str, *, local_files_only: bool = False, **_: Any) -> str:
        assert name == "org/name"
        if not local_files_only:
            file.write_bytes(raw)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert cli("inspect", "org/name").code == 0


@pytest.mark.parametrize("name", ["org/na me", "org/name@no/such"])
def test_malformed_names(tmp_path: Path, hub: Hub, shell: Cli, name: str) -> None:
    code, out, err = shell("inspect", name, cwd=tmp_path, **hub.environment)
    assert (code, out) == (3, "")
    assert err.startswith("error: ") and len(err.splitlines()) <= 2


@pytest.mark.parametrize(
    "name", ["bert-base", "a/b/c", "./org/name", "~/org/name", "/org/name", "org/x.safetensors", "out/checkpoint-*"]
)
def test_what_is_no_hub_name_fails_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli, name: str
) -> None:
    """The hub library is not even asked: with the hub unreachable, the answer comes at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **more: pytest.fail("the hub was asked"))
    code, out, err = cli("inspect", name)
    assert (code, out) == (3, "")
    assert err.splitlines()[0] == f"error: model '{name}': no such file or directory"


def test_a_directory_goes_before_the_hub(tmp_path: Path, hub: Hub, base: dict[str, torch.Tensor], shell: Cli) -> None:
    """`org/name` that exists here is that directory."""
    write_model(tmp_path / "elsewhere", {"other": torch.zeros(1)})
    hub.add("org/name", tmp_path / "elsewhere")
    write_model(tmp_path / "org" / "name", base)
    code, out, _ = shell("inspect", "org/name", "--json", cwd=tmp_path, **hub.environment)
    assert code == 0
    assert {tensor["name"] for tensor in json.loads(out)["tensors"]} == base.keys()


def test_an_index_that_leads_out_of_a_snapshot(
    tmp_path: Path, hub: Hub, base: dict[str, torch.Tensor], shell: Cli
) -> None:
    """Links to blobs are followed, a name that leads outside is not."""
    write_model(tmp_path / "sharded", base, shards=2)
    snapshot = hub.add("org/sharded", tmp_path / "sharded")
    blob = str((snapshot / "model-00002-of-00002.safetensors").readlink())
    index = json.loads((snapshot / INDEX).read_text())
    index["weight_map"]["norm.weight"] = blob
    (snapshot / INDEX).unlink()
    (snapshot / INDEX).write_text(json.dumps(index))
    code, _, err = shell("inspect", "org/sharded", cwd=tmp_path, **hub.environment)
    assert code == 1 and f"'{blob}', which is outside its directory" in err
    assert not (snapshot / SINGLE).exists()
