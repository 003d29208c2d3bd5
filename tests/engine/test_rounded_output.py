"""What is written in eight and four bits: by table, as transformers loads it, and back to the base's bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fp4 import E2M1, blocks, means, merged, tiny_gpt_oss, write_mxfp4
from models import CONFIG, read_model, write_model
from torch import Tensor

import mergebench
from mergebench.checkpoint.encode import Eight, Four
from mergebench.checkpoint.files import Files
from mergebench.checkpoint.fp4 import GPT_OSS
from mergebench.checkpoint.shards import OutTensor
from mergebench.deltas.open import open_model
from mergebench.engine.run import run_plan
from mergebench.errors import MergebenchError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rounding() -> dict[str, float]:
    found = json.loads(Path("out/mergebench.json").read_text())["rounding"]
    return {kind: one["relative_error"] for kind, one in found["by_kind"].items()}


def nearest(value: float) -> set[float]:
    """The closest of the 16 values; of two, that with the even code."""
    sizes = E2M1[:8].tolist()
    best = min(abs(abs(value) - size) for size in sizes)
    found = [code for code, size in enumerate(sizes) if abs(abs(value) - size) == best]
    return {sizes[next((code for code in found if code % 2 == 0), found[0])]}


def test_every_rounding_of_four_bits() -> None:
    """Groups whose largest value sets the scale; their other values at, below and above every border."""
    grid = torch.cat([torch.arange(0, 129) / 16, torch.tensor([0.2500001, 0.2499999, 4.999999, 5.000001, 7.99])])
    for power in (-20, 0, 3):
        for largest in (4.0, 5.0, 6.0, 7.99):
            small = grid[grid <= largest]
            groups = torch.stack([torch.cat([torch.tensor([largest]), small.roll(n)[:31]]) for n in range(len(small))])
            groups[::2] *= -1
            four = Four("w.weight", tuple(groups.shape), GPT_OSS._replace(turned=False))
            with Files() as files:
                (codes, scales), _ = four.encode(files, 0, (groups * 2.0**power).reshape(-1), None)
            assert (scales.rows == 127 + power).all()  # floor(log2(largest)) - 2 is 0
            code = torch.stack([codes.rows & 15, codes.rows >> 4], -1).reshape(groups.shape)
            found = E2M1[code.long()]
            for value, one in zip(groups.reshape(-1).tolist(), found.reshape(-1).tolist(), strict=True):
                assert abs(one) in nearest(value) and (one == 0 or (one < 0) == (value < 0))
            assert torch.equal(torch.signbit(found), torch.signbit(groups))


@pytest.mark.parametrize("how", [{}, {"chunk": 70, "workers": 2}])
def test_base_alone_gives_its_bytes(how: dict[str, Any]) -> None:
    """Scales as no rule makes them stay, because they hold every value; what is merged or excluded alike."""
    write_mxfp4(Path("a"), tiny_gpt_oss(), 1)
    stored = read_model(Path("a"))
    for more in ({}, {"exclude": ["*experts*"]}, {"merge_method": "task_arithmetic", "base_model": "a"}):
        recipe = {"merge_method": "passthrough", "models": [{"model": "a"}], "out_dtype": "mxfp4"} | more
        if "base_model" in recipe:
            recipe["models"] = [{"model": "plain"}]
            recipe["parameters"] = {"weight": 0.0}
            tiny_gpt_oss().save_pretrained("plain")
        found = merged(recipe, **how)
        assert found.keys() == stored.keys()
        for name, value in found.items():
            same = value == stored[name]
            if name.endswith("_blocks") and more:  # -0 plus 0 is 0
                low, high = value & 15, value >> 4
                same = ((low == stored[name] & 15) | (low == 0)) & ((high == stored[name] >> 4) | (high == 0))
            assert same.all(), name
        assert rounding() == {"experts": 0.0}
        assert json.loads(Path("out/config.json").read_text()) == json.loads(Path("a/config.json").read_text())


def check_mxfp4(found: dict[str, Tensor], name: str, wanted: Tensor) -> float:
    """The scale of every group by its definition, every value within half a step; the relative error."""
    codes, scales = found[f"{name}_blocks"], found[f"{name}_scales"]
    groups = wanted.transpose(-1, -2).unflatten(-1, (-1, 32)).double()
    largest = groups.abs().amax(-1)
    assert torch.equal(scales.double() - 127, (largest.log2().floor() - 2).clamp(min=-127))
    step = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 2.0, 2.0], dtype=torch.float64)  # at 0, 0.5, ...
    both = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()
    unit = 2.0 ** (scales.double() - 127)[..., None]
    back = E2M1[both].double() * unit
    clipped = groups.clamp(-6 * unit, 6 * unit)
    assert ((back - clipped).abs() <= step[both & 7] / 2 * unit).all()
    assert torch.equal(means(codes, scales), back.flatten(-2).transpose(-1, -2))
    return float((back - groups).norm() / groups.norm())


def test_mxfp4_loads_in_transformers() -> None:
    """A merge of two gpt-oss models, whether the first is stored in MXFP4 or not."""
    from transformers import GptOssForCausalLM, Mxfp4Config

    model = tiny_gpt_oss()
    real = write_mxfp4(Path("a"), model, 1)
    model.save_pretrained("plain")
    plain = dict(model.state_dict())
    for first, second in (("a", "plain"), ("plain", "a")):
        recipe: dict[str, Any] = {"models": [{"model": first}, {"model": second}], "out_dtype": "mxfp4"}
        found = merged(recipe, chunk=3000)
        error = []
        for name in real:
            wanted = (real[name].float() + plain[name].float()) / 2
            if name.endswith(("gate_up_proj", "down_proj")):
                error.append(check_mxfp4(found, name, wanted))
            else:
                assert torch.equal(found[name], wanted.bfloat16())
        assert min(error) <= rounding()["experts"] <= max(error) and rounding().keys() == {"experts"}
        loaded = GptOssForCausalLM.from_pretrained("out", quantization_config=Mxfp4Config(dequantize=True))
        for name, value in loaded.state_dict().items():
            key = f"{name}_blocks"
            wanted = means(found[key], found[f"{name}_scales"]).bfloat16() if key in found else found[name]
            assert torch.equal(value, wanted)
        assert torch.equal(open_model("out").state_dict()[name], loaded.state_dict()[name].float())
        config = json.loads(Path("out/config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "mxfp4" and config["dtype"] == "bfloat16"


def test_mxfp4_of_compressed_tensors() -> None:
    """A base of matrices that are not turned is written as it lies."""
    codes, scales = blocks((1, 8, 96), 1)
    packed = {"x.weight_packed": codes[0].flatten(1), "x.weight_scale": scales[0]}
    write_model(Path("a"), packed | {"norm.weight": torch.ones(3)})
    real = means(codes, scales)[0].T.float()
    write_model(Path("b"), {"x.weight": 3 * real, "norm.weight": torch.ones(3)})
    found = merged({"models": [{"model": "a"}], "out_dtype": "mxfp4"}, chunk=40)
    assert all(torch.equal(value, found[name]) for name, value in packed.items())
    found = merged({"models": [{"model": "a"}, {"model": "b"}], "out_dtype": "mxfp4"})  # twice the base
    assert torch.equal(open_model("out").state_dict()["x.weight"], 2 * real)


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
LAYOUTS = [
    # tensor, scale
    ((300, 384), (3, 3)), ((300, 70), (3, 1)), ((50, 70), ()), ((50, 70), (1,)), ((50, 70), (50, 1)), ((50, 70), (50,)),
    ((3, 200, 130), (3, 2, 2)), ((3, 20, 30), (3, 1, 1)), ((70,), (1,)),
]  # fmt: skip


def expanded(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The scale of every element, by the plainest means."""
    scale = scale.view(*scale.shape, *[1] * (len(shape) - scale.ndim)) if scale.numel() > 1 else scale.reshape(())
    scale = scale.expand(*[1] * (len(shape) - scale.ndim), *scale.shape) if scale.ndim else scale.view([1] * len(shape))
    for side, size in enumerate(shape):
        if scale.shape[side] != size:
            scale = scale.repeat_interleave(size if scale.shape[side] == 1 else 128, side).narrow(side, 0, size)
    return scale


