"""What looks wrong and is not: it must work."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from models import (
    INDEX,
    SINGLE,
    fine_tuned,
    hashes,
    names,
    pack,
    read_model,
    tiny_tensors,
    unpack,
    write_model,
    write_recipe,
)
from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import Cli

Tensors = dict[str, Tensor]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tensors:
    monkeypatch.chdir(tmp_path)
    tensors = tiny_tensors()
    write_model(Path("base"), tensors)
    write_model(Path("ft"), fine_tuned(tensors, 1))
    return tensors


def average(cli: Cli, *models: str, out: str = "out", args: tuple[str, ...] = (), **recipe: object) -> Tensors:
    """Merge by plain average and read the result."""
    write_recipe(Path("recipe.yaml"), "linear", models, **recipe)
    assert cli("merge", "recipe.yaml", "--out", out, "-q", *args) == (0, f"{out}\n", "")
    return read_model(Path(out))


def check_mean(merged: Tensors, *models: Tensors) -> None:
    assert merged.keys() == models[0].keys()
    for name, value in merged.items():
        first = models[0][name]
        if first.is_floating_point():
            mean = sum(model[name].double() for model in models) / len(models)
            torch.testing.assert_close(value.double(), mean, rtol=2**-7, atol=1e-6)  # type: ignore[arg-type]
            assert value.dtype == first.dtype
        else:
            assert torch.equal(value, first)


# -- types and shapes --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_mixed_float_types(base: Tensors, cli: Cli, dtype: torch.dtype) -> None:
    """Every model its own type; the result has the first's."""
    other = {name: value.to(dtype) if value.is_floating_point() else value for name, value in base.items()}
    mixed = {
        name: value.to([torch.float16, torch.bfloat16, torch.float64][i % 3]) if value.is_floating_point() else value
        for i, (name, value) in enumerate(fine_tuned(base, 2).items())
    }
    write_model(Path("other"), other)
    write_model(Path("mixed"), mixed)
    check_mean(average(cli, "other", "base", "mixed"), other, base, mixed)
    check_mean(average(cli, "mixed", "base", "other", out="again"), mixed, base, other)


def test_other_integer_types_and_values(base: Tensors, cli: Cli) -> None:
    """Integers are the base's, whatever the others have, or have not."""
    write_model(Path("other"), fine_tuned(base, 2) | {"steps": torch.zeros(7, dtype=torch.int32)})
    less = fine_tuned(base, 3)
    del less["steps"]
    write_model(Path("less"), less)
    check_mean(average(cli, "base", "other", "less"), base, fine_tuned(base, 2), {**less, "steps": base["steps"]})


def test_scalars_and_empty_tensors(base: Tensors, cli: Cli) -> None:
    odd = {"scale": torch.tensor(4.6), "empty": torch.zeros(0, 3), "one": torch.ones(1, 1, 1)}
    write_model(Path("a"), base | odd)
    write_model(Path("b"), fine_tuned(base | odd, 1))
    for method, recipe in {
        "linear": {},
        "ties": {"base": "a", "parameters": {"density": 0.5}},
        "pcb": {"base": "a", "scope": "tensor"},
        "dare_ties": {"base": "a", "parameters": {"density": 0.5}},
        "slerp": {"parameters": {"t": 0.3}},
    }.items():
        models = ["b", "b"] if "base" in recipe else ["a", "b"]
        write_recipe(Path("recipe.yaml"), method, models, **recipe)
        assert cli("merge", "recipe.yaml", "--out", method, "-q") == (0, f"{method}\n", "")
        merged = read_model(Path(method))
        assert {name: value.shape for name, value in merged.items()} == {n: v.shape for n, v in (base | odd).items()}
        assert all(value.isfinite().all() for value in merged.values())
    check_mean(read_model(Path("linear")), base | odd, fine_tuned(base | odd, 1))


