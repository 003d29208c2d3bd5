"""The changes of a fine-tune, tensor by tensor: which a LoRA can hold, and the names of their modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cached_property

import torch
from torch import Tensor

from mergebench import methods
from mergebench.adapters.peft_names import modules_of, stored_in_out
from mergebench.checkpoint import adopt
from mergebench.checkpoint.files import Files
from mergebench.checkpoint.mismatch import Mismatch
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.values import Values
from mergebench.deltas.open import open_model
from mergebench.engine.job import Merge
from mergebench.engine.noise import TILE
from mergebench.engine.plan import plan_merge
from mergebench.engine.read import ChunkReader
from mergebench.engine.run import check_equal
from mergebench.engine.span import Span
from mergebench.errors import ModelError, RecipeError, RunError
from mergebench.methods._matrices import is_matrix


class Differences:
    """Fine-tune minus base, read like the task vector of a model."""

    def __init__(self, base: str, model: str) -> None:
        self.base, self.model = open_model(base), model
        tuned = adopt(self.base, open_model(model))
        method = methods.get("task_arithmetic")
        params = method.make_params({"weight": (1.0,), "lambda": 1.0})
        # vocabulary sizes differ: a LoRA cannot hold that, but the linear layers fit
        self.other_tokens = [name for name in self.base.tensors if _other_rows(name, self.base, tuned)]
        merge = Merge(method, params, self.base, (tuned,), (model,), exclude=tuple(self.other_tokens))
        try:
            self.plan = plan_merge(merge, workers=1, device="cpu")
        except Mismatch as error:
            more = f" (and {len(error.problems) - 1} more)" if len(error.problems) > 1 else ""
            message = error.problems[0] + more if error.problems else error.message
            raise ModelError(message, "an adapter is taken out of a fine-tune of the base") from None
        with Files() as opened:
            for one, alias, tensor in self.plan.alignment.must_equal:
                check_equal(opened, one, alias, tensor)
        aliases = self.plan.alignment.aliases
        self.shapes = {
            name: self.base.tensors[name].shape for name in self.plan.alignment.merged if name not in aliases
        }

    @cached_property
    def linear(self) -> dict[str, str]:
        """The linear layers' weights, and their modules' names; PEFT sees no modules in folders."""
        own = {name: shape for name, shape in self.shapes.items() if self.base.naming.folder_of(name) is None}
        found = {name: name.removesuffix(".weight") for name, shape in own.items() if is_linear(name, shape)}
        return found | modules_of(self.base, found)

    @cached_property
    def transposed(self) -> bool:
        """Whether they are stored [in, out], as GPT-2's are."""
        return stored_in_out(self.base, {name: self.shapes[name] for name in self.linear})

    def shape(self, name: str) -> tuple[int, int]:
        """[out, in] of a linear layer."""
        rows, columns = self.shapes[name]
        return (columns, rows) if self.transposed else (rows, columns)


class Reading:
    """The values of a fine-tune's changes and of its base; the last tensor's are kept.

    include: globs of the tensors that an adapter may hold (none: all).
    """

    def __init__(self, found: Differences, files: Files, include: Sequence[str] = ()) -> None:
        self.found, self._include = found, include
        if not any(map(self.included, found.shapes)):
            text = (
                f"--include: '{', '.join(include)}' names no tensor that {found.base.reference} and the fine-tune share"
            )
            raise RecipeError(text, "globs of tensor names, such as '*mlp*'")
        self._reader, self._base = ChunkReader(found.plan, files), found.base.values(files)
        self._last: dict[str, tuple[str, Tensor]] = {}

    def difference(self, name: str) -> Tensor:
        """A tensor's difference, float32, in its shape as stored."""

        def read() -> Tensor:
            return torch.cat([piece.clone() for piece in self.pieces(name)]).view(self.found.shapes[name])

        return self._kept("difference", name, read)

    def base(self, name: str) -> Tensor:
        """The base's values of a tensor, float32, in its shape as stored."""
        return self._kept("base", name, lambda: self._base.whole(name))

    def out_in(self, stored: Tensor) -> Tensor:
        """[out, in] of a linear layer's tensor as stored."""
        return stored.T.contiguous() if self.found.transposed else stored

    def included(self, name: str) -> bool:
        """Whether an adapter may hold this tensor."""
        return not self._include or any(fnmatchcase(name, glob) for glob in self._include)

    def squared_norm(self, name: str) -> float:
        return sum((float(piece.double().square().sum()) for piece in self.pieces(name)), 0.0)

    @cached_property
    def squared_norms(self) -> dict[str, float]:
        """|D|^2 of every tensor."""
        return {name: self.squared_norm(name) for name in self.found.shapes}

    @cached_property
    def changed_layers(self) -> list[str]:
        """The linear layers that changed, of those included."""
        return [name for name in self.found.linear if self.included(name) and self.squared_norms[name]]

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor's difference in flat pieces of `TILE` elements, each valid until the next."""
        for start, stop in tiles(self.found.base.tensors[name].numel):
            values, _ = self._reader.load([Span(name, start, stop)], apply=False)
            if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
                raise RunError(f"{name}: the models or their difference hold NaN or infinity")
            yield values[0]

    def base_pieces(self, name: str) -> Iterator[Tensor]:
        """The base's values of a tensor in the same pieces."""
        return pieces_of(self._base, name)

    def _kept(self, what: str, name: str, read: Callable[[], Tensor]) -> Tensor:
        if self._last.get(what, ("",))[0] != name:
            self._last.pop(what, None)  # before the next is made
            self._last[what] = name, read()
        return self._last[what][1]


def tiles(numel: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the pieces that a flat tensor is read in."""
    return ((start, min(start + TILE, numel)) for start in range(0, numel, TILE))


def pieces_of(values: Values, name: str) -> Iterator[Tensor]:
    """A tensor of a model in flat pieces of `TILE` elements, float32."""
    for start, stop in tiles(values.tensors[name].numel):
        piece = torch.empty(stop - start)
        values.read(name, start, piece)
        yield piece


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear layer other than a head."""
    return name.endswith(".weight") and is_matrix(name, shape)


def _other_rows(name: str, base: Model, tuned: Model) -> bool:
    """Whether an embedding or head has a different number of rows in the fine-tune."""
    info, other = base.tensors[name], tuned.tensors.get(name)
    if other is None or other.shape == info.shape or is_matrix(name, info.shape):
        return False
    return len(info.shape) == 2 and other.shape[1:] == info.shape[1:]