def write_fp8(place: str, seed: int) -> dict[str, Tensor]:
    """A model with a tensor of each kind of scale; what it stands for, in float32."""
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {"norm.weight": torch.ones(7, dtype=torch.bfloat16)}
    real = {"norm.weight": torch.ones(7)}
    for number, (shape, scales) in enumerate(LAYOUTS):
        name = f"layers.{number}.self_attn.weight"
        tensors[name] = (30 * torch.randn(shape, generator=random)).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(scales, generator=random) / 1000
        real[name] = tensors[name].float() * expanded(tensors[f"{name}_scale_inv"], shape)
    write_model(Path(place), tensors, config=CONFIG | {"quantization_config": FP8, "dtype": "bfloat16"})
    return real


@pytest.mark.parametrize("how", [{}, {"chunk": 1000, "workers": 2}])
def test_fp8_as_the_base_stores_it(how: dict[str, Any]) -> None:
    """Alone, the base's bytes; merged, the scale of each block by its definition and each value the nearest."""
    real = write_fp8("a", 1)
    stored = read_model(Path("a"))
    for more in ({}, {"exclude": ["layers*"]}):
        found = merged({"models": [{"model": "a"}], "out_dtype": "float8_e4m3"} | more, **how)
        assert found.keys() == stored.keys()
        assert all(torch.equal(v.view(torch.uint8), stored[n].view(torch.uint8)) for n, v in found.items() if v.ndim)
        assert rounding() == {"attention": 0.0}
    other = {name: value + 0.01 * torch.randn(value.shape) for name, value in real.items()}
    write_model(Path("b"), other)
    found = merged({"models": [{"model": "a"}, {"model": "b"}], "out_dtype": "float8_e4m3"}, **how)
    assert found.keys() == stored.keys() and found["norm.weight"].dtype == torch.bfloat16
    moved = size = 0.0
    for number, (shape, scales) in enumerate(LAYOUTS):
        name = f"layers.{number}.self_attn.weight"
        wanted = (real[name] + other[name]) / 2
        scale = found[f"{name}_scale_inv"]
        assert found[name].dtype == torch.float8_e4m3fn and scale.shape == scales
        wide = expanded(scale, shape)
        for one in scale.unique():
            assert float(wanted[wide == one].abs().max() / 448) == pytest.approx(float(one), rel=1e-6)
        assert torch.equal(found[name].float(), (wanted / wide).clamp(-448, 448).to(torch.float8_e4m3fn).float())
        moved += float((found[name].double() * wide - wanted).square().sum())
        size += float(wanted.double().square().sum())
    assert rounding()["attention"] == pytest.approx((moved / size) ** 0.5, rel=1e-4)
    assert json.loads(Path("out/config.json").read_text())["quantization_config"] == FP8