def test_nothing_but_empty_tensors_in_a_shard(base: Tensors, cli: Cli) -> None:
    tensors = base | {"empty": torch.zeros(0, 3), "hollow": torch.zeros(2, 0)}
    write_model(Path("a"), tensors, shards=[list(base), ["empty", "hollow"]])
    check_mean(average(cli, "a", "a", args=("--shard-size", "100")), tensors)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
        torch.uint64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
    ],
)  # fmt: skip
def test_every_other_type_is_copied(base: Tensors, cli: Cli, dtype: torch.dtype) -> None:
    raw = torch.arange(0, 8 * 16, dtype=torch.uint8) % (2 if dtype == torch.bool else 120)
    tensors = base | {"odd": raw.view(dtype).reshape(2, -1)}
    write_model(Path("a"), tensors)
    write_model(Path("b"), fine_tuned(base, 1))
    merged = average(cli, "a", "b", exclude=["odd"])
    assert merged["odd"].dtype == dtype and merged["odd"].shape == tensors["odd"].shape
    assert torch.equal(merged["odd"].reshape(-1).view(torch.uint8), raw)


# -- tensors that only some have ---------------------------------------------------------------------


def test_mismatches_that_are_excluded(base: Tensors, cli: Cli) -> None:
    """Missing, extra, of another shape or type: copied from the base."""
    odd = fine_tuned(base, 1)
    del odd["layers.1.bias"]
    odd |= {"head.weight": torch.ones(2), "embed.weight": torch.zeros(9, 8), "norm.weight": torch.zeros(3).long()}
    write_model(Path("odd"), odd)
    merged = average(cli, "odd", "base", base="base", exclude=["layers.1.bias", "head.*", "embed.weight", "norm.*"])
    for name in ("layers.1.bias", "embed.weight", "norm.weight", "steps"):
        assert torch.equal(merged[name], base[name])
    assert "head.weight" not in merged
    torch.testing.assert_close(merged["layers.0.weight"], (odd["layers.0.weight"] + base["layers.0.weight"]) / 2)
    again = average(cli, "odd", "base", base="base", include=["layers.0.*"], out="again")
    assert torch.equal(again["layers.0.weight"], merged["layers.0.weight"])
    assert torch.equal(again["layers.1.weight"], base["layers.1.weight"])


def test_nan_that_is_excluded(base: Tensors, cli: Cli) -> None:
    write_model(Path("broken"), fine_tuned(base, 1) | {"norm.weight": torch.tensor([1.0, float("nan"), 1.0])})
    merged = average(cli, "base", "broken", exclude=["norm.weight"])
    assert torch.equal(merged["norm.weight"], base["norm.weight"])


DERIVED = {
    "layers.0.rotary_emb.inv_freq": torch.ones(4),
    "embeddings.position_ids": torch.arange(6).reshape(1, 6),
    "h.0.attn.masked_bias": torch.tensor(-1e4),
    "h.0.attn.bias": torch.ones(1, 1, 4, 4),
}


@pytest.mark.parametrize("name", DERIVED)
def test_derived_buffers_may_be_missing_or_extra(base: Tensors, cli: Cli, name: str) -> None:
    write_model(Path("with"), fine_tuned(base, 1) | {name: DERIVED[name]})
    assert name not in average(cli, "base", "with")
    merged = average(cli, "with", "base", out="again")
    assert torch.equal(merged[name], DERIVED[name])


def test_a_bias_is_no_derived_buffer(base: Tensors, cli: Cli) -> None:
    write_model(Path("with"), base | {"h.0.attn.bias": torch.ones(4)})
    write_recipe(Path("recipe.yaml"), "linear", ["base", "with"])
    assert cli("merge", "recipe.yaml", "-q").code == 3


TIED = {"model_type": "llama", "tie_word_embeddings": True}


