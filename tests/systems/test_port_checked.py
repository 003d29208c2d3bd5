"""What a port is checked for, against NumPy; vocabularies; what is refused; the four models on a suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import fine_tuned, hashes, read_model, tiny_tensors, write_model
from safetensors.torch import load_file
from torch import Tensor

import mergebench
from mergebench.deltas.formats.native import Writing, write_file
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.adapters.test_merge import KINDS, save
from tests.conftest import Cli
from tests.evaluation.conftest import write_data, write_encoder, write_head
from tests.systems.test_portllm import updated

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["a", "b", "c", "d", "e"]


# -- the check ---------------------------------------------------------------------------------------------


def test_the_check_is_numpys(tmp_path: Path, cli: Cli) -> None:
    adapter = save(tmp_path, "lora", KINDS["LoRA"][1])
    old, new = tmp_path / "base", updated(tmp_path / "base", tmp_path / "new")
    before = hashes(tmp_path)
    code, out, err = cli("port", adapter, "--old", old, "--new", new, "--check", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "") and hashes(tmp_path) == before
    o, n = ({k: v.double().numpy() for k, v in load_file(place / "model.safetensors").items()} for place in (old, new))
    factors, scale = load_file(adapter / "adapter_model.safetensors"), 6 / 4
    sums: dict[str, Any] = {}
    for key in (key for key in factors if "lora_A" in key):
        name = key.removeprefix("base_model.model.").replace("lora_A.", "")
        a, b = factors[key].double().numpy(), factors[key.replace("lora_A", "lora_B")].double().numpy()
        update, patch = n[name] - o[name], scale * b @ a
        u, _, vh = np.linalg.svd(patch)
        rank = np.linalg.matrix_rank(patch)
        columns, rows = u[:, :rank].T @ update, update @ vh[:rank].T
        one = np.array([(o[name] ** 2).sum(), (update**2).sum(), (patch**2).sum(), (update * patch).sum(),
                        (columns**2).sum(), (rows**2).sum(), (update**2).sum() * rank / len(update)])  # fmt: skip
        layer = ".".join(name.split(".")[:3])
        sums[layer] = sums.get(layer, 0) + one
    assert list(found["layers"]) == ["model.layers.0", "model.layers.1"] and found["tensors"] == 6
    for told, (oo, uu, pp, dot, columns, rows, chance) in [
        *((found["layers"][layer], one) for layer, one in sums.items()),
        (found["total"], sum(sums.values())),
    ]:
        expected = {
            "update": (uu / oo) ** 0.5, "patch": (pp / oo) ** 0.5, "update_to_patch": (uu / pp) ** 0.5,
            "cosine": dot / (uu * pp) ** 0.5, "in_columns": columns / uu, "in_rows": rows / uu,
            "chance_columns": chance / uu,
        }  # fmt: skip
        assert {key: told[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-7)
    whole = sum(((n[k] - o[k]) ** 2).sum() for k in o) / sum((o[k] ** 2).sum() for k in o)
    assert found["whole"] == pytest.approx(whole**0.5) and found["changes"] is None
    code, out, _ = cli("port", adapter, "--old", old, "--new", new, "--check", "-q")
    assert code == 0 and "model.layers.1" in out and "in columns" in out and "6 tensors that the patch changes" in out


def test_the_check_of_a_fine_tune_and_of_dora(tmp_path: Path) -> None:
    adapter = save(tmp_path, "lora", KINDS["DoRA"][1])
    old, new = tmp_path / "base", updated(tmp_path / "base", tmp_path / "new")
    dora = mergebench.check_port(str(old), str(new), adapter)
    d_new, d_old = ({n: v - load_file(p / "model.safetensors")[n] for n, v in open_model(f"{p}+{adapter}").state_dict()
                    .items()} for p in (new, old))  # fmt: skip
    off = sum(float((d_new[n] - d_old[n]).square().sum()) for n in d_old)
    size = sum(float(d.square().sum()) for d in d_old.values())
    assert dora.changes == pytest.approx((off / size) ** 0.5, rel=1e-3) and dora.total.to_plain()["in_columns"] is None
    full = mergebench.check_port(str(old), str(new), updated(old, tmp_path / "tuned", 5))  # the same update
    assert full.total.to_plain()["cosine"] == pytest.approx(1) and full.total.to_plain()[
        "update_to_patch"
    ] == pytest.approx(1)
    assert full.tensors == len(load_file(old / "model.safetensors")) and not full.problems


# -- what does not fit -------------------------------------------------------------------------------------


def words_model(place: Path, words: list[str], rows: Tensor) -> Path:
    """An embedding with a row a word, and a matrix."""
    from tokenizers import Tokenizer
    from tokenizers import models as kinds

    tensors = {"model.embed_tokens.weight": rows, "model.layers.0.mlp.up_proj.weight": rows[:4] * 2}
    write_model(place, tensors, config={"model_type": "llama", "vocab_size": len(rows), "tie_word_embeddings": True})
    inner = Tokenizer(kinds.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=words[0]).save_pretrained(place)
    return place


def test_rows_are_ported_token_by_token(tmp_path: Path) -> None:
    rows = torch.arange(20.0).view(5, 4)
    old, tuned = words_model(tmp_path / "old", WORDS, rows), words_model(tmp_path / "tuned", WORDS, rows + 0.5)
    moved = ["a", "new", *WORDS[:0:-1]]  # a new token, the others in another order
    new = words_model(tmp_path / "new", moved, torch.arange(24.0).view(6, 4) + 100)
    made = mergebench.port(str(old), str(new), tuned, tmp_path / "out").provenance
    found, n = (read_model(place)["model.embed_tokens.weight"] for place in (tmp_path / "out", new))
    expected = n + 0.5
    expected[1] = n[1]
    assert torch.equal(found, expected) and any("5 tokens that all three have" in line for line in made["notes"])
    more = words_model(tmp_path / "more", [*WORDS, "f"], torch.arange(24.0).view(6, 4))
    with pytest.raises(ModelError, match=r"more has 1 tokens that .*old does not have \(f\)"):
        mergebench.port(str(old), str(old), more, tmp_path / "not")
    (new / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"embed_tokens.weight: other numbers of tokens .* it has no tokenizer"):
        mergebench.port(str(old), str(new), tuned, tmp_path / "not")
    mergebench.port(str(old), str(new), tuned, tmp_path / "without", exclude=["*embed_tokens*"])
    assert torch.equal(read_model(tmp_path / "without")["model.embed_tokens.weight"], n)


def test_an_adapter_beside_the_tokens_does_not_mind_them(tmp_path: Path) -> None:
    """The new base lacks a token of the old one: nothing to an adapter of a matrix, not ported by one of embeddings."""
    old = words_model(tmp_path / "old", WORDS, torch.arange(20.0).view(5, 4))
    new = words_model(tmp_path / "new", ["a", *WORDS[:1:-1]], torch.arange(16.0).view(4, 4))
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
        rows = 4 if "up" in name else 5
        factors = {"b": torch.ones(rows, 1), "a": torch.ones(1, 4)}
        write_file(tmp_path / f"{rows}.safetensors", {name: Writing("low_rank", {}, factors)})
    for number, difference in enumerate((False, True)):
        patch, out = tmp_path / "4.safetensors", tmp_path / f"out{number}"
        mergebench.port(str(old), str(new), patch, out, difference=difference)
        found = open_model(str(out) if difference else f"{new}+{out / patch.name}").state_dict()
        expected = read_model(new)
        assert torch.equal(found["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])
        up = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(found[up], expected[up] + 1)
        with pytest.raises(ModelError, match=r"has 1 tokens that .*new does not have \(b\)"):
            mergebench.port(str(old), str(new), tmp_path / "5.safetensors", tmp_path / "no", difference=difference)


def test_errors(cli: Cli, tmp_path: Path) -> None:
    old = tiny_tensors(0)
    head = {**fine_tuned(old, 2), "classifier.weight": torch.ones(2, 8)}
    for name, tensors in (("old", old), ("new", fine_tuned(old, 1)), ("tuned", fine_tuned(old, 2)), ("head", head)):
        write_model(tmp_path / name, tensors)
    write_model(tmp_path / "wide", {**old, "norm.weight": torch.ones(5)})
    adapter, out = save(tmp_path, "lora", KINDS["LoRA"][1]), tmp_path / "out"
    vector = tmp_path / "vector"
    mergebench.task_vector(str(tmp_path / "tuned"), str(tmp_path / "old"), vector)
    table: list[tuple[list[Any], int, str, str]] = [
        (["head", "--old", "old", "--new", "new"], 3, "classifier.weight: head has [2, 8], new does not", "--exclude"),
        (["tuned", "--old", "old", "--new", "wide"], 3, "norm.weight: old has [3], wide has [5] (and 1 more", "--excl"),
        ([adapter, "--old", "old", "--new", "new"], 3, "the base has no tensor", ""),
        ([adapter, "--old", "base", "--new", "new"], 3, "the base has no tensor", "--check says what differs"),
        (["vector", "--old", "old", "--new", "new"], 2, "'vector' holds differences", "new+vector"),
        (["none", "--old", "old", "--new", "new"], 3, "model 'none': no such file", ""),
        (["tuned", "--old", "old", "--new", "new", "--check"], 2, "--check goes alone", ""),
        (
            [adapter, "--old", "base", "--new", "base", "--exclude", "*"],
            2,
            "an adapter is ported whole",
            "--difference",
        ),
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        before = hashes(tmp_path)
        for args, expected, what, hint in table:
            code, said, err = cli("port", *args, "--out", out)
            assert (code, said) == (expected, "") and what in err.splitlines()[0], (args, err)
            assert not hint or hint in err.splitlines()[1], err
            assert hashes(tmp_path) == before
        code, said, err = cli("port", "tuned", "--old", "old", "--new", "new")
        assert code == 2 and "--out: missing" in err
        code, said, _ = cli("port", "head", "--old", "old", "--new", "new", "--check")
        assert code == 3 and "misfit  classifier.weight: head has [2, 8], new does not have it" in said
        code, said, err = cli("port", "head", "--old", "old", "--new", "new", "--exclude", "classifier.*", "--out", out)
        assert (code, said) == (0, f"{out}\n") and "6 tensors ported" in err
        code, said, err = cli("port", "tuned", "--old", "old", "--new", "new", "--out", out)
        assert code == 2 and "it holds a finished result" in err


# -- the suite ---------------------------------------------------------------------------------------------


def test_four_models_on_a_suite(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    old = write_encoder(Path("old"))
    new, tuned = updated(old, Path("new"), 5, 0.2), updated(old, Path("tuned"), 6, 0.2)
    write_data(Path("data.jsonl"))
    write_head(Path("a"))
    task = {"name": "a", "kind": "text-classification", "data": "data.jsonl", "head": "a/head.safetensors"}
    Path("suite.json").write_text(json.dumps({"tasks": [task]}))
    run = ["port", tuned, "--old", old, "--new", new, "--suite", "suite.json", "--device", "cpu"]
    code, out, err = cli(*run, "--out", "out", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "") and found["recipe"]["old"] == "old"
    rows = [record["model"] for record in found["evaluation"]["records"]]
    assert rows == ["old", "tuned", "new", "ported"]
    assert {(c["old"], c["new"]) for c in found["evaluation"]["comparisons"]} == {
        ("tuned", other) for other in ("old", "new", "ported")
    }
    measured = mergebench.measure("suite.json", ["old", "tuned", "new", "out"], device="cpu", results=None)
    values = [record.value for record in measured.records]
    assert [record["value"] for record in found["evaluation"]["records"]] == values and len(set(values)) > 1
    # written to a scratch folder
    again = mergebench.measure_port("old", "new", "tuned", "suite.json", device="cpu", results=None)
    assert [record.value for record in again.records] == values
    code, out, _ = cli(*run, "-q")
    assert code == 0 and "ported" in out and "lost" in out and not list(tmp_path.glob("mergebench-*"))
