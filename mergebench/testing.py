"""Prove that a merge method keeps the rules: `check_method(my_method)` in a plugin's tests.

The oracle is `in_memory`: the method run on everything at once, its questions answered by brute force.
`streamed` is the engine on real files. The two must agree bit for bit, however the work is cut.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast, overload

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergebench import methods, recipe
from mergebench.checkpoint import Model, open_model
from mergebench.engine.context import Context, Span
from mergebench.engine.merge import Merge
from mergebench.engine.method import Method
from mergebench.engine.noise import TILE
from mergebench.engine.plan import count_passes, plan_merge
from mergebench.engine.run import run_plan
from mergebench.engine.statistics import OrderStatistics, Statistic
from mergebench.errors import MergebenchError

Tensors = Mapping[str, Tensor]
ALL = 1 << 40  # a chunk larger than any tensor here


class _Whole(NamedTuple):
    """All that a set of statistics reaches over, in one chunk."""

    values: Tensor  # [models, elements]
    shapes: tuple[tuple[int, ...], ...]  # of the tensors the columns are made of
    context: Context


# -- the oracle ----------------------------------------------------------------------------------


@overload
def in_memory(
    method: Method, models: Tensor, values: Mapping[str, Any] | None = None, *, scope: str | None = None, seed: int = 0
) -> Tensor: ...
@overload
def in_memory(
    method: Method,
    models: Sequence[Tensors],
    values: Mapping[str, Any] | None = None,
    *,
    base: Tensors | None = None,
    scope: str | None = None,
    seed: int = 0,
) -> dict[str, Tensor]: ...
def in_memory(
    method: Method,
    models: Tensor | Sequence[Tensors],
    values: Mapping[str, Any] | None = None,
    *,
    base: Tensors | None = None,
    scope: str | None = None,
    seed: int = 0,
) -> Tensor | dict[str, Tensor]:
    """What a method makes of models that are all in memory, in float32.

    models: either tensors by name for each model (then the result is a merged model), or one tensor
    [models, elements] of what the method takes, task vectors or weights (then it is the merged row). values:
    parameters by the recipe's names. Order statistics are answered by sorting everything; other
    statistics are taken over the engine's tiles, in their order, as the bits of a sum depend on it.
    """
    params = make_params(method, values or {}, len(models))
    scope = scope or method.scope
    if isinstance(models, Tensor):
        return run_whole(method, params, _whole([{"tensor": row} for row in models], ["tensor"], None, scope, seed))
    reference = base if base is not None else models[0]
    units = [list(reference)] if scope == "model" else [[name] for name in reference]
    merged = {}
    for names in units:
        difference = base if method.takes == "task_vectors" else None
        result = run_whole(method, params, _whole(models, names, difference, scope, seed))
        for name, part in zip(names, torch.split(result, [reference[name].numel() for name in names]), strict=True):
            part = part.reshape(reference[name].shape)
            merged[name] = part if difference is None else part + difference[name].float()
    return merged


def _whole(models: Sequence[Tensors], names: Sequence[str], base: Tensors | None, scope: str, seed: int) -> _Whole:
    def row(tensors: Tensors) -> Tensor:
        return torch.cat([tensors[name].float().reshape(-1) for name in names])

    values = torch.stack([row(tensors) if base is None else row(tensors) - row(base) for tensors in models])
    shapes = tuple(tuple(models[0][name].shape) for name in names)
    spans = tuple(Span(name, 0, models[0][name].numel()) for name in names)
    labels = tuple(f"model{number}" for number in range(len(models)))
    context = Context(values.shape[1], labels, spans, shapes[0], scope, seed, torch.device("cpu"))
    return _Whole(values, shapes, context)


def make_params(method: Method, values: Mapping[str, Any], models: int) -> Any:
    """A method's `Params` from recipe names: defaults filled in, one value for each model where it takes that."""
    values = {name.rstrip("_"): value for name, value in values.items()}
    unknown = values.keys() - method.parameters.keys()
    assert not unknown, f"{method.name}: it has no parameter '{min(unknown)}', it has {', '.join(method.parameters)}"
    found = {}
    for name, parameter in method.parameters.items():
        assert name in values or not parameter.required, f"{method.name}: '{name}' has no default: give it a value"
        value = values.get(name, parameter.default)
        each = tuple(value) if isinstance(value, (tuple, list)) else (value,) * (models if parameter.per_model else 1)
        for one in each:
            complaint = None if one is None and parameter.default is None else parameter.complaint(one)
            assert complaint is None, f"{method.name}: {name} {complaint}"
        found[name] = each if parameter.per_model else value
    return method.make_params(found)


