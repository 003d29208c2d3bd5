"""FP8 checkpoints: values times their scales, whatever the blocks and wherever a chunk begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CONFIG, read_model, write_model
from safetensors.torch import save_file
from torch import Tensor

import mergebench
from mergebench.checkpoint.files import Files
from mergebench.checkpoint.fp8 import Scaler, find_scales
from mergebench.checkpoint.header import Scale, TensorInfo
from mergebench.deltas.open import open_model
from mergebench.engine.read import ChunkReader
from mergebench.engine.span import Span

QUANTIZED = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def expanded(scale: Tensor, shape: tuple[int, ...], block: int = 128) -> Tensor:
    """The scale of every element, by the plainest means."""
    if scale.numel() == 1:
        return scale.reshape(()).expand(shape)
    if scale.ndim == 1:
        scale = scale[:, None]
    for side, size in enumerate(shape):
        if scale.shape[side] != size:
            count = size if scale.shape[side] == 1 else block
            scale = scale.repeat_interleave(count, side).narrow(side, 0, size)
    return scale


SHAPES = [
    # tensor, scale
    ((300, 384), (3, 3)),
    ((300, 300), (3, 3)),
    ((300, 300), (300, 1)),
    ((300, 70), (300,)),
    ((300, 70), (3, 1)),
    ((50, 300), (1, 3)),
    ((50, 70), ()),
    ((50, 70), (1,)),
    ((300, 70), (1, 1)),
    ((4, 200, 130), (4, 2, 2)),
    ((4, 200, 128), (4, 1, 1)),
    ((4, 200, 128), (4, 200, 1)),
    ((70,), (1,)),
]


def made(shape: tuple[int, ...], scales: tuple[int, ...], seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=random).to(dtype)
    return values, torch.rand(scales, generator=random) + 0.5


@pytest.mark.parametrize(("shape", "scales"), SHAPES)
def test_any_piece(shape: tuple[int, ...], scales: tuple[int, ...]) -> None:
    _, scale = made(shape, scales, 0, torch.float32)
    tensor = TensorInfo("w", "F8_E4M3", shape, Path("f"), 0, 0)
    stored = TensorInfo("w_scale_inv", "F32", scales, Path("f"), 0, 0)
    found = find_scales("m", {"w": tensor, "w_scale_inv": stored}, {})
    assert list(found) == ["w"] and isinstance(found["w"].scale, Scale)
    one, wanted = Scaler(found["w"], scale), expanded(scale, shape).reshape(-1)
    columns, count = shape[-1], len(wanted)
    for start in {0, 1, columns - 1, columns // 2, (columns + 3) % count, count // 2, count - 1}:
        for size in {1, columns - 1, columns, columns + 1, 3 * columns, 7 * columns + 5, count}:
            out = torch.ones(min(size, count - start))
            one.multiply(start, out)
            assert torch.equal(out, wanted[start : start + size])


def quantized(place: str, seed: int, dtype: torch.dtype, end: str, **more: Tensor) -> dict[str, Tensor]:
    """A model with a tensor of each kind of scale; what it stands for."""
    tensors: dict[str, Tensor] = {"norm": torch.ones(7, dtype=torch.bfloat16), **more}
    means = {"norm": torch.ones(7)}
    for number, (shape, scales) in enumerate(SHAPES):
        values, scale = made(shape, scales, 100 * seed + number, dtype)
        tensors |= {f"layers.{number}.weight": values, f"layers.{number}.weight{end}": scale}
        means[f"layers.{number}.weight"] = values.float() * expanded(scale, shape)
    config = {
        **CONFIG,
        "dtype": "bfloat16",
        "quantization_config": QUANTIZED,
        "text_config": {"a": 1, "quantization_config": {}},
    }
    write_model(Path(place), tensors, config=config, side_files={"hf_quant_config.json": "{}"})
    return means


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def merged(recipe: dict[str, Any], **how: Any) -> dict[str, Tensor]:
    result = mergebench.run(mergebench.plan(mergebench.load(recipe), **how), "out", overwrite=True)
    return read_model(result.out)


@pytest.mark.parametrize("end", ["_scale", "_scale_inv"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("how", [{}, {"chunk": 1000, "workers": 2}])
def test_merge(end: str, dtype: torch.dtype, how: dict[str, Any]) -> None:
    a = quantized("a", 1, dtype, end, **{"layers.0.input_scale": torch.ones(1)})
    b = quantized("b", 2, dtype, end)
    recipe = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}
    found = merged(recipe | {"dtype": "float32"}, **how)
    assert found.keys() == a.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32 and torch.allclose(value, (a[name] + b[name]) / 2, rtol=1e-6, atol=1e-7)
    found = merged(recipe, **how)
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, ((a[name] + b[name]) / 2).bfloat16())
    config = json.loads(Path("out/config.json").read_text())
    assert config == {**CONFIG, "text_config": {"a": 1}, "dtype": "bfloat16"}
    assert not Path("out/hf_quant_config.json").exists()


def test_pieces_of_one_tensor_in_one_chunk() -> None:
    values, scale = made((300, 300), (3, 3), 0, torch.float8_e4m3fn)
    write_model(Path("a"), {"w": values, "w_scale_inv": scale})
    plan = mergebench.plan(mergebench.load({"merge_method": "linear", "models": [{"model": "a"}]}))
    wanted = (values.float() * expanded(scale, (300, 300))).reshape(-1)
    with Files() as files:
        found, _ = ChunkReader(plan, files).load([Span("w", 10, 510), Span("w", 70_001, 70_401)], apply=False)
        assert torch.equal(found[0], torch.cat([wanted[10:510], wanted[70_001:70_401]]))


def test_beside_models_that_are_not_quantized() -> None:
    """An FP8 base under a plain fine-tune, and the other way round; questions asked of both."""
    base = quantized("base", 1, torch.float8_e4m3fn, "_scale_inv")
    plain = {name: value + 0.1 * torch.randn(value.shape) for name, value in base.items()}
    write_model(Path("plain"), plain)
    write_model(Path("exact"), base)
    ties: dict[str, Any] = {"merge_method": "ties", "models": [{"model": "plain"}], "dtype": "float32"}
    ties["parameters"] = {"density": 0.3}
    found, wanted = (merged(ties | {"base_model": one}) for one in ("base", "exact"))
    assert all(torch.equal(found[name], wanted[name]) for name in base)
    found = merged({"merge_method": "linear", "models": [{"model": "plain"}, {"model": "base"}]})
    assert all(value.dtype == torch.float32 for value in found.values())  # as the first model has them
    assert "quantization_config" not in json.loads(Path("out/config.json").read_text())
    assert all(torch.allclose(found[name], (plain[name] + base[name]) / 2, atol=1e-6) for name in base)


def test_excluded_tensors_lose_their_scales_too() -> None:
    a = quantized("a", 1, torch.float8_e4m3fn, "_scale_inv")
    quantized("b", 2, torch.float8_e4m3fn, "_scale_inv")
    recipe = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "exclude": ["layers.*"]}
    found = merged(recipe)
    assert all(torch.equal(found[name], a[name].bfloat16()) for name in a)


def test_without_scales_or_settings() -> None:
    """Bare FP8 is what it says; merged, it becomes bfloat16."""
    values = torch.randn(9, 9).to(torch.float8_e4m3fn)
    write_model(Path("a"), {"w": values, "other": values})
    found = merged({"merge_method": "linear", "models": [{"model": "a"}, {"model": "a"}], "exclude": ["other"]})
    assert torch.equal(found["w"], values.bfloat16())
    assert torch.equal(found["other"].view(torch.uint8), values.view(torch.uint8))


def test_blocks_of_another_size() -> None:
    values, scale = made((100, 60), (4, 2), 0, torch.float8_e4m3fn)
    config = {**CONFIG, "quantization_config": {"weight_block_size": [32, 32]}}
    write_model(Path("a"), {"w": values, "w_scale_inv": scale}, config=config)
    state = open_model("a").state_dict()
    assert state.keys() == {"w"}
    assert torch.equal(state["w"], values.float() * expanded(scale, (100, 60), 32))


@pytest.mark.parametrize("scales", [(2, 3), (200, 1), ()])
def test_dora_on_fp8(tmp_path: Path, scales: tuple[int, ...]) -> None:
    """Its norms are those of the values that the stored ones stand for."""
    stored, scale = made((200, 300), scales, 1, torch.float8_e4m3fn)
    plain = {"layer.weight": stored.float() * expanded(scale, (200, 300))}
    base = write_model(tmp_path / "plain", plain, config=CONFIG)
    quantized = {"layer.weight": stored, "layer.weight_scale_inv": scale}
    other = write_model(tmp_path / "fp8", quantized, config=CONFIG | {"quantization_config": QUANTIZED})
    (tmp_path / "lora").mkdir()
    key = "base_model.model.layer.lora_{}"
    factors = {"A.weight": torch.randn(4, 300), "B.weight": torch.randn(200, 4), "magnitude_vector": torch.rand(200)}
    save_file({key.format(name): value for name, value in factors.items()}, tmp_path / "lora/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_dora": True}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    found, expected = (open_model(f"{place}+{tmp_path / 'lora'}").state_dict() for place in (other, base))
    torch.testing.assert_close(found["layer.weight"], expected["layer.weight"], rtol=1e-5, atol=1e-6)
