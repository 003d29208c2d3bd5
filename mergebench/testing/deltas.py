"""Check that a delta kind keeps the rules: `check_delta(my_kind)` in a plugin's tests; `mergebench doctor` runs it too.

Each check works on small deltas from the kind's own `example`, written to delta files and read again. The oracle is the
kind's function on all rows at once, in float64.
"""

from __future__ import annotations

import dataclasses
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mergebench import deltas as kinds
from mergebench.checkpoint import delta as protocol
from mergebench.checkpoint.delta import Chain, matrix_shape
from mergebench.checkpoint.files import Files
from mergebench.checkpoint.fp8 import Scales
from mergebench.checkpoint.kind import DeltaKind, StoredDelta
from mergebench.checkpoint.values import CPU, Stored, chain
from mergebench.deltas import verbs
from mergebench.deltas.formats.native import Writing, read_file, write_file
from mergebench.deltas.open import open_model
from mergebench.testing.checks import Inapplicable, Report, find

SHAPES = ((23, 17), (1, 9), (31, 1), (24, 16))
TILE = 68  # elements of a tile during checks: a few rows, so that small tensors have several tiles
NAME = "layer.weight"
CLOSE = 1e-4  # of the largest element


class Trial:
    """A kind, and a delta of this kind on a small tensor, in files."""

    def __init__(self, kind: DeltaKind, shape: tuple[int, ...], place: Path, seed: int = 0) -> None:
        self.kind, self.shape = kind, shape
        random = torch.Generator().manual_seed(seed)
        self.base = torch.randn(shape, generator=random)
        if kind.example is None:
            raise Inapplicable("it declares no example")
        given = kind.example(shape, random)
        if given is None:
            raise Inapplicable("no example of this shape")
        self.given = given
        place.mkdir(parents=True, exist_ok=True)
        save_file({NAME: self.base}, place / "base.safetensors")
        self.file = place / "delta.safetensors"
        parts = {name: value for name, value in self.given.items() if isinstance(value, Tensor)}
        self.settings = {name: value for name, value in self.given.items() if not isinstance(value, Tensor)}
        write_file(self.file, {NAME: Writing(kind.name, self.settings, parts)})
        plain = open_model(str(place / "base.safetensors"))
        entry = read_file(self.file).entries[NAME]
        self.delta = kind.on(shape, entry.parts, **entry.settings)
        self.model = dataclasses.replace(plain, deltas={NAME: (self.delta,)})

    def opened(self, files: Files, deltas: Sequence[StoredDelta] = ()) -> Chain:
        """The delta, or the given `deltas`, opened on the base."""
        return chain(files, Scales(files), self.model.tensors[NAME], deltas or [self.delta])

    def source(self, files: Files) -> Stored:
        return Stored(files, Scales(files), self.model.tensors[NAME])

    def added(self, files: Files, edges: Sequence[int] = ()) -> Tensor:
        """W' - W, flat, in pieces that end at these elements."""
        out, opened = torch.zeros(self.base.numel()), self.opened(files)
        for start, stop in zip([0, *edges], [*edges, len(out)], strict=True):
            opened.add_into(start, out[start:stop])
        return out

    def expected(self) -> Tensor:
        """W' - W by the kind's function on all rows at once, float64."""
        with Files() as files:
            p = _double(self._prepared(files))
        rows, columns = matrix_shape(self.shape)
        base = self.base.double().view(rows, columns) if self.delta.needs_base else None
        return self.kind(p, slice(0, rows), base).reshape(-1)

    def _prepared(self, files: Files) -> Any:
        p = self.delta.load(files, CPU)
        rows = slice(0, matrix_shape(self.shape)[0])
        whole = {
            name: getattr(p, name)[rows]
            for name, about in self.kind.fields.items()
            if about.sort in ("rows", "mask") and getattr(p, name) is not None
        }
        p = dataclasses.replace(p, **whole)
        prepared = p if self.kind.prepare is None else self.kind.prepare(p, self.source(files), self.shape)
        stored = [name for name, value in self.given.items() if isinstance(value, Tensor)]
        kept = all(getattr(prepared, name, None) is not None for name in stored)
        return prepared if kept else p  # what replaces the parts is checked against them


