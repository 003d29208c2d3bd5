"""What a patch adds to a model as it is read: `BASE+patch.safetensors` wherever a model goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mergebench.checkpoint.header import TensorInfo

METADATA = "patch"  # the key in a file's header that says it is one


@dataclass(frozen=True)
class Patched:
    """amount * direction for some neurons of one tensor."""

    direction: TensorInfo  # [width] float32
    numbers: TensorInfo  # [k] int64, ascending, as `Neurons` numbers them
    amounts: TensorInfo  # [k] float32
    shape: tuple[int, ...]  # of the tensor
    transposed: bool  # its neurons are columns
    scale: ClassVar[float] = 1.0  # as other differences have one

    @property
    def nbytes(self) -> int:
        return self.direction.nbytes + self.numbers.nbytes + self.amounts.nbytes
