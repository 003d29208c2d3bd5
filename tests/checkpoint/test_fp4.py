"""FP4 checkpoints: values as transformers dequantizes them, wherever a chunk begins, and as a part of any merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fp4 import E2M1, blocks, means, merged, nvfp4, tiny_gpt_oss, write_mxfp4
from models import CONFIG, write_model
from safetensors.torch import save_file

import mergebench
from mergebench.checkpoint.fp4 import find_packed
from mergebench.checkpoint.header import TensorInfo
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError

NAME = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_code_and_scale() -> None:
    """All 16 values under all scales that are numbers, against the table and transformers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    codes = (torch.arange(16) | (torch.arange(15, -1, -1) << 4)).to(torch.uint8).expand(1, 252, 1, 16).contiguous()
    scales = torch.arange(252, dtype=torch.uint8).view(1, 252, 1)  # above, 6 x 2^k is no bfloat16
    write_model(Path("a"), {"x.experts.down_proj_blocks": codes, "x.experts.down_proj_scales": scales})
    found = open_model("a").state_dict()["x.experts.down_proj"]
    assert found.shape == (1, 32, 252)
    expected = torch.stack([E2M1, E2M1.flip(0)], 1).view(32, 1).double() * 2.0 ** (scales.view(-1).double() - 127)
    assert torch.equal(found[0].double(), expected)
    assert torch.equal(found.bfloat16(), convert_moe_packed_tensors(codes, scales))


@pytest.mark.parametrize("turned", [True, False])
def test_any_piece(turned: bool) -> None:
    codes, scales = blocks((2, 6, 96), 1)
    if turned:
        tensors, name = {f"{NAME}_blocks": codes, f"{NAME}_scales": scales}, NAME
        wanted = means(codes, scales).float()
    else:
        tensors, name = {"w.weight_packed": codes[0].flatten(1), "w.weight_scale": scales[0]}, "w.weight"
        wanted = means(codes, scales)[0].T.float()
    model = open_model(str(write_model(Path("a"), tensors)))
    assert model.tensors[name].shape == wanted.shape and list(model.tensors) == [name]
    from mergebench.checkpoint.files import Files

    with Files() as files:
        values, flat = model.values(files), wanted.reshape(-1)
        for start in (0, 1, 5, 6, 7, 95, 191, 192, 193, 300, 575, len(flat) - 1):
            for size in (1, 5, 6, 7, 33, 192, 193, 400, len(flat)):
                out = torch.empty(min(size, len(flat) - start))
                values.read(name, start, out)
                assert torch.equal(out, flat[start : start + size]), (start, size)


@pytest.mark.parametrize("how", [{}, {"chunk": 1000, "workers": 2}])
def test_gpt_oss(how: dict[str, Any]) -> None:
    """Two MXFP4 models, and a bfloat16 one beside MXFP4, as transformers dequantizes them; transformers loads it."""
    from transformers import GptOssForCausalLM, Mxfp4Config

    model = tiny_gpt_oss()
    real = {place: write_mxfp4(Path(place), model, seed) for place, seed in (("a", 1), ("b", 2))}
    model.save_pretrained("plain")
    loaded = GptOssForCausalLM.from_pretrained("a", quantization_config=Mxfp4Config(dequantize=True))
    assert all(torch.equal(value, real["a"][name]) for name, value in loaded.state_dict().items())
    plain = dict(model.state_dict())
    for first, second in (("a", "b"), ("a", "plain"), ("plain", "b")):
        models = [{"model": first, "parameters": {"weight": 0.25}}, {"model": second, "parameters": {"weight": 0.75}}]
        found = merged({"models": models}, **how)
        one, other = real.get(first, plain), real.get(second, plain)
        assert found.keys() == one.keys()
        for name, value in found.items():
            assert torch.equal(value, (0.25 * one[name].float() + 0.75 * other[name].float()).bfloat16()), name
        config = json.loads(Path("out/config.json").read_text())
        assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    back = GptOssForCausalLM.from_pretrained("out").state_dict()
    assert all(torch.equal(back[name], value) for name, value in found.items())