def _double(p: Any) -> Any:
    """The parts in float64."""

    def wide(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(wide, value))
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return dataclasses.replace(p, **{field.name: wide(getattr(p, field.name)) for field in dataclasses.fields(p)})


def _any_split(trial: Trial) -> None:
    """The borders of chunks do not change a bit, whether tiles are added, folded or read twice."""
    with Files() as files:
        whole, numel = trial.added(files), trial.base.numel()
        for edges in ([numel // 2], list(range(1, numel)), [1, numel // 3, numel - 1]):
            assert torch.equal(trial.added(files, sorted({e for e in edges if 0 < e < numel})), whole), edges
        folded, once = trial.opened(files), torch.empty(numel)
        folded.read(0, once)
        for start in range(0, numel, 7):
            piece = torch.empty(min(7, numel - start))
            folded.read(start, piece)
            assert torch.equal(piece, once[start : start + 7]), f"folded from element {start}"


def _formula(trial: Trial) -> None:
    """The streamed delta equals the function's result on all rows at once."""
    with Files() as files:
        streamed, expected = trial.added(files).double(), trial.expected()
    worst = float((streamed - expected).abs().max()) if len(expected) else 0.0
    assert worst <= CLOSE * max(float(expected.abs().max()), 1e-6), f"differs by {worst:.3g} from float64"


def _energy(trial: Trial) -> None:
    """The closed form of the squared norm equals that of the full difference."""
    if trial.kind.energy is None:
        raise Inapplicable("it declares no closed form")
    with Files() as files:
        found, expected = verbs.energy(files, trial.delta), float(trial.expected().square().sum())
    assert abs(found - expected) <= CLOSE * max(expected, 1e-12), f"{found:.6g}, written out {expected:.6g}"


def _factors(trial: Trial) -> None:
    """The factors multiply to the full difference."""
    if trial.kind.factors is None:
        raise Inapplicable("it declares no exact factors")
    with Files() as files:
        converted = verbs.as_low_rank(files, trial.delta, base=trial.source(files))
        product = (converted.parts.b.double() @ converted.parts.a.double()).reshape(-1)
    worst = float((product - trial.expected()).abs().max())
    assert converted.kept == 1 and worst <= CLOSE * max(float(product.abs().max()), 1e-6), f"differs by {worst:.3g}"


def _size(trial: Trial) -> None:
    """The reported size is that of the stored tensors."""
    stored = sum(value.nbytes for value in trial.given.values() if isinstance(value, Tensor))
    assert verbs.size([trial.delta]).nbytes == stored, f"{verbs.size([trial.delta]).nbytes} bytes, stored {stored}"


def _another(value: Any) -> Any:
    """Another value of a setting."""
    if isinstance(value, (list, tuple)):
        return (*value, 1)
    return not value if isinstance(value, bool) else f"{value}?" if isinstance(value, str) else value + 1


def _digest(trial: Trial) -> None:
    """Every setting changes the digest, and equal deltas have equal ones."""
    again = StoredDelta(trial.kind, trial.delta.shape, trial.delta.parts, trial.delta.settings)
    assert again.digest == trial.delta.digest and again == trial.delta, "equal deltas differ"
    for name, value in trial.delta.settings:
        other = _another(value)
        changed = tuple((key, other if key == name else kept) for key, kept in trial.delta.settings)
        digest = StoredDelta(trial.kind, trial.delta.shape, trial.delta.parts, changed).digest
        assert digest != trial.delta.digest, f"'{name}' does not change it"


def _memory(trial: Trial) -> None:
    """An opened delta holds no more memory than it reports."""
    with Files() as files:
        p = trial.delta.load(files, CPU)
    held = sum(v.nbytes for v in vars(p).values() if isinstance(v, Tensor))
    assert held <= trial.delta.resident(), f"holds {held} bytes, says {trial.delta.resident()}"


def _pickles(trial: Trial) -> None:
    """The delta survives pickling."""
    assert pickle.loads(pickle.dumps(trial.delta)) == trial.delta, "another one"


def _stacked(trial: Trial) -> None:
    """The delta twice on a base equals the delta on the folded base."""
    with Files() as files:
        twice = torch.empty(trial.base.numel())
        trial.opened(files, [trial.delta, trial.delta]).read(0, twice)
        once = torch.empty(trial.base.numel())
        trial.opened(files).read(0, once)
        folded = trial.file.with_name("folded.safetensors")
        save_file({NAME: once.view(trial.shape)}, folded)
        on_it = dataclasses.replace(open_model(str(folded)), deltas=trial.model.deltas)
        again = on_it.state_dict()[NAME].view(-1)
    assert torch.equal(twice, again), "stacked it is another one"


def _undone(trial: Trial) -> None:
    """Folding and then undoing the delta restores the base's tensor to the bit."""
    parts = {name: value for name, value in trial.given.items() if isinstance(value, Tensor)}
    before = trial.base
    if "rows" in parts:  # for a delta on neurons, the neurons that change
        before = before.mT if trial.settings.get("columns") else before
        before = before.reshape(-1, before.shape[-1])[parts["rows"]]
    kept = trial.file.with_name("kept.safetensors")
    write_file(kept, {NAME: Writing(trial.kind.name, trial.settings, parts, orig=before)})
    folded = trial.file.with_name("folded.safetensors")
    save_file({NAME: trial.model.state_dict()[NAME]}, folded)
    model = open_model(str(folded))
    undo = read_file(kept).undo(NAME, trial.delta)
    undone = dataclasses.replace(model, deltas={NAME: (undo,)}).state_dict()[NAME]
    assert torch.equal(undone.view(torch.int32), trial.base.view(torch.int32)), "it is another base"


def _gradients(trial: Trial) -> None:
    """The float parts get gradients through the function, as training needs."""
    with Files() as files:
        p = trial._prepared(files)
    floats = {n: v for n, v in vars(p).items() if isinstance(v, Tensor) and v.is_floating_point() and n in trial.given}
    if not floats:
        raise Inapplicable("it has no parts to train")
    leaves = {name: value.clone().requires_grad_() for name, value in floats.items()}
    rows, columns = matrix_shape(trial.shape)
    base = trial.base.view(rows, columns) if trial.delta.needs_base else None
    trial.kind(dataclasses.replace(p, **leaves), slice(0, rows), base).square().sum().backward()  # type: ignore[no-untyped-call]
    without = [name for name, leaf in leaves.items() if leaf.grad is None]
    assert not without, f"'{without[0]}' gets none"


CHECKS: dict[str, Callable[[Trial], None]] = {
    "any split": _any_split,
    "formula": _formula,
    "energy": _energy,
    "factors": _factors,
    "size": _size,
    "digest": _digest,
    "memory": _memory,
    "pickles": _pickles,
    "stacked": _stacked,
    "undone": _undone,
    "gradients": _gradients,
}


def check_delta(kind: DeltaKind) -> str:
    """Run every check on a kind; `AssertionError` names the first that fails, and the shape.

    Returns what was checked, in one line.
    """
    assert kind.example is not None, f"{kind.name}: it declares no example, without which nothing can be tried"
    examples = (kind.example(shape, torch.Generator()) for shape in SHAPES)
    assert any(example is not None for example in examples), f"{kind.name}: no example of any shape"
    passed = []
    for name, check in CHECKS.items():
        try:
            _over_shapes(kind, name, check)
        except Inapplicable:
            continue
        passed.append(name)
    return f"{kind.name} keeps the rules: {', '.join(passed)}"


def examine_deltas() -> list[Report]:
    """All checks on every installed kind."""
    reports = []
    for name in kinds.names():
        kind = kinds.get(name)
        findings = tuple(find(check, partial(_over_shapes, kind, check, run)) for check, run in CHECKS.items())
        reports.append(Report(name, kinds.origin(name), findings))
    return reports


def _over_shapes(kind: DeltaKind, name: str, check: Callable[[Trial], None]) -> None:
    skipped = []
    for number, shape in enumerate(SHAPES):
        with tempfile.TemporaryDirectory(prefix="mergebench-") as folder, _small_tiles():
            try:
                check(Trial(kind, shape, Path(folder), number))
            except Inapplicable as reason:
                skipped.append(reason)
            except AssertionError as error:
                raise AssertionError(f"{kind.name}: {name}: {list(shape)}: {error}") from None
    if len(skipped) == len(SHAPES):
        raise skipped[0]


@contextmanager
def _small_tiles() -> Iterator[None]:
    usual = protocol.TILE
    protocol.TILE = TILE
    try:
        yield
    finally:
        protocol.TILE = usual
