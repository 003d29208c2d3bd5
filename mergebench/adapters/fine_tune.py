"""The changes of a fine-tune, tensor by tensor: which a LoRA can hold, and the names of their modules."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from mergebench import methods
from mergebench.adapters.peft_names import prefix, stored_in_out
from mergebench.checkpoint import adopt
from mergebench.checkpoint.files import Files
from mergebench.checkpoint.mismatch import Mismatch
from mergebench.checkpoint.model import Model
from mergebench.deltas.open import open_model
from mergebench.engine.job import Merge
from mergebench.engine.noise import TILE
from mergebench.engine.plan import plan_merge
from mergebench.engine.read import ChunkReader
from mergebench.engine.run import check_equal
from mergebench.engine.span import Span
from mergebench.errors import ModelError, RunError
from mergebench.methods._matrices import is_matrix


class Differences:
    """Fine-tune minus base, read like the task vector of a model."""

    def __init__(self, base: str, model: str) -> None:
        self.base = open_model(base)
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
            raise ModelError(message, "a LoRA is taken out of a fine-tune of the base") from None
        with Files() as opened:
            for one, alias, tensor in self.plan.alignment.must_equal:
                check_equal(opened, one, alias, tensor)
        aliases = self.plan.alignment.aliases
        self.shapes = {
            name: self.base.tensors[name].shape for name in self.plan.alignment.merged if name not in aliases
        }

    @cached_property
    def linear(self) -> dict[str, str]:
        """The linear layers' weights, and their modules' names."""
        found = {name: name.removesuffix(".weight") for name, shape in self.shapes.items() if is_linear(name, shape)}
        before = prefix(self.base, found.values())
        return {name: before + module for name, module in found.items()}

    @cached_property
    def transposed(self) -> bool:
        """Whether they are stored [in, out], as GPT-2's are."""
        return stored_in_out(self.base, {name: self.shapes[name] for name in self.linear})

    def shape(self, name: str) -> tuple[int, int]:
        """[out, in] of a linear layer."""
        rows, columns = self.shapes[name]
        return (columns, rows) if self.transposed else (rows, columns)

    def matrix(self, reader: ChunkReader, name: str) -> Tensor:
        """A linear layer's difference [out, in], float32."""
        stored = self.flat(reader, name).view(self.shapes[name])
        return stored.T.contiguous() if self.transposed else stored

    def flat(self, reader: ChunkReader, name: str) -> Tensor:
        """A tensor's difference, flat, float32."""
        return torch.cat([piece.clone() for piece in self._pieces(reader, name)])

    def squared_norm(self, reader: ChunkReader, name: str) -> float:
        return sum((float(piece.double().square().sum()) for piece in self._pieces(reader, name)), 0.0)

    def _pieces(self, reader: ChunkReader, name: str) -> Iterator[Tensor]:
        numel = self.base.tensors[name].numel
        for start in range(0, numel, TILE):
            values, _ = reader.load([Span(name, start, min(start + TILE, numel))], apply=False)
            if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
                raise RunError(f"{name}: the models or their difference hold NaN or infinity")
            yield values[0]


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear layer other than a head."""
    return name.endswith(".weight") and is_matrix(name, shape)


def _other_rows(name: str, base: Model, tuned: Model) -> bool:
    """Whether an embedding or head has a different number of rows in the fine-tune."""
    info, other = base.tensors[name], tuned.tensors.get(name)
    if other is None or other.shape == info.shape or is_matrix(name, info.shape):
        return False
    return len(info.shape) == 2 and other.shape[1:] == info.shape[1:]
