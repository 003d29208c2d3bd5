"""PELA's factors against NumPy's SVD, torch's own `Linear` pairs and the dense products; and everything left alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import CONFIG, SINGLE, fine_tuned, read_model, write_model, write_recipe
from safetensors import safe_open
from torch import Tensor

import mergebench
from mergebench import compress, expand
from mergebench.checkpoint.content import identity
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError, RecipeError, RunError
from mergebench.systems.pela.layers import rank_of
from tests.adapters.test_combine import GPT2
from tests.adapters.test_merge import BERT, LLAMA, SETTINGS, save
from tests.conftest import Cli

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = {  # a model with every sort of tensor
    "model.embed_tokens.weight": (40, 24),
    "model.layers.0.self_attn.q_proj.weight": (24, 24),
    "model.layers.0.self_attn.q_proj.bias": (24,),
    "model.layers.0.mlp.up_proj.weight": (64, 24),
    "model.layers.0.mlp.down_proj.weight": (24, 64),
    "model.layers.0.mlp.gate.weight": (9, 24),
    "model.layers.0.mlp.conv.weight": (16, 4, 3),
    "model.norm.weight": (24,),
    "lm_head.weight": (40, 24),
}
FACTORED = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]


def wide(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in WIDE.items()}
    return tensors | {"model.position_ids": torch.arange(9)}


def entries(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "compress.json").read_text())["tensors"]
    return found


def equal_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


# -- ranks -------------------------------------------------------------------------------------------------

GOLDEN = [  # out, in, ratio, rank, share of the parameters
    (768, 768, 2, 192, 0.5),
    (3072, 768, 2, 307, 0.4997),
    (768, 3072, 2, 307, 0.4997),
    (2304, 768, 2, 288, 0.5),
    (768, 768, 3, 128, 0.3333),
    (768, 768, 1.5, 256, 0.6667),
    (16, 8, 2, 2, 0.375),
]


@pytest.mark.parametrize(("rows", "columns", "ratio", "rank", "share"), GOLDEN)
def test_the_published_rule(rows: int, columns: int, ratio: float, rank: int, share: float) -> None:
    assert rank_of((rows, columns), ratio) == rank
    assert rank * (rows + columns) / (rows * columns) == pytest.approx(share, abs=5e-5)


def test_the_rule_is_carried_out(tmp_path: Path) -> None:
    """Layers of ten outputs and more, by the rule; the rest is listed with the reason."""
    tensors = {"a.fc.weight": torch.randn(16, 8), "b.fc.weight": torch.randn(10, 30), "c.fc.weight": torch.randn(9, 30)}
    tensors["d.fc.weight"] = torch.randn(300, 1)
    made = compress(str(write_model(tmp_path / "m", tensors)), tmp_path / "out", ratio=2).provenance
    found = entries(tmp_path / "out")
    assert {name: one.get("rank", one.get("left")) for name, one in found.items()} == {
        "a.fc.weight": 2,
        "b.fc.weight": 3,
        "c.fc.weight": "fewer than 10 outputs",
        "d.fc.weight": "rank 0 at this ratio",
    }
    written = read_model(tmp_path / "out")
    assert written["a.fc.0.weight"].shape == (2, 8) and written["a.fc.1.weight"].shape == (16, 2)
    compress(str(tmp_path / "m"), tmp_path / "half", energy=0.5)
    assert entries(tmp_path / "half")["d.fc.weight"]["left"] == "no rank saves parameters"
    assert made["kinds"]["all"]["bytes"] == [4 * 998, 4 * (2 * 24 + 3 * 40 + 9 * 30 + 300)]


@pytest.mark.parametrize("ratio", [1, 1.5, 2, 3])
def test_eckart_young(tmp_path: Path, ratio: float) -> None:
    """The error is what the dropped singular values say, by NumPy, and the singular values are shared by halves; at
    ratio 1 something is lost too. The last matrix is larger than those that `svd` decomposes in full by itself."""
    random = torch.Generator().manual_seed(1)
    shapes = [(12, 40), (40, 12), (30, 30), (560, 530)]
    tensors = {f"l.{n}.fc.weight": torch.randn(shape, generator=random) for n, shape in enumerate(shapes)}
    compress(str(write_model(tmp_path / "m", tensors)), tmp_path / "out", ratio=ratio)
    written, found = read_model(tmp_path / "out"), entries(tmp_path / "out")
    for name, matrix in tensors.items():
        (rows, columns), one = matrix.shape, found[name]
        rank = int(rows * columns // (ratio * (rows + columns)))
        inner, outer = (written[name.replace("weight", f"{n}.weight")].double().numpy() for n in (0, 1))
        sigma = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        lost, total = (sigma[rank:] ** 2).sum(), (sigma**2).sum()
        assert one["rank"] == rank == len(inner) < min(rows, columns)
        assert ((matrix.double().numpy() - outer @ inner) ** 2).sum() == pytest.approx(lost, rel=1e-6)
        assert one["relative_error"] == pytest.approx(math.sqrt(lost / total), rel=1e-6) and lost > 0
        assert one["energy_kept"] == pytest.approx(1 - lost / total, rel=1e-6)
        assert one["max_error"] == pytest.approx(np.abs(matrix.numpy() - outer @ inner).max(), rel=1e-4)
        for gram in (inner @ inner.T, outer.T @ outer):
            assert np.abs(gram - np.diag(sigma[:rank])).max() < 1e-4


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_the_smallest_rank_that_keeps_an_energy(tmp_path: Path, energy: float) -> None:
    random = torch.Generator().manual_seed(2)
    tensors = {}
    for number, fall in enumerate((0.5, 0.8, 0.95, 1.0)):  # of the singular values
        noise = torch.randn(30, 24, generator=random)
        tensors[f"l.{number}.fc.weight"] = noise @ torch.diag(fall ** torch.arange(24))
    compress(str(write_model(tmp_path / "m", tensors)), tmp_path / "out", energy=energy)
    found, dense = entries(tmp_path / "out"), 0
    for name, matrix in tensors.items():
        sigma = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
        rank = int(np.argmax(np.cumsum(sigma) >= energy * sigma.sum())) + 1
        if rank * 54 < 30 * 24:
            assert found[name]["rank"] == rank
        else:
            dense += 1
            assert found[name]["left"] == f"rank {rank}, for this energy, saves no parameters"
            assert equal_bits(read_model(tmp_path / "out")[name], matrix)
    assert dense == {0.5: 0, 0.9: 1, 0.99: 2}[energy]


def test_all_of_the_energy(tmp_path: Path) -> None:
    """A matrix of low rank comes back within float32's rounding; one of full rank stays as it is."""
    random = torch.Generator().manual_seed(3)
    low = (
        torch.randint(-9, 9, (20, 2), generator=random).float()
        @ torch.randint(-9, 9, (2, 30), generator=random).float()
    )
    tensors = {"a.fc.weight": low, "b.fc.weight": torch.randn(20, 30, generator=random)}
    compress(str(write_model(tmp_path / "m", tensors)), tmp_path / "out", energy=1)
    assert entries(tmp_path / "out")["a.fc.weight"]["rank"] == 2
    expand(tmp_path / "out", tmp_path / "back")
    back = read_model(tmp_path / "back")
    assert (back["a.fc.weight"] - low).abs().max() <= 4 * torch.finfo(torch.float32).eps * low.abs().max()
    assert equal_bits(back["b.fc.weight"], tensors["b.fc.weight"])


