"""Find the base's names for the tensors that a PEFT directory changes, and put deltas on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.format import Base
from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.kind import DeltaKind, Misfit, Part
from mergebench.checkpoint.names import is_vocabulary, match
from mergebench.deltas.dense import dense
from mergebench.deltas.peft.directory import OTHER_MODEL
from mergebench.errors import ModelError

WITH_HEAD = "name a base saved with it, such as the classifier that the adapter was trained on"


class Names:
    """The base's names for the tensors that an adapter changes.

    The adapter's model may have another prefix (`model.`, `bert.`), or other names in another version. shapes: of the
    changed tensors, by the adapter's names, as the base stores them.
    """

    def __init__(
        self, directory: Path, base: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...] | None]
    ) -> None:
        self._directory, self._base, self._shapes = directory, base, shapes

    def find(self, name: str) -> str:
        """The base tensor for `name`; `ModelError` if there is none."""
        if name in self._base:
            return name
        ends: list[str] = [*self._longer.get(name, ()), *(end for end in _ends(name) if end in self._base)]
        if len(ends) == 1:
            return ends[0]
        if name not in self._matched:
            raise ModelError(f"{self._directory}: the base has no tensor '{name}' to adapt", OTHER_MODEL)
        return self._matched[name]

    @cached_property
    def _longer(self) -> dict[str, list[str]]:
        """The base's names by their suffixes."""
        longer: dict[str, list[str]] = {}
        for name in self._base:
            for end in _ends(name):
                longer.setdefault(end, []).append(name)
        return longer

    @cached_property
    def _matched(self) -> dict[str, str]:
        return match(self._shapes, self._base)


class Placing:
    """Puts the deltas of a PEFT directory on the base's tensors, one on each."""

    def __init__(self, directory: Path, base: Base, shapes: Mapping[str, tuple[int, ...] | None]) -> None:
        self._directory, self._base, self._shapes = directory, base, shapes
        self._names = Names(directory, base.tensors, shapes)
        self.deltas: dict[str, Delta] = {}

    def put_whole(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Put tensors in the place of the base's, by the adapter's names."""
        for stored, tensor in tensors.items():
            if self.known(stored) is None:
                raise ModelError(
                    f"{self._directory}: it brings a part '{stored}', which the base does not have", WITH_HEAD
                )
            self.put(stored, tensor.name, dense, {"values": Part(tensor)}, replace=True)

    def find(self, stored: str) -> str:
        """The base's name of the tensor that the adapter calls `stored`; `ModelError` if the base has none."""
        return self._names.find(stored)

    def known(self, stored: str) -> str | None:
        """The base's name, or None if the base has no such tensor."""
        try:
            return self._names.find(stored)
        except ModelError:
            return None

    def find_fitting(self, stored: str, what: str) -> str:
        """The base's name as `find` gives it; `ModelError` too if its shape differs from the adapter's."""
        name = self.find(stored)
        self.check_fits(name, stored, what, self._shapes[stored])
        return name

    def check_fits(self, name: str, stored: str, what: str, shape: tuple[int, ...] | None) -> None:
        """`ModelError` if the base's tensor is not of this shape."""
        target = self._base.tensors[name]
        if shape is not None and shape != target.shape:
            if is_vocabulary(stored) and len(shape) == 2 and shape[1:] == target.shape[1:]:
                raise ModelError(
                    f"{self._directory}: {what}: it has {shape[0]} tokens, the base {target.shape[0]}",
                    f"resize the base to {shape[0]} tokens (resize_token_embeddings) and name the model that gives",
                )
            text = f"the adapter changes {list(shape)}, base has {list(target.shape)}"
            raise ModelError(f"{self._directory}: {what}: {text}", OTHER_MODEL)

    def put(self, stored: str, what: str, kind: DeltaKind, parts: Mapping[str, Part | None], **settings: object) -> str:
        """Put a delta on the tensor that the adapter calls `stored`; return the base's name.

        `ModelError` if the base has no such tensor, if its shape differs, or as `put_on` says.
        """
        name = self.find_fitting(stored, what)
        self.put_on(name, what, kind, parts, None, **settings)
        return name

    def put_on(
        self,
        name: str,
        what: str,
        kind: DeltaKind,
        parts: Mapping[str, Part | TensorInfo | None],
        shape: tuple[int, ...] | None = None,
        **settings: object,
    ) -> None:
        """Put a delta on a tensor of the base, seen as `shape`; what: the adapter's name for it, in messages.

        `ModelError` if the tensor holds integers, is changed already, or the parts do not fit it.
        """
        target = self._target(name, what)
        try:
            self.deltas[name] = kind.on(shape or target.shape, parts, **settings)
        except Misfit as error:
            text = f"{error}, base has {list(target.shape)}"
            raise ModelError(f"{self._directory}: {what}: {text}", OTHER_MODEL) from None
        except ValueError as error:
            raise ModelError(f"{self._directory}: {what}: {error}") from None

    def put_delta(self, name: str, what: str, delta: Delta) -> None:
        """Put a delta on a tensor of the base, whose parts are known to fit it."""
        self._target(name, what)
        self.deltas[name] = delta

    def _target(self, name: str, what: str) -> TensorInfo:
        target = self._base.tensors.get(name)
        if target is None:
            raise ModelError(f"{self._directory}: {what}: the base has no tensor '{name}' to adapt", OTHER_MODEL)
        if name in self.deltas:
            raise ModelError(f"{self._directory}: {what}: '{name}' is changed twice")
        if not target.is_float:
            text = f"base has it as {target.dtype}: only floats can be adapted"
            raise ModelError(f"{self._directory}: {what}: {text}")
        return target


def put_whole(tensors: Mapping[str, TensorInfo], placing: Placing, below: Placing) -> dict[str, TensorInfo]:
    """Put tensors in the place of the base's: by `below` the biases that `placing` changes too. Returns those that the
    base does not have.

    With `bias: all` a layer's own bias is trained, and what the adapter adds to a bias is added to that one.
    """
    new = {name: tensor for name, tensor in tensors.items() if placing.known(name) is None}
    twice = {name for name in tensors if name.endswith(".bias") and placing.known(name) in placing.deltas}
    below.put_whole({name: tensor for name, tensor in tensors.items() if name in twice})
    placing.put_whole({name: tensor for name, tensor in tensors.items() if name not in twice and name not in new})
    return new


def on_stored(b: TensorInfo, a: TensorInfo, in_out: bool) -> dict[str, Part | None]:
    """B [out, r] and A [r, in] as factors of the stored tensor; if that is stored [in, out], A' and B'."""
    if in_out:
        return {"b": Part(a, transposed=True), "a": Part(b, transposed=True)}
    return {"b": Part(b), "a": Part(a)}


def _ends(name: str) -> Iterator[str]:
    """`b.c` and `c` of `a.b.c`."""
    while "." in name:
        name = name.partition(".")[2]
        yield name