def test_fp8_with_powers_of_two() -> None:
    """Scales in e8m0 are read, stay where they hold every value, and else are the next power of two."""
    codes, exponents = (30 * torch.randn(130, 200)).to(torch.float8_e4m3fn), torch.randint(110, 120, (2, 2)).byte()
    scale = exponents.view(torch.float8_e8m0fnu)
    write_model(Path("a"), {"x.weight": codes, "x.weight_scale_inv": scale})
    real = codes.float() * expanded(2.0 ** (exponents.float() - 127), (130, 200))
    assert torch.equal(open_model("a").state_dict()["x.weight"], real)
    found = merged({"models": [{"model": "a"}], "out_dtype": "float8_e4m3"})
    assert torch.equal(found["x.weight_scale_inv"].view(torch.uint8), exponents)
    write_model(Path("b"), {"x.weight": real * 1.7})
    found = merged({"models": [{"model": "a"}, {"model": "b"}], "out_dtype": "float8_e4m3"})
    given, merge = found["x.weight_scale_inv"].float(), (real + real * 1.7) / 2
    for row in range(2):
        for column in range(2):
            largest = merge[128 * row : 128 * row + 128, 128 * column : 128 * column + 128].abs().max()
            assert given[row, column] == 2.0 ** (largest.double() / 448).log2().ceil()


def tiny(name: str, **sizes: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes)).bfloat16()


COMMON = {"vocab_size": 40, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False}