def test_the_plan_counts_turned_matrices() -> None:
    """A worker holds a matrix of each model to read rows of what the files have as columns."""
    for place, seed in (("a", 1), ("b", 2)):
        codes, scales = blocks((2, 640, 1024), seed)
        write_model(Path(place), {f"{NAME}_blocks": codes, f"{NAME}_scales": scales})
    plan = mergebench.plan(mergebench.load({"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}))
    matrices = 2 * (640 * 1024 // 2 + 4 * 640 * 32)
    assert matrices <= plan.delta_bytes <= 3 * matrices
    assert plan.buffer_bytes >= plan.workers * plan.delta_bytes


def test_lora_on_experts() -> None:
    """An adapter on experts in MXFP4 gives what it gives on the same experts in float32."""
    codes, scales = blocks((2, 6, 64), 1)
    packed, plain = {f"{NAME}_blocks": codes, f"{NAME}_scales": scales}, {NAME: means(codes, scales).float()}
    other = {"model.layers.0.self_attn.q_proj.weight": torch.randn(8, 64)}
    config = CONFIG | {"model_type": "gpt_oss"}
    for place, tensors in (("packed", packed), ("plain", plain)):
        write_model(Path(place), tensors | other, config=config)
    Path("lora").mkdir()
    key = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
    save_file(
        {key.format("A"): torch.randn(4, 64), key.format("B"): torch.randn(6, 4)}, "lora/adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_parameters": ["mlp.experts.gate_up_proj"]}
    Path("lora/adapter_config.json").write_text(json.dumps(settings | {"target_modules": []}))
    found, wanted = (open_model(f"{place}+lora").state_dict() for place in ("packed", "plain"))
    assert torch.equal(found[NAME], wanted[NAME]) and not torch.equal(found[NAME], plain[NAME])


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_nvfp4(layout: str) -> None:
    """e2m1 x (e4m3 x scale): ModelOpt multiplies by the tensor's scale, compressed-tensors divides by it."""
    packed, real = nvfp4("model.layers.0.mlp.up_proj.weight", (8, 48), 1, layout)
    extra = {"model.layers.0.mlp.up_proj.input_scale": torch.tensor(0.5), "norm.weight": torch.ones(3)}
    settings = {"quant_algo": "NVFP4", "quant_method": layout}
    write_model(Path("a"), {**packed, **extra}, config=CONFIG | {"quantization_config": settings})
    found = merged({"models": [{"model": "a"}], "dtype": "float32"}, chunk=100)
    assert found.keys() == {"model.layers.0.mlp.up_proj.weight", "norm.weight"}
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], real)
    found = merged({"models": [{"model": "a"}]})
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], real.bfloat16())
    assert "quantization_config" not in json.loads(Path("out/config.json").read_text())


def test_nvfp4_experts_into_a_fused_base() -> None:
    tensors, parts = {}, {}
    for expert in range(2):
        for word, shape in (("gate_proj", (32, 16)), ("up_proj", (32, 16)), ("down_proj", (16, 32))):
            name = f"model.layers.0.mlp.experts.{expert}.{word}.weight"
            packed, parts[expert, word] = nvfp4(name, shape, 10 * expert + len(word))
            tensors |= packed
    write_model(Path("a"), tensors)
    wanted = {
        NAME: torch.stack([torch.cat([parts[e, "gate_proj"], parts[e, "up_proj"]]) for e in range(2)]),
        NAME.replace("gate_up", "down"): torch.stack([parts[e, "down_proj"] for e in range(2)]),
    }
    write_model(Path("base"), {name: torch.zeros_like(value) for name, value in wanted.items()})
    found = merged({"models": [{"model": "base"}, {"model": "a"}], "parameters": {"weight": 1.0, "normalize": False}})
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_what_does_not_fit() -> None:
    def info(name: str, dtype: str, *shape: int) -> TensorInfo:
        return TensorInfo(name, dtype, shape, Path("f"), 0, 0)

    def refused(*tensors: TensorInfo) -> str:
        with pytest.raises(ModelError) as error:
            find_packed("m", {one.name: one for one in tensors}, {})
        return f"{error.value.message} ({error.value.hint})"

    codes = info("x_blocks", "U8", 2, 6, 3, 16)
    assert "x_blocks: m has MXFP4 and no scales (they would be called x_scales)" in refused(codes)
    assert "x_scales: m has U8 [2, 6, 2], x_blocks [2, 6, 3, 16]" in refused(codes, info("x_scales", "U8", 2, 6, 2))
    assert "every 32 values" in refused(codes, info("x_scales", "F32", 2, 6, 3))
    both = (codes, info("x_scales", "U8", 2, 6, 3), info("x", "BF16", 2, 96, 6))
    assert refused(*both).startswith("x: m has it both in four bits and as BF16")
    weight, scale = info("w.weight", "U8", 4, 8), info("w.weight_scale", "F8_E4M3", 4, 1)
    assert "they would be called w.weight_scale_2" in refused(weight, scale)
    whole = info("w.weight_scale_2", "F32")
    assert "they would be called w.weight_scale)" in refused(weight, whole)
    assert "w.weight_scale_2: m has F32 [2], one number" in refused(weight, scale, whole._replace(shape=(2,)))
    assert "w.pre_quant_scale" in refused(weight, scale, whole, info("w.pre_quant_scale", "BF16", 16))
    packed = info("w.weight_packed", "U8", 4, 8)
    assert "w.weight_global_scale" in refused(packed, scale)
    assert "every 32 values" in refused(packed, info("w.weight_scale", "U8", 4, 1))
