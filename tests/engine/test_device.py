"""Methods on a device that is no CPU: they mix nothing on it with what is on the host.

A stand-in for a GPU: tensors that say they are on one, hold their numbers on the host, and refuse, as CUDA does, what
mixes the two. It knows no streams: what only time can spoil needs a GPU (tests/test_gpu.py).

python -m pytest tests/engine/test_device.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import mergebench
from mergebench import methods
from mergebench.checkpoint.files import Files
from mergebench.engine import replay
from mergebench.engine.brackets import Sample
from mergebench.engine.context import Context, OnData
from mergebench.engine.noise import TILE
from mergebench.engine.read import ChunkReader
from mergebench.engine.span import Span
from mergebench.engine.statistics import OrderStatistics, Statistic, decode, encode
from mergebench.testing.methods import statistics_of
from mergebench.testing.trial import Trial

GPU = torch.device("cuda", 0)
SHAPE = (260, 257)  # more than a tile
AMID = ("index", "index_put", "index_put_", "_index_put_impl_")  # CUDA takes indices that lie on the host


class OnGpu(Tensor):
    """A tensor that says it is on a GPU; `host` has its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnGpu:
        made = Tensor._make_wrapper_subclass(cls, host.shape, host.stride(), 0, dtype=host.dtype)
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        return GPU

    def cpu(self) -> Tensor:
        return self.host

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        away = "cpu" in map(str, [*args, *kwargs.values()])
        return self.host if away else super().to(*(one for one in args if not isinstance(one, torch.device)), **kwargs)

    def tolist(self) -> Any:
        return self.host.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


class Gpu(TorchDispatchMode):
    """Where what is made on the device is `OnGpu`."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_gpu = any(isinstance(one, OnGpu) for one in tensors)
    name, device = function._schema.name.partition("::")[2], kwargs.get("device")
    if device is not None:
        on_gpu = torch.device(device).type == "cuda"
    elif on_gpu and name not in (*AMID, "copy_"):
        stray = [one for one in tensors if not isinstance(one, OnGpu) and one.dim()]
        assert not stray, f"{name} mixes what is on the device with a host tensor {list(stray[0].shape)}"
    args, kwargs = tree_map(lambda one: one.host if isinstance(one, OnGpu) else one, (args, kwargs))
    found = function(*args, **(kwargs | ({} if device is None else {"device": "cpu"})))
    return tree_map(lambda one: OnGpu(one) if on_gpu and isinstance(one, Tensor) else one, found)


def answer(question: Statistic) -> Any:
    """As a sweep finds it, by brackets around a sample; put where the chunks are."""
    numel, sample = question.values.shape[1], None
    if isinstance(question, OrderStatistics):
        sample = Sample(np.ascontiguousarray(question.keyed()[:, ::64][:, :1024]), 16, margin=1e9)
    state = question.init(numel, -(-numel // TILE), sample, 1 << 24)
    question.reduce(state, 0)
    return decode(encode(question.finish(state)), GPU)


def merged(name: str, device: torch.device, ask: Callable[[Statistic], Any], place: Path) -> Tensor:
    trial = Trial(methods.get(name), place)
    count = trial.count(3)
    numel = SHAPE[0] * SHAPE[1]
    values = torch.randn(count, numel, generator=torch.Generator().manual_seed(0)) * 0.01
    chosen = {"density": 0.4, "epsilon": 0.1, "select_topk": 0.4, "gamma": 0.05, "steps": 3}
    params = trial.params(count, chosen)
    models = tuple(f"m{number}" for number in range(count))
    on_data = None
    if trial.method.statistics is not None:
        name, rows = "layers.0.up.weight", values.view(count, *SHAPE)
        made = [statistics_of(trial.method, {name: row})[name] for row in rows]
        wide = [one if trial.method.statistics == "gram" else one.expand(SHAPE).reshape(-1) for one in made]
        on_data = OnData(torch.stack(wide).to(device), (1.0,) * count)
    context = Context(numel, models, (Span("layers.0.up.weight", 0, numel),), SHAPE, "tensor", 0, device, on_data)
    return replay.run_at_once(trial.method, values.to(device), params, context, ask)


@pytest.mark.parametrize("name", methods.names())
def test_methods_stay_on_their_device(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: mock.Mock())
    expected = merged(name, torch.device("cpu"), lambda question: question.exact(), tmp_path)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) goes by way of the host
    try:
        with Gpu():
            found = merged(name, GPU, answer, tmp_path)
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
    assert isinstance(found, OnGpu)
    torch.testing.assert_close(found.host, expected, rtol=1e-5, atol=1e-7)


def test_nothing_is_read_over_what_is_still_being_copied(tmp_path: Path) -> None:
    """A chunk of several tensors leaves all that it read where it was read to: copies to a GPU take their time."""
    files = [
        {"a": torch.full((5,), 1.0 + model), "b": torch.full((7,), 11.0 + model).to(dtype)}
        for model, dtype in enumerate((torch.float32, torch.float64, torch.float32))
    ]
    for model, tensors in enumerate(files):
        save_file(tensors, tmp_path / f"m{model}.safetensors")
    models = [{"model": str(tmp_path / f"m{model}.safetensors")} for model in range(3)]
    plan = mergebench.plan(mergebench.load({"merge_method": "linear", "models": models}))

    with Files() as opened:
        reader = ChunkReader(plan, opened)
        reader._raw.zero_()
        values, _ = reader.load([Span("a", 0, 5), Span("b", 0, 7)], apply=False)

    assert torch.equal(values, torch.stack([torch.cat([one["a"], one["b"].float()]) for one in files]))
    raw = reader._raw.numpy().tobytes()
    for tensors in files:
        for name, value in tensors.items():
            assert value.numpy().tobytes() in raw, name