@pytest.mark.parametrize("architecture", ["Qwen3", "Qwen3Moe"])
def test_fp8_of_a_plain_base(architecture: str) -> None:
    """The layout of transformers' fine-grained FP8, which it loads; layers whose sides fit no block stay."""
    more = {"head_dim": 32, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 128}
    model = tiny(architecture, **COMMON, **HEADS, **(more if architecture == "Qwen3Moe" else {"head_dim": 24}))
    model.save_pretrained("a")
    found = merged({"models": [{"model": "a"}], "out_dtype": "float8_e4m3"})
    eight = {name for name, value in found.items() if value.dtype == torch.float8_e4m3fn}
    settings = json.loads(Path("out/config.json").read_text())["quantization_config"]
    if architecture == "Qwen3":
        assert {name.rpartition("layers.0.")[2] for name in eight} == {
            f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")
        }
        attention = {f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"}
        assert set(settings.pop("modules_to_not_convert")) == attention | {"lm_head"}
        assert rounding().keys() == {"MLP"}
    else:
        assert len(eight) == 2 * 3 + 4 and settings.pop("modules_to_not_convert") == ["lm_head"]
        assert rounding().keys() == {"attention", "experts"}
    assert settings == FP8 and all(0.02 < error < 0.03 for error in rounding().values())
    # transformers dequantizes on a CPU
    loaded = type(model).from_pretrained("out", dtype=torch.bfloat16).state_dict()
    ours = open_model("out").state_dict()
    write_model(Path("back"), {name: value.bfloat16() for name, value in ours.items()}, config=model.config.to_dict())
    wanted = type(model).from_pretrained("back").state_dict()
    assert loaded.keys() == wanted.keys() and all(torch.equal(loaded[name], wanted[name]) for name in wanted)
    Path("out").rename("eight")
    again = merged({"models": [{"model": "eight"}], "out_dtype": "float8_e4m3"}, chunk=5000)
    assert all(torch.equal(value.float(), found[name].float()) for name, value in again.items())


def test_slices_and_resume() -> None:
    """Layers under other numbers have their scales under them too; a resumed run knows what rounding moved."""
    random = torch.Generator().manual_seed(0)
    eight, four = {}, {}
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        eight[f"{name}.weight"] = torch.randn(9, 5, generator=random).to(torch.float8_e4m3fn)
        eight[f"{name}.weight_scale_inv"] = torch.rand(9, 1, generator=random)
        four[f"{name}_blocks"], four[f"{name}_scales"] = blocks((2, 6, 64), layer)
    for tensors, out in ((eight, "float8_e4m3"), (four, "mxfp4")):
        write_model(Path(out), tensors, config=CONFIG | {"num_hidden_layers": 2})
        turned = [{"sources": [{"model": out, "layer_range": [layer, layer + 1]}]} for layer in (1, 0)]
        recipe = {"merge_method": "passthrough", "slices": turned, "out_dtype": out}
        found = merged(recipe)
        assert found.keys() == tensors.keys()
        for name, value in found.items():
            other = name.replace("layers.0", "layers.x").replace("layers.1", "layers.0").replace("layers.x", "layers.1")
            assert torch.equal(value.view(torch.uint8), tensors[other].view(torch.uint8))
    write_model(Path("plain"), {name: means(four[f"{name}_blocks"], four[f"{name}_scales"]) for name in (
        f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(2)
    )})  # fmt: skip
    recipe = {"models": [{"model": "mxfp4"}, {"model": "plain", "parameters": {"weight": 0.3}}], "out_dtype": "mxfp4"}
    plan = mergebench.plan(mergebench.load({"merge_method": "linear", "parameters": {"normalize": False}} | recipe))
    wanted = mergebench.run(plan, "whole").provenance["rounding"]

    def stop(directory: Path, provenance: dict[str, Any]) -> None:
        raise MergebenchError("stopped")

    with pytest.raises(MergebenchError, match="stopped"):
        run_plan(plan, Path("part"), finish=stop)
    assert run_plan(plan, Path("part"), resume=True).provenance["rounding"] == wanted
    assert wanted["by_kind"]["experts"]["relative_error"] > 0.01


def test_refused() -> None:
    write_model(Path("a"), {"w.weight": torch.ones(8, 8)})
    for out, says in (("mxfp4", "stores nothing in MXFP4"), ("float8_e4m3", "transformers does not know a")):
        with pytest.raises(MergebenchError, match=says):
            merged({"models": [{"model": "a"}], "out_dtype": out})
    write_model(Path("b"), {"w.weight": torch.zeros(8, 8)})
    with pytest.raises(MergebenchError, match=r"'emr' writes no model"):
        merged({"merge_method": "emr", "base_model": "a", "models": [{"model": "b"}] * 2, "out_dtype": "mxfp4"})
    scaled = {"w.weight": torch.ones(8, 8).to(torch.float8_e4m3fn), "w.weight_scale": torch.ones(1)}
    write_model(Path("c"), scaled | {"w.input_scale": torch.ones(1)})
    with pytest.raises(MergebenchError, match=r"scales of activations \(w.input_scale\)"):
        merged({"models": [{"model": "c"}], "out_dtype": "float8_e4m3"})


def test_zero_blocks() -> None:
    """A block of zeros has a scale, and stays zero."""
    eight = Eight("w", (128, 128), OutTensor("w_scale_inv", "F32", (1, 1), 4), (1, 1), (128, 128))
    values = torch.zeros(128 * 128)
    with Files() as files:
        scales = eight.scales(files, [eight.measure(files, 0, values)])
        (codes, _), change = eight.encode(files, 0, values, scales)
        assert float(scales) == 1 and not codes.rows.any() and change == (0, 0)
        (codes, scales), change = Four("w", (128, 128), GPT_OSS).encode(files, 0, values, None)
    assert not codes.rows.any() and not scales.rows.any() and change == (0, 0)
