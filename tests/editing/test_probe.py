"""A probe's file: what is written is read, what others publish is read, what is no probe is refused in a sentence."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, tensor

from mergebench.editing.probes.probe import Probe, read_probe
from mergebench.errors import MergebenchError, ModelError, RecipeError, RunError

WEIGHT = tensor([[3.0, 0.0, -1.0], [1.0, 4.0, -1.0]])


def write(path: Path, metadata: dict[str, str] | None = None, **tensors: Tensor) -> Path:
    save_file(
        {name.replace("_weight", ".weight").replace("_bias", ".bias"): one for name, one in tensors.items()},
        path,
        metadata,
    )
    return path


def test_round_trip(tmp_path: Path) -> None:
    about = {"layer": 3, "model": {"identity": "0123"}, "layers": [{"layer": 0, "auc": 0.5}]}
    probe = Probe(WEIGHT, tensor([0.5, -0.25]), tensor([1.0, 2.0, 3.0]), about)
    saved = probe.save(tmp_path / "probe.safetensors")
    found = read_probe(tmp_path / "probe.safetensors")
    assert torch.equal(found.weight, WEIGHT)
    assert found.bias.tolist() == [0.5, -0.25]
    assert found.mean_diff is not None
    assert found.mean_diff.tolist() == [1, 2, 3]
    assert (found.about, found.width, found.file) == (about, 3, tmp_path / "probe.safetensors")
    assert found.sha256 == saved.sha256
    assert len(found.sha256) == 64
    assert [path.name for path in tmp_path.iterdir()] == ["probe.safetensors"]
    other = tmp_path / "plain"
    other.write_text("x")
    assert stat.S_IMODE(found.file.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_directions_and_logit() -> None:
    probe = Probe(WEIGHT, tensor([0.5, -0.25]), tensor([0.0, 2.0, 0.0]))
    assert probe.direction().tolist() == probe.direction("row1").tolist() == [1, 4, -1]
    assert probe.direction("diff").tolist() == [-2, 4, 0]
    assert torch.allclose(probe.direction("unit-diff"), tensor([-2.0, 4.0, 0.0]) / 20**0.5)
    assert probe.direction("mean-diff").tolist() == [0, 2, 0]
    features = tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 5.0]])
    desired, undesired = (features @ WEIGHT.T + probe.bias).T
    assert probe.logit(features).tolist() == (undesired - desired).tolist() == [1.25, -4.75]
    swapped = Probe(WEIGHT.flip(0), probe.bias.flip(0))
    assert torch.equal(swapped.logit(features), -probe.logit(features))


@pytest.mark.parametrize("prefix", ["", "mlp_"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_published_by_others(tmp_path: Path, prefix: str, dtype: torch.dtype) -> None:
    found = read_probe(write(tmp_path / "p.safetensors", **{f"{prefix}weight": WEIGHT.to(dtype)}))
    assert torch.equal(found.weight, WEIGHT)
    assert (found.bias.tolist(), found.mean_diff, found.about) == ([0, 0], None, {})
    bias = tensor([1.0, 2.0])
    found = read_probe(
        write(tmp_path / "p.safetensors", **{f"{prefix}weight": WEIGHT.to(dtype), f"{prefix}bias": bias.to(dtype)})
    )
    assert torch.equal(found.bias, bias)
    with pytest.raises(RecipeError, match=re.escape("p.safetensors: it holds no mean_diff")):
        found.direction("mean-diff")


def said(path: Path) -> tuple[type[MergebenchError], str]:
    with pytest.raises(MergebenchError) as caught:
        read_probe(path)
    assert caught.value.hint
    return type(caught.value), caught.value.message.removeprefix(f"{path.parent}/")


def test_what_is_no_probe(tmp_path: Path) -> None:
    path, nan = tmp_path / "p.safetensors", WEIGHT.clone()
    nan[0, 1] = torch.nan
    held = "not a probe: it holds"
    cases: list[tuple[dict[str, Tensor], type[MergebenchError], str]] = [
        ({"weight": WEIGHT[0].clone()}, ModelError, f"{held} weight F32 [3]"),
        ({"weight": WEIGHT[:1].clone()}, ModelError, f"{held} weight F32 [1, 3]"),
        ({"weight": WEIGHT.T.contiguous()}, ModelError, f"{held} weight F32 [3, 2]"),
        ({"weight": WEIGHT[:, :0].clone()}, ModelError, f"{held} weight F32 [2, 0]"),
        ({"weight": WEIGHT, "bias": torch.zeros(1)}, ModelError, f"{held} bias F32 [1], weight F32 [2, 3]"),
        ({"weight": WEIGHT, "mean_diff": torch.zeros(2)}, ModelError, f"{held} mean_diff F32 [2], weight F32 [2, 3]"),
        ({"weight": WEIGHT.int()}, ModelError, f"{held} weight I32 [2, 3]"),
        ({name: torch.ones(1) for name in "abcde"}, ModelError, f"{held} a F32 [1], b F32 [1], c F32 [1] and 2 more"),
        ({"weight": nan}, RunError, "weight holds a value that is not finite"),
        ({"mlp_weight": WEIGHT, "mlp_bias": tensor([torch.inf, 0])}, RunError, "mlp.bias holds a value that is not"),
        ({"weight": WEIGHT.double() * 1e300}, RunError, "weight holds a value that is not finite"),
        ({"weight": WEIGHT * 0}, ModelError, "its weight is all zero"),
    ]
    for tensors, kind, message in cases:
        found = said(write(path, **tensors))
        assert found[0] is kind
        assert found[1].startswith(f"p.safetensors: {message}"), found
    for metadata in ("[1]", "{", '{"model": "x"}'):
        assert said(write(path, {"probe": metadata}, weight=WEIGHT))[0] is RunError
    assert read_probe(write(path, {"probe": json.dumps({"layer": 2})}, weight=WEIGHT)).about == {"layer": 2}
    with pytest.raises(ModelError, match="no such file"):
        read_probe(tmp_path / "gone")
    torch.save({"weight": WEIGHT}, tmp_path / "p.pt")
    assert said(tmp_path / "p.pt") == (ModelError, "p.pt: a pickle, which is never loaded: it can run code")
    path.write_bytes(path.read_bytes()[:-4])
    assert said(path)[0] is RunError


@pytest.mark.parametrize("kind", ["row1", "diff", "unit-diff", "mean-diff"])
def test_a_direction_that_points_nowhere(kind: str) -> None:
    one = tensor([[1.0, 2.0], [1.0, 2.0]])
    one[1] *= kind != "row1"
    with pytest.raises(RecipeError, match=f"its direction {kind} is zero"):
        Probe(one, torch.zeros(2), torch.zeros(2)).direction(kind)
    with pytest.raises(RecipeError, match="direction 'row2' is not possible"):
        Probe(one, torch.zeros(2)).direction("row2")
