"""What lies beside the weights: copied, replaced, counted."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import mergebench
from mergebench.checkpoint.content import Contents, identity, tokenizer_hash
from mergebench.checkpoint.reference import HUB_FILES
from mergebench.checkpoint.side_files import copy_side_files, decisive_files, tokenizer_files
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.models import tiny_tensors, write_model

TOKENIZER = [
    "a.tiktoken",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "tokenizer.json",
    "vocab.txt",
]
DECISIVE = ["config.json", "generation_config.json", "preprocessor_config.json"]
OTHERS = ["modeling_custom.py", "notes.txt"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    place: Path = write_model(tmp_path / "model", tiny_tensors())
    for name in (*TOKENIZER, *DECISIVE, *OTHERS):
        (place / name).write_text("{}")
    (place / "tokenizer").mkdir()
    return place


def test_another_tokenizer_takes_the_place_of_all_its_files(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    changed = replace(open_model(str(model)), tokenizer_files={"tokenizer.json": b"new"})
    copied = copy_side_files(changed, tmp_path / "out", None)
    assert sorted(copied) == sorted([*DECISIVE, *OTHERS, "tokenizer.json"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(copied)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == b"new"


def test_what_is_copied_is_downloaded(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    copied = copy_side_files(open_model(str(model)), tmp_path / "out", None)
    assert sorted(copied) == sorted([*TOKENIZER, *DECISIVE, *OTHERS])
    assert all(any(fnmatchcase(name, pattern) for pattern in HUB_FILES) for name in copied)


def test_what_counts(model: Path) -> None:
    """Results kept under these hashes are found again by later versions."""
    assert [path.name for path in tokenizer_files(model)] == TOKENIZER
    assert [path.name for path in decisive_files(model)] == sorted([*TOKENIZER, *DECISIVE])
    assert not tokenizer_files(model / "nowhere")
    opened = open_model(str(model))
    assert identity(opened) == "e42cd72e83753b34"
    pairs = b"".join(f"\n{name} 2\n{{}}".encode() for name in TOKENIZER)
    assert tokenizer_hash(model) == hashlib.sha256(pairs).hexdigest()
    names = ["model.safetensors", *sorted([*TOKENIZER, *DECISIVE])]
    listed = [(name, hashlib.sha256((model / name).read_bytes()).hexdigest()) for name in names]
    assert Contents(None).of_model(opened) == hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def test_links(model: Path, tmp_path: Path) -> None:
    """Those that stay in the model's directory, or lead from a snapshot of the hub cache to its blobs, are followed."""
    elsewhere = tmp_path / "elsewhere.txt"
    elsewhere.write_text("a secret")
    (model / "inside.txt").symlink_to("notes.txt")
    (tmp_path / "linked").symlink_to(model)
    (tmp_path / "out").mkdir()
    for place in (model, tmp_path / "linked"):
        assert "inside.txt" in copy_side_files(open_model(str(place)), tmp_path / "out", None)
        assert (tmp_path / "out/inside.txt").read_text() == "{}"
    for link in (elsewhere, Path("../elsewhere.txt"), Path("../linked/../elsewhere.txt")):
        (model / "added_tokens.txt").unlink(missing_ok=True)
        (model / "added_tokens.txt").symlink_to(link)
        with pytest.raises(ModelError, match=r"added_tokens.txt: a link out of the model's directory, to /"):
            copy_side_files(open_model(str(model)), tmp_path / "out", None)
    assert not (tmp_path / "out/added_tokens.txt").exists()
    snapshot = tmp_path / "cache/models--a--b/snapshots/0123"
    write_model(snapshot, tiny_tensors())
    blob = tmp_path / "cache/models--a--b/blobs/abc"
    blob.parent.mkdir()
    blob.write_text("word")
    (snapshot / "vocab.txt").symlink_to("../../blobs/abc")
    assert "vocab.txt" in copy_side_files(open_model(str(snapshot)), tmp_path / "out", None)
    (snapshot / "notes.txt").symlink_to("../../../../elsewhere.txt")
    with pytest.raises(ModelError, match=r"notes.txt: a link out of"):
        copy_side_files(open_model(str(snapshot)), tmp_path / "out", None)


def test_a_link_is_refused_before_the_work(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.txt").write_text("a secret")
    (model / "vocab.txt").unlink()
    (model / "vocab.txt").symlink_to("../elsewhere.txt")
    planned = mergebench.plan(mergebench.load({"merge_method": "linear", "models": [{"model": str(model)}]}))
    with pytest.raises(ModelError, match=r"vocab.txt: a link out of"):
        mergebench.run(planned, tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()