def test_tied_heads_stored_by_some(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An alias stored twice is dropped where the base has none, and read from its target where the model has none."""
    monkeypatch.chdir(tmp_path)
    embed, more = {"model.embed_tokens.weight": torch.randn(6, 4)}, {"model.norm.weight": torch.ones(4)}
    once = embed | more
    twice = {"lm_head.weight": torch.ones(6, 4), "model.embed_tokens.weight": torch.ones(6, 4)} | more
    write_model(Path("once"), once, config=TIED)
    write_model(Path("twice"), twice, config=TIED)
    check_mean(average(cli, "once", "twice"), once, twice)
    check_mean(average(cli, "twice", "once", out="again"), twice, once | {"lm_head.weight": once[next(iter(embed))]})


def test_density_one(base: Tensors, cli: Cli) -> None:
    write_recipe(Path("recipe.yaml"), "ties", ["ft"], "base", parameters={"density": 1})
    assert cli("merge", "recipe.yaml", "--out", "out", "-q").code == 0
    tuned = read_model(Path("ft"))
    for name, value in read_model(Path("out")).items():
        torch.testing.assert_close(value, tuned[name])


# -- files -------------------------------------------------------------------------------------------


def test_bare_files(base: Tensors, cli: Cli) -> None:
    """A .safetensors file is a model without config; so is the result."""
    for place in ("base", "ft"):
        (Path(place) / SINGLE).rename(f"{place}.safetensors")
    check_mean(average(cli, "base.safetensors", "ft.safetensors"), base, fine_tuned(base, 1))
    assert names(Path("out")) == ["README.md", "mergebench.json", SINGLE]


def test_paths_from_the_recipe(base: Tensors, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths are looked up in the working directory, then beside the recipe; outputs in the former."""
    Path("deep").mkdir()
    write_model(Path("deep/ft"), fine_tuned(base, 5))
    write_recipe(Path("recipe.yaml"), "linear", ["base", "ft"])
    monkeypatch.chdir("deep")
    assert cli("merge", "../recipe.yaml", "--out", "out", "-q").code == 0
    check_mean(read_model(Path("out")), base, fine_tuned(base, 5))  # the ft of the working directory


def test_an_adapter_on_a_bare_file(base: Tensors, cli: Cli) -> None:
    (Path("base") / SINGLE).rename("base.safetensors")
    Path("lora").mkdir()
    Path("lora/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2}))
    factors = {"layers.0.lora_A.weight": torch.ones(1, 8), "layers.0.lora_B.weight": torch.ones(8, 1)}
    save_file(factors, "lora/adapter_model.safetensors")
    adapted = base | {"layers.0.weight": base["layers.0.weight"] + 2}
    check_mean(average(cli, "base.safetensors+lora", "ft"), adapted, fine_tuned(base, 1))


def test_odd_names(base: Tensors, cli: Cli) -> None:
    """Spaces, plus signs and letters of all kinds, in files, directories and tensors."""
    tensors = {f"schicht ü.{name}+x": value for name, value in base.items()}
    write_model(Path("a+b c"), tensors, shards=3, names="teil {} von {} é.safetensors")
    write_model(Path("d'e"), fine_tuned(tensors, 1))
    (Path("d'e") / SINGLE).rename(Path("d'e") / "only one.safetensors")
    merged = average(cli, "a+b c", "d'e", out="out put")
    check_mean(merged, tensors, fine_tuned(tensors, 1))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "np", "more": "words"}])
def test_metadata_is_not_needed(base: Tensors, cli: Cli, metadata: dict[str, str] | None) -> None:
    write_model(Path("a"), base, metadata=metadata)
    check_mean(average(cli, "a", "ft"), base, fine_tuned(base, 1))
    header, _ = unpack(Path("out") / SINGLE)
    assert header["__metadata__"] == {"format": "pt"}


def test_an_index_beside_a_single_file_is_stale(base: Tensors, cli: Cli) -> None:
    (Path("base") / INDEX).write_text(json.dumps({"weight_map": {"old": "gone.safetensors"}}))
    check_mean(average(cli, "base", "ft"), base, fine_tuned(base, 1))
    assert not (Path("out") / INDEX).exists()


def test_data_in_any_order(base: Tensors, cli: Cli) -> None:
    """The header's order is not the data's; the output has the data's order."""
    header, data = unpack(Path("base") / SINGLE)
    in_data = sorted(header, key=lambda name: header[name]["data_offsets"])
    (Path("base") / SINGLE).write_bytes(pack(dict(sorted(header.items(), reverse=True)), data))
    check_mean(average(cli, "base", "ft"), base, fine_tuned(base, 1))
    written, _ = unpack(Path("out") / SINGLE)
    assert [name for name in written if name != "__metadata__"] == in_data


