"""A patch read on top of its model, `BASE+patch.safetensors`: equal to the whole difference laid out, at any cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import unpack, write_model
from safetensors.torch import save_file
from torch import Tensor

from mergebench.checkpoint.files import Files
from mergebench.checkpoint.fp8 import Scales
from mergebench.checkpoint.values import chain
from mergebench.deltas.open import open_model
from mergebench.errors import MergebenchError, ModelError, RunError

Parts = dict[str, Tensor]


def dense(shape: tuple[int, ...], numbers: Tensor, amounts: Tensor, direction: Tensor, transposed: bool) -> Tensor:
    """The difference as a whole tensor, by brute force."""
    delta = torch.zeros(shape)
    turned = delta.transpose(-1, -2) if transposed else delta
    for number, amount in zip(numbers.tolist(), amounts, strict=True):
        expert, neuron = divmod(number, turned.shape[-2])
        (turned[expert] if delta.dim() == 3 else turned)[neuron] = amount * direction
    return delta


def put(file: Path, parts: Parts, columns: list[str], **about: Any) -> Path:
    save_file(parts, file, metadata={"patch": json.dumps({"columns": columns, **about})})
    return file


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (3, 4, 5), (1, 6)])
@pytest.mark.parametrize("every", [1, 3, 100])
def test_any_piece_of_it(shape: tuple[int, ...], transposed: bool, every: int, tmp_path: Path) -> None:
    """All 0 to 60 starts and stops: what is not changed keeps its bits, zeros of either sign."""
    torch.manual_seed(0)
    width = shape[-2 if transposed else -1]
    numbers = torch.arange(0, torch.Size(shape).numel() // width, every)
    amounts, direction = torch.randn(len(numbers)), torch.randn(width)
    model = write_model(tmp_path / "model", {"m.weight": torch.zeros(shape)})
    parts = {"direction": direction, "m.weight.rows": numbers, "m.weight.amount": amounts}
    parts["m.weight.orig"] = torch.zeros(len(numbers), width)
    patch = put(tmp_path / "p.safetensors", parts, ["m.weight"] if transposed else [])
    opened = open_model(f"{model}+{patch}")
    (delta,) = opened.deltas["m.weight"]
    assert delta.kind == "row_patch"
    changed = dense(shape, numbers, torch.ones(len(numbers)), torch.ones(width), transposed).view(-1) != 0
    start_values = torch.where(torch.rand(changed.shape) < 0.5, -0.0, torch.randn(changed.shape))
    wanted = torch.where(
        changed, start_values + dense(shape, numbers, amounts, direction, transposed).view(-1), start_values
    )
    with Files() as files:
        reader = chain(files, Scales(files), opened.tensors["m.weight"], [delta])
        for start in range(len(wanted)):
            for stop in range(start, len(wanted) + 1):
                piece = start_values[start:stop].clone()
                reader.add_into(start, piece)
                assert torch.equal(piece.view(torch.int32), wanted[start:stop].view(torch.int32)), (start, stop)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = {
        "layers.0.a.weight": torch.randn(6, 4),
        "layers.0.b.weight": torch.randn(4, 6),
        "n": torch.ones(6, 4, dtype=torch.int64),
    }
    return write_model(tmp_path / "base", tensors | {"layers.0.bias": torch.randn(4)})


def parts(**changed: Tensor | None) -> Parts:
    good: dict[str, Tensor | None] = {
        "direction": torch.ones(4),
        "layers.0.a.weight.rows": torch.tensor([1, 4]),
        "layers.0.a.weight.amount": torch.ones(2),
        "layers.0.a.weight.orig": torch.zeros(2, 4),
    }
    renamed = {key.replace("__", "."): value for key, value in changed.items()}
    return {key: value for key, value in (good | renamed).items() if value is not None}


def test_a_patch_is_no_model(base: Path, tmp_path: Path) -> None:
    patch = put(tmp_path / "p.safetensors", parts(), [])
    with pytest.raises(ModelError, match="it is a file of deltas, not a model") as caught:
        open_model(str(patch))
    assert caught.value.hint == f"name its base: BASE+{patch}"
    assert open_model(f"{base}+{patch}").deltas.keys() == {"layers.0.a.weight"}


def moved(old: str, new: str) -> dict[str, Tensor | None]:
    """The good patch with the tensor it changes called otherwise."""
    return {
        f"{name}.{part}".replace(".", "__"): value
        for name, ones in ((old, (None, None, None)), (new, (torch.tensor([0]), torch.ones(1), torch.zeros(1, 4))))
        for part, value in zip(("rows", "amount", "orig"), ones, strict=True)
    }


WRONG: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "another tensor": (moved("layers.0.a.weight", "layers.1.a.weight"), "has no tensor 'layers.1.a.weight'"),
    "a vector": (moved("layers.0.a.weight", "layers.0.bias"), "has F32 [4]"),
    "integers": (moved("layers.0.a.weight", "n"), "has I64 [6, 4]"),
    "another width": (
        moved("layers.0.a.weight", "layers.0.b.weight"),
        "the patch changes 1 vectors of 4 elements, BASE has F32 [4, 6]",
    ),
    "too many rows": (
        {"layers__0__a__weight__rows": torch.tensor([1, 6])}, "changes 2 vectors of 4 elements, BASE has F32 [6, 4]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_another_models_patch(name: str, base: Path, tmp_path: Path) -> None:
    changed, said = WRONG[name]
    patch = put(tmp_path / "p.safetensors", parts(**changed), [])
    with pytest.raises(ModelError) as caught:
        open_model(f"{base}+{patch}")
    assert said.replace("BASE", f"{base}+{patch}") in str(caught.value)
    assert caught.value.hint == "the patch belongs to another model"


DAMAGED: dict[str, dict[str, Tensor | None]] = {
    "no direction": {"direction": None},
    "no amounts": {"layers__0__a__weight__amount": None},
    "rows twice": {"layers__0__a__weight__rows": torch.tensor([4, 4])},
    "rows backwards": {"layers__0__a__weight__rows": torch.tensor([4, 1])},
    "a row below none": {"layers__0__a__weight__rows": torch.tensor([-1, 1])},
    "other counts": {"layers__0__a__weight__amount": torch.ones(3)},
    "other types": {"layers__0__a__weight__rows": torch.tensor([1.0, 4.0])},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_patch(name: str, base: Path, tmp_path: Path) -> None:
    patch = put(tmp_path / "p.safetensors", parts(**DAMAGED[name]), [])
    with pytest.raises(RunError, match=r"p\.safetensors"):
        open_model(f"{base}+{patch}")


def test_what_is_no_patch(base: Path, tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(put(tmp_path / "p.safetensors", parts(), []).read_bytes()[:-1])
    (tmp_path / "y.txt").write_text("no")
    assert unpack(tmp_path / "p.safetensors")
    for file, said, code in (
        ("x.safetensors", "not a patch", 3), ("cut.safetensors", "the file has", 1), ("y.txt", "y.txt", 3),
        ("z.safetensors", "no such file", 3),
    ):  # fmt: skip
        with pytest.raises(MergebenchError, match=said) as caught:
            open_model(f"{base}+{tmp_path / file}")
        assert caught.value.exit_code == code, file