# -- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_and_what_comes_back(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    """Names, order and types; products to the bit; everything else to the bit; the errors are those of the factors as
    they are stored."""
    tensors = wide(dtype)
    base = write_model(tmp_path / "base", tensors, shards=shards, side_files={"tokenizer.json": "{}"})
    compress(str(base), tmp_path / "out", ratio=2)
    small = read_model(tmp_path / "out")
    expand(tmp_path / "out", tmp_path / "back")
    back = read_model(tmp_path / "back")
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        module = name.removesuffix(".weight")
        if module in FACTORED:
            inner, outer = small[f"{module}.0.weight"], small[f"{module}.1.weight"]
            assert inner.dtype == outer.dtype == dtype and name not in small
            assert equal_bits(back[name], (outer.float() @ inner.float()).to(dtype))
            error = value.double() - outer.double() @ inner.double()
            found = entries(tmp_path / "out")[name]
            assert found["relative_error"] == pytest.approx(float(error.norm() / value.double().norm()), rel=1e-5)
        else:
            assert equal_bits(back[name], value)
            if name.endswith("q_proj.bias"):
                name = name.replace("bias", "1.bias")
            assert equal_bits(small[name], value)
    headers = [[t.name for header in open_model(str(place)).headers for t in header.tensors] for place in
               (base, tmp_path / "back")]  # fmt: skip
    assert headers[0] == headers[1]
    for place in ("out", "back"):
        assert (tmp_path / place / "config.json").read_bytes() == (base / "config.json").read_bytes() or dtype
        assert (tmp_path / place / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "back" / "compress.json").exists()
    record = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert record["identity"] == identity(open_model(str(base)))
    assert record["tensors"]["lm_head.weight"]["left"] == "not the weight of a linear layer"


def test_tied_weights_stored_twice_stay_equal(tmp_path: Path) -> None:
    tensors = wide()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    base = write_model(tmp_path / "base", tensors, config=CONFIG | {"tie_word_embeddings": True})
    compress(str(base), tmp_path / "out", ratio=2)
    expand(tmp_path / "out", tmp_path / "back")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert equal_bits(read_model(tmp_path / "back")[name], tensors[name])


def test_another_stored_type(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", wide())
    compress(str(base), tmp_path / "out", ratio=2, dtype="bfloat16")
    small = read_model(tmp_path / "out")
    assert {value.dtype for value in small.values()} == {torch.bfloat16, torch.int64}
    assert equal_bits(small["lm_head.weight"], wide()["lm_head.weight"].bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_too_large_for_the_type(tmp_path: Path) -> None:
    tensors = wide() | {"model.norm.weight": torch.full((24,), 1e6)}
    base = write_model(tmp_path / "base", tensors)
    with pytest.raises(RunError, match=r"norm\.weight: a value is too large for F16"):
        compress(str(base), tmp_path / "out", ratio=2, dtype="float16")


def test_scaled_fp8(tmp_path: Path) -> None:
    """Factors of the values, scales folded in; what is not factored becomes bfloat16, as in a merge."""
    weight = torch.randn(24, 24).to(torch.float8_e4m3fn)
    tensors = {"a.fc.weight": weight, "a.fc.weight_scale": torch.tensor(0.5), "lm_head.weight": weight.clone(),
               "lm_head.weight_scale": torch.tensor(2.0)}  # fmt: skip
    base = write_model(tmp_path / "base", tensors)
    compress(str(base), tmp_path / "out", ratio=1)
    small = read_model(tmp_path / "out")
    assert small.keys() == {"a.fc.0.weight", "a.fc.1.weight", "lm_head.weight"}
    assert {value.dtype for value in small.values()} == {torch.bfloat16}
    assert torch.equal(small["lm_head.weight"], (weight.float() * 2).bfloat16())
    sigma = np.linalg.svd(weight.double().numpy() / 2, compute_uv=False) ** 2
    assert entries(tmp_path / "out")["a.fc.weight"]["energy_kept"] == pytest.approx(sigma[:12].sum() / sigma.sum())


def test_a_model_with_deltas(tmp_path: Path) -> None:
    """BASE+LORA gives what the folded model gives."""
    adapter = save(tmp_path, "lora", SETTINGS["a"])
    both = f"{tmp_path / 'base'}+{adapter}"
    mergebench.run(mergebench.plan_fold(str(tmp_path / "base"), adapter), tmp_path / "folded")
    compress(both, tmp_path / "out", ratio=2)
    compress(str(tmp_path / "folded"), tmp_path / "wanted", ratio=2)
    one, other = (read_model(tmp_path / place) for place in ("out", "wanted"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.allclose(value, other[name], atol=1e-5), name


# -- models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [BERT, LLAMA, GPT2], ids=lambda config: config.model_type)
def test_a_model_of_pairs_loads_the_file_and_does_what_the_product_does(tmp_path: Path, config: Any) -> None:
    """`Sequential(Linear, Linear)` in every factored layer's place loads the file strictly; GPT-2's too, which stores
    [in, out]."""
    torch.manual_seed(0)
    auto = transformers.AutoModel
    auto.from_config(config).save_pretrained(tmp_path / "base")
    compress(str(tmp_path / "base"), tmp_path / "out", ratio=1.5)
    expand(tmp_path / "out", tmp_path / "back")
    record = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert record["stored"] == ("[in, out]" if config is GPT2 else "[out, in]")
    pairs, small = auto.from_config(config).eval(), read_model(tmp_path / "out")
    names = [name.removesuffix(".weight") for name, one in record["tensors"].items() if "rank" in one]
    assert len(names) == {"bert": 7, "llama": 10, "gpt2": 8}[config.model_type]  # two of 8 outputs
    for name in names:
        inner, outer = small[f"{name}.0.weight"], small[f"{name}.1.weight"]
        pair = torch.nn.Sequential(
            torch.nn.Linear(inner.shape[1], len(inner), bias=False),
            torch.nn.Linear(len(inner), len(outer), bias=f"{name}.1.bias" in small),
        )
        pairs.set_submodule(name, pair)
    pairs.load_state_dict(small, strict=True)
    dense = auto.from_pretrained(tmp_path / "back").eval()
    items = torch.arange(12).view(2, 6)
    with torch.no_grad():
        one, other = pairs(items).last_hidden_state, dense(items).last_hidden_state
    assert (one - other).abs().max() <= 1e-5
    base = auto.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        assert (one - base(items).last_hidden_state).abs().max() > 1e-3  # it is not the dense model


def test_trained_factors_of_another_rank(tmp_path: Path) -> None:
    """A checkpoint saved by a training loop has no mark of ours, and perhaps other ranks."""
    base = write_model(tmp_path / "base", wide())
    compress(str(base), tmp_path / "out", ratio=2)
    small = read_model(tmp_path / "out")
    name = FACTORED[0]
    small |= {f"{name}.0.weight": torch.randn(3, 24), f"{name}.1.weight": torch.randn(24, 3)}
    write_model(tmp_path / "out", small)
    expand(tmp_path / "out", tmp_path / "back")
    product = small[f"{name}.1.weight"] @ small[f"{name}.0.weight"]
    assert torch.equal(read_model(tmp_path / "back")[f"{name}.weight"], product)


def test_factors_that_do_not_fit(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", wide())
    compress(str(base), tmp_path / "out", ratio=2)
    small, name = read_model(tmp_path / "out"), FACTORED[0]
    write_model(tmp_path / "out", small | {f"{name}.0.weight": torch.randn(3, 24)})
    with pytest.raises(ModelError, match=r"the factors of .*q_proj.weight \[24, 24\] do not fit"):
        expand(tmp_path / "out", tmp_path / "back")
    del small[f"{name}.1.weight"]
    write_model(tmp_path / "out", small)
    with pytest.raises(ModelError, match=r"q_proj.1.weight' is missing"):
        expand(tmp_path / "out", tmp_path / "back")


# -- merges ------------------------------------------------------------------------------------------------


def test_expanded_models_merge(tmp_path: Path) -> None:
    parts = []
    for seed in (1, 2):
        base = write_model(tmp_path / f"m{seed}", fine_tuned(wide(), seed))
        compress(str(base), tmp_path / f"c{seed}", ratio=2)
        parts.append(expand(tmp_path / f"c{seed}", tmp_path / f"e{seed}").out)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", parts)
    merged = mergebench.run(mergebench.plan(mergebench.load(recipe)), tmp_path / "merged").out
    one, other = map(read_model, parts)
    for name, value in read_model(merged).items():
        if value.is_floating_point():
            assert torch.allclose(value, (one[name] + other[name]) / 2, atol=1e-6), name


def test_task_vectors(tmp_path: Path) -> None:
    """A task vector of low rank is kept exactly by a rank that is no smaller; it comes back as a task vector."""
    base = wide()
    random = torch.Generator().manual_seed(5)
    tuned = dict(base)
    for module in FACTORED[:2]:
        weight = base[f"{module}.weight"]
        b, a = torch.randn(len(weight), 2, generator=random), torch.randn(2, weight.shape[1], generator=random)
        tuned[f"{module}.weight"] = weight + 0.1 * b @ a
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", tuned)
    vector = mergebench.task_vector(str(tmp_path / "tuned"), str(tmp_path / "base"), tmp_path / "vector").out
    compress(str(vector), tmp_path / "out", ratio=2)
    assert {one["rank"] for one in entries(tmp_path / "out").values() if "rank" in one} == {6, 8}
    with pytest.raises(ModelError, match="compressed to factors"):
        open_model(str(tmp_path / "out"), task_vector=True)
    back = expand(tmp_path / "out", tmp_path / "back").out
    with safe_open(back / SINGLE, "pt") as file:
        assert file.metadata()["holds"] == "task vector"
    models = [{"task_vector": str(back), "parameters": {"weight": 1.0}}]
    recipe = write_recipe(tmp_path / "r.yaml", "task_arithmetic", models, tmp_path / "base")
    merged = mergebench.run(mergebench.plan(mergebench.load(recipe)), tmp_path / "merged").out
    for name, value in read_model(merged).items():
        assert torch.allclose(value.float(), tuned[name].float(), atol=1e-5), name
    compress(str(vector), tmp_path / "small", energy=0.9999)
    ranks = {name: one["rank"] for name, one in entries(tmp_path / "small").items() if "rank" in one}
    assert ranks == {f"{module}.weight": rank for module, rank in zip(FACTORED, (2, 2, 1), strict=True)}  # unchanged: 1


# -- the command line --------------------------------------------------------------------------------------


def test_from_the_command_line(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "base", wide())
    code, out, err = cli("compress", "base", "--ratio", "2", "--omit", "*.up_proj.*", "--out", "small", "-q")
    rows = [line.split() for line in out.splitlines()]
    assert (code, err, rows[-1]) == (0, "", ["small"])
    table = {row[0]: row[1:] for row in rows[1:-1]}
    assert table.keys() == {"embeddings", "attention", "MLP", "norms", "head", "other", "all"} and rows[-2][0] == "all"
    assert table["embeddings"] == ["1", "3.84", "kB", "3.84", "kB"]
    assert table["attention"][:3] == ["2", "1", "6"] and table["attention"][-4:] == ["2.4", "kB", "1.25", "kB"]
    assert entries(tmp_path / "small")[f"{FACTORED[1]}.weight"]["left"] == "omitted by *.up_proj.*"
    again = cli("compress", "base", "--ratio", "2", "--omit", "*.up_proj.*", "--out", "small", "--resume")
    assert again.code == 0 and again.err == "small: already finished, nothing to resume\n"
    ran = cli("compress", "base", "--energy", "0.6", "--out", "other", "--json")
    document = json.loads(ran.out)
    assert (ran.code, ran.err, document["energy"]) == (0, "", 0.6) and document["kinds"]["all"]["factored"] == 3
    ran = cli("compress", "expand", "small", "--out", "back", "--json")
    assert (ran.code, ran.err, json.loads(ran.out)["multiplied"]) == (0, "", 2)
    code, out, err = cli("compress", "expand", "small", "--out", "again")
    assert (code, out) == (0, "again\n") and "2 layers multiplied back, 8 tensors copied: wrote again" in err
    assert cli("compress", "expand", "small", "--out", "again").code == 2
    assert cli("compress", "--help").code == cli("compress", "expand", "--help").code == 0


WRONG = [  # arguments, exit code, parts of the message
    (["base"], 2, "--ratio and --energy: neither is given"),
    (["base", "--ratio", "2", "--energy", "0.5"], 2, "--ratio and --energy: one of them says"),
    (["base", "--ratio", "0.9"], 2, "--ratio: must be at least 1, got 0.9"),
    (["base", "--ratio", "nan"], 2, "--ratio: must be at least 1, got nan"),
    (["base", "--energy", "0"], 2, "--energy: must be above 0, at most 1, got 0"),
    (["base", "--energy", "1.1"], 2, "95% is 0.95"),
    (["base", "--energy", "1"], 2, "nothing to compress: none saves parameters at this energy"),
    (["base", "--ratio", "999"], 2, "nothing to compress: rank 0 at this ratio"),
    (["base", "--ratio", "2", "--omit", "*.weight"], 2, "nothing to compress: omitted by *.weight"),
    (["base", "--ratio", "2", "--omit", "model.layers.0.mlp.up_pro.weight"], 2, "did you mean 'model.layers.0.mlp.up_"),
    (["base", "--ratio", "2", "--dtype", "int8"], 2, "--dtype: 'int8' is not a stored type"),
    (["small", "--ratio", "2"], 3, "mergebench compress expand small --out DIR"),
    (["lora", "--ratio", "2"], 3, "no such file or directory"),
    (["expand", "base"], 3, "base: no compressed model: it has no compress.json"),
    (["expand", "nowhere"], 3, "nowhere: no compressed model"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    write_model(folder / "base", wide())
    compress(str(folder / "base"), folder / "small", ratio=2)
    return folder


@pytest.mark.parametrize(("args", "code", "what"), WRONG, ids=lambda value: str(value)[:60])
def test_mistakes(
    place: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int, what: str
) -> None:
    monkeypatch.chdir(place)
    ran = cli("compress", *args, "--out", "out", "-q")
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith("error: ") and what in ran.err and ran.err.count("\n") == 2, ran.err
    assert sorted(path.name for path in place.iterdir()) == ["base", "small"]


def test_a_compressed_model_is_no_model(place: Path) -> None:
    """In one sentence, wherever a model goes; a file of it too."""
    for reference in (place / "small", place / "small" / SINGLE):
        with pytest.raises(ModelError, match="compressed to factors") as error:
            open_model(str(reference))
        assert "mergebench compress expand" in (error.value.hint or "")
    recipe = write_recipe(place.parent / "r.yaml", "linear", [place / "base", place / "small"])
    with pytest.raises(ModelError, match="compressed to factors"):
        mergebench.plan(mergebench.load(recipe))


def test_not_finite(tmp_path: Path) -> None:
    tensors = wide()
    tensors[f"{FACTORED[1]}.weight"][3, 4] = math.nan
    with pytest.raises(RunError, match=r"up_proj\.weight: it holds NaN or infinity"):
        compress(str(write_model(tmp_path / "base", tensors)), tmp_path / "out", ratio=2)


def test_a_name_that_a_factor_would_take(tmp_path: Path) -> None:
    tensors = wide() | {f"{FACTORED[0]}.0.weight": torch.randn(3)}
    compress(str(write_model(tmp_path / "base", tensors)), tmp_path / "out", ratio=2)
    assert "has the name of a factor" in entries(tmp_path / "out")[f"{FACTORED[0]}.weight"]["left"]


def test_an_input_is_not_written_to(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", wide())
    with pytest.raises(RecipeError, match="overlaps the input"):
        compress(str(base), base / "out", ratio=2)