def run_whole(method: Method, params: Any, whole: _Whole) -> Tensor:
    """Run a method on one chunk that is all there is."""
    with _one_thread():
        running: Any = method(whole.values, params, whole.context)
        if not inspect.isgenerator(running):
            return cast(Tensor, running)
        try:
            statistic = next(running)
            while True:
                assert isinstance(statistic, Statistic), (
                    f"{method.name}: it yields {type(statistic).__name__}, and only a statistic can be answered"
                )
                statistic = running.send(brute_force(statistic, method.cut, whole.shapes))
        except StopIteration as end:
            return cast(Tensor, end.value)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As the engine's workers compute: a library may add in another order with more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def brute_force(statistic: Statistic, cut: str, shapes: Sequence[tuple[int, ...]]) -> Any:
    """The answer to a question about a chunk that is all of the tensors of these shapes."""
    if isinstance(statistic, OrderStatistics):
        ordered = np.sort(statistic.values.numpy(), axis=1)
        picked = [[row[rank] for row, rank in zip(ordered, ranks, strict=True)] for ranks in statistic.ranks]
        return tuple(torch.tensor(np.array(column)).unsqueeze(1) for column in picked)
    sizes = [int(np.prod(shape)) for shape in shapes]
    tiles = [-(-size // TILE) for size in sizes]
    state, first = statistic.init(sum(sizes), sum(tiles), None, sum(sizes)), 0
    for part, shape, count in zip(torch.split(statistic.values, sizes, dim=1), shapes, tiles, strict=True):
        columns = shape[-1] if shape else 1
        step = {"element": TILE, "row": max(TILE // columns, 1) * columns, "tensor": part.shape[1]}[cut]
        for start in range(0, part.shape[1], step):
            piece = copy.copy(statistic)
            piece.values = part[:, start : start + step]
            piece.reduce(state, first + start // TILE)
        first += count
    return statistic.finish(state)


# -- the product ---------------------------------------------------------------------------------


class Checkpoints:
    """Models written to a folder once, to be merged by the engine many times."""

    def __init__(self, folder: Path, models: Sequence[Tensors], base: Tensors | None = None) -> None:
        self.folder = folder
        self.models = tuple(self._write(f"model{number}", tensors) for number, tensors in enumerate(models))
        self.base = None if base is None else self._write("base", base)

    def _write(self, name: str, tensors: Tensors) -> Model:
        file = self.folder / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, file)
        return open_model(str(file))

    def merge(
        self, method: Method, params: Any, *, scope: str | None = None, seed: int = 0, **planned: Any
    ) -> dict[str, Tensor]:
        """The merged model as stored; `planned` goes to `plan_merge`: chunk, workers, memory."""
        names = tuple(f"model{number}" for number in range(len(self.models)))
        merge = Merge(method, params, self.base, self.models, names, scope=scope or method.scope, seed=seed)
        out = self.folder / "out"
        run_plan(plan_merge(merge, device="cpu", **planned), out, overwrite=True)
        return dict(load_file(out / "model.safetensors"))

    def hashes(self) -> dict[str, str]:
        """The inputs' bytes, to see that they were left alone."""
        files = sorted(self.folder.glob("*.safetensors"))
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def streamed(
    method: Method,
    models: Sequence[Tensors],
    values: Mapping[str, Any] | None = None,
    *,
    base: Tensors | None = None,
    scope: str | None = None,
    seed: int = 0,
    **planned: Any,
) -> dict[str, Tensor]:
    """What the engine makes of the same models written to files: `in_memory`'s counterpart, stored types kept."""
    params = make_params(method, values or {}, len(models))
    with tempfile.TemporaryDirectory(prefix="mergebench-") as folder:
        return Checkpoints(Path(folder), models, base).merge(method, params, scope=scope, seed=seed, **planned)


# -- the check -----------------------------------------------------------------------------------


def check_method(method: Method, **values: Any) -> None:
    """Assert that a merge method keeps the rules; `values` are parameters by the recipe's names.

    Small checkpoints are written and merged, streamed and in memory. What the method does wrong is an
    `AssertionError` with a sentence that says what, and why it matters.
    """
    count = method.models or 3
    params = make_params(method, values, count)
    _check_declaration(method)
    _check_recipe(method, params, count)
    _check_function(method, params, count)
    with tempfile.TemporaryDirectory(prefix="mergebench-") as folder:
        _check_streaming(method, params, count, Path(folder))
    with tempfile.TemporaryDirectory(prefix="mergebench-") as folder:
        _check_zero(method, params, count, Path(folder))


def _check_declaration(method: Method) -> None:
    name = method.name
    assert method.summary, f"{name}: it has no docstring, which `mergebench methods` shows: say what it computes"
    assert method.paper, (
        f"{name}: it names no source, so nobody can check it: paper='arXiv:...', or where it is derived"
    )
    for parameter in method.parameters.values():
        assert parameter.help, f"{name}: parameter '{parameter.name}' does not say what it means: param(..., 'help')"
        if not parameter.required and parameter.default is not None:
            complaint = parameter.complaint(parameter.default)
            assert complaint is None, f"{name}: the default of '{parameter.name}' is out of its own range: {complaint}"


def _check_recipe(method: Method, params: Any, count: int) -> None:
    """Parameters written in a recipe reach the method as they were meant. Only for methods a recipe can name."""
    if method.name not in methods.names() or methods.get(method.name) is not method:
        return
    given = {name: getattr(params, field) for name, field in method.fields.items()}
    each = {name for name, parameter in method.parameters.items() if parameter.per_model}
    source = {
        "merge_method": method.name,
        "base_model": "base",
        "models": [
            {"model": f"model{number}", "parameters": {name: given[name][number] for name in each}}
            for number in range(count)
        ],
        "parameters": {name: value for name, value in given.items() if name not in each and value is not None},
    }
    with tempfile.TemporaryDirectory(prefix="mergebench-") as folder:
        file = Path(folder) / "recipe.yaml"
        for _ in range(2):  # as written by hand, and as written out by the recipe itself
            file.write_text(json.dumps(source), encoding="utf-8")  # JSON is YAML
            loaded = recipe.load(file)
            found = method.make_params(loaded.params(loaded.models))
            assert found == params, f"{method.name}: a recipe turns {params} into {found}: parameters must survive YAML"
            source = loaded.to_dict()


def _check_function(method: Method, params: Any, count: int) -> None:
    """The function itself, on chunks in memory: its form, its input left alone, the same questions always."""
    name, random = method.name, torch.Generator().manual_seed(1)
    passes = count_passes(Merge(method, params, None, (None,) * count, ("",) * count, scope=method.scope))  # type: ignore[arg-type]
    chunks = {
        "ordinary values": torch.randn(count, 500, generator=random),
        "small values": torch.randn(count, 500, generator=random) * 1e-3,
        "one element": torch.ones(count, 1),
    }
    for kind, values in chunks.items():
        whole = _whole([{"tensor": row} for row in values], ["tensor"], None, method.scope, 0)
        asked: list[Statistic] = []
        result = run_whole(_watched(method, asked), params, whole)
        assert isinstance(result, Tensor), f"{name}: it gives {type(result).__name__}, a tensor [elements] is wanted"
        shape, dtype = list(result.shape), result.dtype
        assert shape == [values.shape[1]], f"{name}: it gives {shape} for {list(values.shape)}, [elements] is wanted"
        assert dtype == torch.float32, f"{name}: it gives {dtype}; methods work in float32, the writer casts once"
        assert torch.isfinite(result).all(), f"{name}: it gives NaN or Inf for {kind}"
        assert len(asked) == passes, (
            f"{name}: it asks {len(asked)} questions for {kind} and {passes} for others: "
            "the engine plans its sweeps before it sees the data, so the questions must be the same for all"
        )
        again = run_whole(method, params, whole)
        assert torch.equal(result, again), (
            f"{name}: two runs on the same values differ: it is replayed for every chunk, "
            "so it may keep no state, and its randomness must come from ctx.bernoulli"
        )


def _watched(method: Method, asked: list[Statistic]) -> Method:
    """The method, its questions noted down and its input compared after each step."""
    function = method.function

    def watched(values: Tensor, params: Any, context: Context) -> Any:
        before = values.clone()

        def check() -> None:
            assert torch.equal(before, values), (
                f"{method.name}: it writes into its input, a buffer that the engine reads again: work on a copy"
            )

        def ask(running: Any) -> Any:
            answer = None
            while True:
                try:
                    statistic = running.send(answer)
                except StopIteration as end:
                    check()
                    return end.value
                check()
                asked.append(statistic)
                answer = yield statistic

        running = function(values, params, context)
        if inspect.isgenerator(running):
            return ask(running)
        check()
        return running

    changed: Callable[..., Any] = watched
    copied = copy.copy(method)
    object.__setattr__(copied, "function", changed)
    return copied


_SMALL = {"matrix": (13, 11), "bias": (23,), "scale": ()}
_LARGE = {"matrix": (3, TILE // 2 + 465), "bias": (300,), "scale": (), "one": (1,), "long": (7 * TILE + 5,)}
_DTYPES = {"matrix": torch.bfloat16, "bias": torch.float16}  # the others float32


def _models(shapes: Mapping[str, tuple[int, ...]], count: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A base and fine-tunes: near it and with exact zeros but for `long`, where they go their own ways."""
    random = torch.Generator().manual_seed(len(shapes))

    def tensor(name: str, origin: Tensor | None = None) -> Tensor:
        value = torch.randn(shapes[name], generator=random)
        if origin is not None and name != "long":
            value = origin.float() + value * 0.01 * (torch.rand(shapes[name], generator=random) > 0.4)
        return value

    base = {name: tensor(name).to(_DTYPES.get(name, torch.float32)) for name in shapes}
    tuned = [{name: tensor(name, base[name]).to(base[name].dtype) for name in shapes} for _ in range(count)]
    tuned[-1]["matrix"] = tuned[-1]["matrix"].float()  # models may be stored in other float types than the base
    steps = {"steps": torch.arange(5)}
    return base | steps, [tensors | steps for tensors in tuned]


def _check_streaming(method: Method, params: Any, count: int, place: Path) -> None:
    """The engine against the oracle, however the work is cut, by however many workers, at either scope."""
    other = "tensor" if method.scope == "model" else "model"
    asked: list[Statistic] = []
    whole = _whole([{"tensor": row} for row in torch.eye(count)], ["tensor"], None, method.scope, 0)
    run_whole(_watched(method, asked), params, whole)
    sums = any(not isinstance(statistic, OrderStatistics) for statistic in asked)  # taken over whole tiles
    if method.cut != "element":
        small, large = [(None, 1, method.scope), (None, 2, other)], [(None, 1), (None, 3)]
    else:
        small = [(TILE, 1, method.scope)] if sums else [(7, 1, method.scope), (7, 2, other)]
        large = [(TILE, 1), (TILE, 2), (TILE, 3), (7 * TILE, 2), (ALL, 1)]
    far = [(chunk, workers, method.scope) for chunk, workers in large] + [
        (large[-1][0], 2, other),
        (large[0][0], 3, other),
    ]
    for shapes, cuts in ((_SMALL, small), (_LARGE, far)):
        folder = place / str(len(shapes))
        folder.mkdir()
        base, models = _models(shapes, count)
        files = Checkpoints(folder, models, base)
        before = files.hashes()
        expected = {scope: _oracle(method, params, base, models, scope) for scope in (method.scope, other)}
        for chunk, workers, scope in cuts:
            merged = files.merge(
                method, params, scope=scope, seed=5, workers=workers, chunk=min(chunk, 16 * TILE) if chunk else None
            )
            for tensor, value in expected[scope].items():
                assert torch.isfinite(value).all(), f"{method.name}: {tensor} is not finite"
                assert torch.equal(value.to(base[tensor].dtype), merged[tensor]), (
                    f"{method.name}: {tensor} {list(value.shape)} merged at scope {scope} in chunks of {chunk or 'its own'} "
                    f"by {workers} workers differs from merged in memory: the result must not depend on where a chunk ends"
                )
            assert torch.equal(base["steps"], merged["steps"]), f"{method.name}: an integer tensor is not the base's"
        assert before == files.hashes(), f"{method.name}: an input file changed"