@pytest.mark.parametrize("method", ["linear", "ties", "pcb"])
def test_every_model_its_own_shards_and_order(base: Tensors, cli: Cli, method: str) -> None:
    """Where a tensor lies, in how many files and after which, says nothing about the merge."""
    ft = fine_tuned(base, 2)
    write_model(Path("same"), ft)
    write_model(Path("split"), dict(reversed(ft.items())), shards=3)
    for file in Path("split").glob("*.safetensors"):  # the library sorts what it writes
        header, data = unpack(file)
        header.pop("__metadata__", None)
        turned = {}
        for name in sorted(header, key=lambda name: header[name]["data_offsets"], reverse=True):
            start, stop = header[name]["data_offsets"]
            end = sum(len(one) for one in turned.values())
            turned[name] = data[start:stop]
            header[name]["data_offsets"] = [end, end + stop - start]
        file.write_bytes(pack(header, b"".join(turned.values())))
    results = []
    for which in ("same", "split"):
        parameters = {} if method == "linear" else {"density": 0.3}
        write_recipe(Path("recipe.yaml"), method, ["ft", which], "base", parameters=parameters)
        assert cli("merge", "recipe.yaml", "--out", f"of-{which}", "-q").code == 0
        results.append((Path(f"of-{which}") / SINGLE).read_bytes())
    assert results[0] == results[1]


def test_a_model_given_twice(base: Tensors, cli: Cli) -> None:
    check_mean(average(cli, "ft", "ft", "./ft"), fine_tuned(base, 1))


def test_inputs_that_may_not_be_written(base: Tensors, cli: Cli) -> None:
    """Read-only files and directories are all it needs."""
    for place in ("base", "ft"):
        for path in Path(place).iterdir():
            path.chmod(0o444)
        Path(place).chmod(0o555)
    before = hashes(Path("base")), hashes(Path("ft"))
    check_mean(average(cli, "base", "ft"), base, fine_tuned(base, 1))
    assert (hashes(Path("base")), hashes(Path("ft"))) == before
    assert stat.S_IMODE((Path("out") / "config.json").stat().st_mode) & 0o200
    for place in ("base", "ft"):
        Path(place).chmod(0o755)


# -- outputs -----------------------------------------------------------------------------------------


def test_an_empty_directory_is_filled(base: Tensors, cli: Cli) -> None:
    Path("out").mkdir()
    check_mean(average(cli, "base", "ft"), base, fine_tuned(base, 1))


def test_a_link_to_an_output(base: Tensors, cli: Cli) -> None:
    """What the link leads to is filled, and replaced; the link stays."""
    Path("elsewhere").mkdir()
    Path("out").symlink_to("elsewhere")
    average(cli, "base", "ft")
    check_mean(average(cli, "base", "base", args=("--overwrite",)), base)
    assert Path("out").is_symlink()
    assert names(Path()) == ["base", "elsewhere", "ft", "out", "recipe.yaml"]


def test_the_working_directory_as_output(base: Tensors, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(Path("recipe.yaml"), "linear", ["base", "ft"])
    Path("here").mkdir()
    monkeypatch.chdir("here")
    assert cli("merge", "../recipe.yaml", "--out", ".", "-q").code == 0
    monkeypatch.chdir("..")
    check_mean(read_model(Path("here")), base, fine_tuned(base, 1))


def test_overwrite_leaves_nothing_of_the_earlier_result(base: Tensors, cli: Cli) -> None:
    average(cli, "base", "ft", args=("--shard-size", "200"))
    assert len(list(Path("out").glob("*.safetensors"))) > 1
    (Path("out") / "notes.txt").write_text("of the earlier result")
    check_mean(average(cli, "base", "ft", args=("--overwrite",)), base, fine_tuned(base, 1))
    assert names(Path("out")) == ["README.md", "config.json", "mergebench.json", SINGLE]
    assert names(Path()) == ["base", "ft", "out", "recipe.yaml"]


def test_a_result_is_an_input_like_any_other(base: Tensors, cli: Cli) -> None:
    average(cli, "base", "ft", out="first")
    merged = average(cli, "first", "ft", out="second")
    tuned = fine_tuned(base, 1)["norm.weight"]
    torch.testing.assert_close(merged["norm.weight"], base["norm.weight"] / 4 + tuned * 0.75)
    assert names(Path("second")) == ["README.md", "config.json", "mergebench.json", SINGLE]


def test_the_default_output(base: Tensors, cli: Cli) -> None:
    write_recipe(Path("my-recipe.yaml"), "linear", ["base", "ft"])
    assert cli("merge", "my-recipe.yaml", "-q").out == "merged/my-recipe\n"
    save_file({"unrelated": torch.zeros(1)}, "merged/other.safetensors")
    check_mean(read_model(Path("merged/my-recipe")), base, fine_tuned(base, 1))
