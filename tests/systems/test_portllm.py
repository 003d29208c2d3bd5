"""A port against tensor algebra, transformers and PEFT; its check against NumPy; what is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import fine_tuned, hashes, names, read_model, tiny_tensors, write_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergebench
from mergebench.checkpoint.content import identity
from mergebench.deltas.formats.native import Writing, read_file, write_file
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from mergebench.systems.portllm import plan_port
from tests.adapters.test_combine import GPT2
from tests.adapters.test_merge import BERT, KINDS, LLAMA, save
from tests.conftest import Cli
from tests.evaluation.conftest import write_data, write_encoder, write_head

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["a", "b", "c", "d", "e"]


def updated(base: Path, out: Path, seed: int = 5, scale: float = 0.05) -> Path:
    """The base, trained on a little."""
    shutil.copytree(base, out)
    save_file(
        fine_tuned(load_file(base / "model.safetensors"), seed, scale), out / "model.safetensors", {"format": "pt"}
    )
    return out


def merged(place: Path, adapter: Path) -> dict[str, Tensor]:
    """The base with an adapter folded in, by PEFT."""
    base = transformers.AutoModelForCausalLM.from_pretrained(place)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return dict(PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict())


def logits(place: Path) -> Tensor:
    with torch.no_grad():
        out: Tensor = (
            transformers.AutoModelForCausalLM.from_pretrained(place).eval()(torch.arange(10).view(2, 5)).logits
        )
    return out


@pytest.fixture
def three(tmp_path: Path) -> tuple[str, str, str]:
    """old, new, and a fine-tune whose numbers are of other sizes and signs."""
    old = tiny_tensors(0)
    for name, tensors in (("old", old), ("new", fine_tuned(old, 1)), ("tuned", fine_tuned(old, 2, 1.0))):
        write_model(tmp_path / name, tensors)
    return str(tmp_path / "old"), str(tmp_path / "new"), str(tmp_path / "tuned")


# -- fine-tunes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_the_old_base_is_the_fine_tune(tmp_path: Path, dtype: torch.dtype) -> None:
    old = tiny_tensors(0, dtype)
    tuned = fine_tuned(old, 1, 3.0)
    tuned["layers.0.weight"][0] = old["layers.0.weight"][0] * 1e-9  # in float32, (t - o) + o is not t
    for name, tensors in (("old", old), ("tuned", tuned)):
        write_model(tmp_path / name, tensors)
    mergebench.port(str(tmp_path / "old"), str(tmp_path / "old"), tmp_path / "tuned", tmp_path / "out")
    found = read_model(tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in tuned.items())


def test_every_element_is_rounded_once(three: tuple[str, str, str], tmp_path: Path) -> None:
    old, new, tuned = three
    before = hashes(tmp_path)
    made = mergebench.port(*three, tmp_path / "out").provenance
    found, o, n, t = (read_model(Path(place)) for place in (tmp_path / "out", old, new, tuned))
    for name, values in found.items():
        numbers = (one[name].flatten().tolist() for one in (n, t, o))
        exact = [float(Fraction(a) + Fraction(b) - Fraction(c)) for a, b, c in zip(*numbers, strict=True)]
        expected = np.array(exact) if values.is_floating_point() else n[name].numpy()
        assert np.array_equal(values.numpy().ravel(), expected.astype(values.numpy().dtype)), name
        wide = n[name].double() + (t[name].double() - o[name].double())
        assert torch.equal(wide - n[name].double(), t[name].double() - o[name].double())
    assert made["recipe"] == {"port": tuned, "old": old, "new": new} and made["sweeps"] == 1
    assert before.items() <= hashes(tmp_path).items()


def test_the_order_of_patches_does_not_matter(three: tuple[str, str, str], tmp_path: Path) -> None:
    old, new, first = three
    second = str(write_model(tmp_path / "second", fine_tuned(read_model(Path(old)), 7)))
    for name, (one, other) in {"ab": (first, second), "ba": (second, first)}.items():
        mergebench.port(old, new, one, tmp_path / f"{name}1")
        mergebench.port(old, str(tmp_path / f"{name}1"), other, tmp_path / name)
    found, again = read_model(tmp_path / "ab"), read_model(tmp_path / "ba")
    assert all(torch.allclose(found[name].double(), again[name].double(), atol=1e-6, rtol=0) for name in found)


def test_as_transformers_computes(tmp_path: Path) -> None:
    """The state dicts added in PyTorch, and the ported file, answer alike."""
    save(tmp_path, "lora", KINDS["LoRA"][1])
    old = tmp_path / "base"
    new, tuned = updated(old, tmp_path / "new"), updated(old, tmp_path / "tuned", 6)
    mergebench.port(str(old), str(new), tuned, tmp_path / "out")
    mergebench.port(str(old), str(old), tuned, tmp_path / "same")
    torch.testing.assert_close(logits(tmp_path / "same"), logits(tuned), rtol=0, atol=1e-5)
    model = transformers.AutoModelForCausalLM.from_pretrained(new).eval()
    o, t = load_file(old / "model.safetensors"), load_file(tuned / "model.safetensors")
    model.load_state_dict({name: value + (t[name] - o[name]) for name, value in model.state_dict().items()})
    with torch.no_grad():
        expected = model(torch.arange(10).view(2, 5)).logits
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=0, atol=1e-5)
    assert "(arXiv:2410.10870)" in (tmp_path / "out" / "README.md").read_text()


# -- adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config, kind", [(LLAMA, "LoRA"), (LLAMA, "rsLoRA"), (GPT2, "Conv1D"), (LLAMA, "DoRA")])
def test_an_adapter_keeps_its_parameters(tmp_path: Path, config: Any, kind: str) -> None:
    """PEFT loads the ported adapter on the new base; folding gives what PEFT gives."""
    settings = {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    adapter = save(tmp_path, "lora", settings if kind == "Conv1D" else KINDS[kind][1], config)
    new = updated(tmp_path / "base", tmp_path / "new")
    made = mergebench.port(str(tmp_path / "base"), str(new), adapter, tmp_path / "out").provenance
    before, after = hashes(adapter), hashes(tmp_path / "out")
    assert after["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    about = [json.loads((place / "adapter_config.json").read_text()) for place in (adapter, tmp_path / "out")]
    assert about[1] == about[0] | {"base_model_name_or_path": str(new)} and about[0] != about[1]
    assert any("dora is a function" in line for line in made["notes"]) == (kind == "DoRA")
    assert made["identities"] == {
        "old": identity(open_model(str(tmp_path / "base"))),
        "new": identity(open_model(str(new))),
    }
    expected = merged(new, tmp_path / "out")
    for name, value in open_model(f"{new}+{tmp_path / 'out'}").state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_the_difference_of_an_adapter(tmp_path: Path, kind: str) -> None:
    """new + (f(old) - old): of a LoRA the folded port within roundings, of DoRA another model."""
    adapter = save(tmp_path, "lora", KINDS[kind][1])
    old, new = tmp_path / "base", updated(tmp_path / "base", tmp_path / "new")
    mergebench.port(str(old), str(new), adapter, tmp_path / "out", difference=True)
    found, n = read_model(tmp_path / "out"), load_file(new / "model.safetensors")
    o, folded = load_file(old / "model.safetensors"), merged(old, adapter)
    kept = open_model(f"{new}+{adapter}").state_dict()
    far = 0.0
    for name, value in found.items():
        torch.testing.assert_close(value, n[name] + (folded[name] - o[name]), rtol=1e-5, atol=1e-6)
        # W' is rounded in old's fold, in new's fold and in the port's end: three halves of a unit in the last place
        largest = torch.stack([value, kept[name], folded[name]]).abs().amax(0).double()
        unit = torch.finfo(torch.float32).eps * largest
        far = max(far, float(((value.double() - kept[name].double()).abs() / unit).max()))
    assert far <= 1.5 if kind == "LoRA" else far > 1000


def test_tensors_saved_whole_are_told(tmp_path: Path) -> None:
    adapter = save(tmp_path, "lora", KINDS["saved whole"][1], BERT)
    new = updated(tmp_path / "base", tmp_path / "new")
    made = mergebench.port(str(tmp_path / "base"), str(new), adapter, tmp_path / "out").provenance
    assert any("2 tensors saved whole (pooler" in line and "--difference" in line for line in made["notes"])


def test_a_delta_file_gets_the_new_identity(three: tuple[str, str, str], tmp_path: Path) -> None:
    old, new, _ = three
    factors = {"b": torch.randn(8, 2), "a": torch.randn(2, 8)}
    orig = read_model(Path(old))["layers.0.weight"]
    writing = {"layers.0.weight": Writing("low_rank", {"scale": 0.5}, factors, orig=orig)}
    write_file(tmp_path / "patch.safetensors", writing, base=identity(open_model(old)))
    made = mergebench.port(old, new, tmp_path / "patch.safetensors", tmp_path / "out").provenance
    moved = read_file(tmp_path / "out" / "patch.safetensors")
    assert moved.base == made["identities"]["new"] == identity(open_model(new))
    assert any("cannot be reverted" in line for line in made["notes"])
    assert open_model(f"{new}+{tmp_path / 'patch.safetensors'}").remarks
    found = open_model(f"{new}+{tmp_path / 'out' / 'patch.safetensors'}")
    expected = read_model(Path(new))["layers.0.weight"] + 0.5 * factors["b"] @ factors["a"]
    assert not found.remarks
    torch.testing.assert_close(found.state_dict()["layers.0.weight"], expected)


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


def test_a_killed_port_goes_on_and_bits_do_not_depend_on_memory(three: tuple[str, str, str], tmp_path: Path) -> None:
    mergebench.port(*three, tmp_path / "out")
    again = mergebench.run(plan_port(*three, workers=1, shard_size=200), tmp_path / "small")
    found, expected = read_model(tmp_path / "small"), read_model(tmp_path / "out")
    assert len(names(again.out)) > len(names(tmp_path / "out"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert mergebench.port(*three, tmp_path / "out", resume=True).already_done


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
    measured = mergebench.measure("suite.json", ["old", "tuned", "new", "out"], device="cpu")
    values = [record.value for record in measured.records]
    assert [record["value"] for record in found["evaluation"]["records"]] == values and len(set(values)) > 1
    again = mergebench.measure_port("old", "new", "tuned", "suite.json", device="cpu")  # written to a scratch folder
    assert [record.value for record in again.records] == values
    code, out, _ = cli(*run, "-q")
    assert code == 0 and "ported" in out and "lost" in out and not list(tmp_path.glob("mergebench-*"))
