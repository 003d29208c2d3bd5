"""FP4 checkpoints: four-bit values, two a byte, and the scales of their groups, read as one tensor of floats.

A value is e2m1 (0, 0.5, 1, 1.5, 2, 3, 4 or 6, with a sign); the first of a byte is its low half. It is multiplied by
the scale of its group along the columns:

    MXFP4   32 values, scale 2^(byte - 127) (OCP Microscaling 1.0); a byte of 255 is no number
    NVFP4   16 values, scale e4m3, times one float32 for the tensor

    gpt-oss             NAME_blocks [experts, rows, groups, 16], NAME_scales: NAME is [experts, columns, rows]
    compressed-tensors  X.weight_packed [rows, columns / 2], X.weight_scale, and for NVFP4 X.weight_global_scale, by
                        which scales are divided
    ModelOpt            X.weight [rows, columns / 2], X.weight_scale, X.weight_scale_2

The tensors have the names and shapes of the same model in bfloat16: transformers turns the experts of gpt-oss when it
reads them, and writes them turned.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from mergebench.checkpoint.header import ITEM_SIZE, Reader, Scale, TensorInfo
from mergebench.checkpoint.held import Held
from mergebench.errors import ModelError

if TYPE_CHECKING:  # torch and NumPy are imported to read values, not to read headers
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_held = Held()  # turned matrices


class Form(NamedTuple):
    """How four-bit values and their scales lie in a file."""

    kind: str  # MXFP4 or NVFP4
    group: int  # values of a scale, along the columns
    scales: tuple[str, ...]  # types
    turned: bool  # stored [.., rows, groups, bytes], read [.., columns, rows]
    ends: tuple[str, ...]  # of the names, after the tensor's own: values, scales, the tensor's scale
    divides: bool = False  # by the tensor's scale

    def __str__(self) -> str:
        return f"{self.kind} has one scale ({' or '.join(self.scales)}) for every {self.group} values of a row"


GPT_OSS = Form("MXFP4", 32, ("U8", "F8_E8M0"), True, ("_blocks", "_scales"))
_COMPRESSED = (
    Form("MXFP4", 32, ("U8", "F8_E8M0"), False, ("_packed", "_scale")),
    Form("NVFP4", 16, ("F8_E4M3",), False, ("_packed", "_scale", "_global_scale"), divides=True),
)
_MODELOPT = Form("NVFP4", 16, ("F8_E4M3",), False, ("", "_scale", "_scale_2"))


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor whose values are stored in four bits: a `Made`."""

    form: Form
    name: str
    codes: TensorInfo
    scales: TensorInfo
    factor: TensorInfo | None  # the tensor's scale

    @property
    def dtype(self) -> str:
        """The type that holds every value exactly."""
        return "BF16" if self.form.kind == "MXFP4" else "F32"

    @property
    def own(self) -> TensorInfo:
        """The values in the file, as what a copy would hold: bfloat16 without scales."""
        scale = Scale(self.scales, self.scales.shape, ())
        return self.codes._replace(name=self.name, dtype="BF16", scale=scale)

    @cached_property
    def sides(self) -> tuple[int, int, int]:
        """Matrices, rows and columns as they lie in the file."""
        lead = self.codes.shape[:-2] if self.form.turned else self.codes.shape[:-1]
        return math.prod(lead[:-1]), lead[-1], 2 * self.codes.numel // max(math.prod(lead), 1)

    def info(self) -> TensorInfo:
        """The tensor as the engine sees it; its bytes are those in the file."""
        _, rows, columns = self.sides
        lead = self.codes.shape[:-3] if self.form.turned else self.codes.shape[:-2]
        shape = (*lead, columns, rows) if self.form.turned else (*lead, rows, columns)
        stored = self.codes.nbytes + self.scales.nbytes
        return self.codes._replace(name=self.name, dtype=self.dtype, shape=shape, nbytes=stored, made=self)

    def digest(self) -> str:
        """A hash of where the values and scales lie."""
        parts = [self.codes, self.scales, *([self.factor] if self.factor else [])]
        listed = [self.form, *((part.name, part.offset, str(part.file)) for part in parts)]
        return hashlib.sha256(repr(listed).encode()).hexdigest()

    def settle(self, files: Reader) -> None:
        """Nothing is shared by workers."""

    def resident(self) -> int:
        """Bytes that a worker holds to read: a whole matrix if it is turned, and groups of values that a chunk cuts."""
        matrices, rows, columns = self.sides
        if not self.form.turned:
            return 3 * 4 * 2 * columns
        return (self.codes.nbytes + 4 * self.scales.numel) // max(matrices, 1) + 3 * 4 * 2 * self.form.group * rows

    def read(self, files: Reader, start: int, out: Tensor) -> None:
        """Fill the flat `out` (of this tensor's type) with elements `start` onwards."""
        _, rows, columns = self.sides
        if not self.form.turned:
            first, last = start // columns, -(-(start + len(out)) // columns)
            codes = self._bytes(files, self.codes, first * columns // 2, (last - first) * columns // 2)
            per_row = columns // self.form.group
            scales = self._scales(files, first * per_row, (last - first) * per_row)
            flat = _decoded(codes.reshape(last - first, -1), scales.reshape(last - first, -1)).reshape(-1)
            out.copy_(_tensor(flat[start - first * columns :][: len(out)]))
            return
        size, group, at = rows * columns, self.form.group, 0
        while at < len(out):
            matrix, begin = divmod(start + at, size)
            stop = min(begin + len(out) - at, size)
            low, high = begin // rows // group, -(-stop // (rows * group))  # groups of columns, rows of the tensor
            codes, scales = self._matrix(files, matrix)
            part = _decoded(codes[:, low * group // 2 : high * group // 2], scales[:, low:high])
            turned = _tensor(part).T.reshape(-1)
            first = begin - low * group * rows
            out[at : at + stop - begin].copy_(turned[first : first + stop - begin])
            at += stop - begin

    def _matrix(self, files: Reader, number: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """The bytes of a turned matrix, [rows, columns / 2], and its scales, [rows, groups]."""
        _, rows, columns = self.sides
        groups = columns // self.form.group

        def make() -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
            codes = self._bytes(files, self.codes, number * rows * columns // 2, rows * columns // 2)
            scales = self._scales(files, number * rows * groups, rows * groups)
            return codes.reshape(rows, -1), scales.reshape(rows, -1)

        return _held.get(self.name, (self.codes.file, self.codes.offset), (number, self.codes.stamp), make)

    def _scales(self, files: Reader, start: int, count: int) -> NDArray[np.float32]:
        """Scales as float32."""
        raw = self._bytes(files, self.scales, start, count)
        if self.form.kind == "MXFP4":
            found: NDArray[np.float32] = powers()[raw]
            return found
        import torch

        from mergebench.checkpoint.files import whole

        values = torch.from_numpy(raw).view(torch.float8_e4m3fn).float()
        if self.factor is not None:
            factor = whole(files, self.factor).float().reshape(())
            values = values / factor if self.form.divides else values * factor
        return values.numpy()

    @staticmethod
    def _bytes(files: Reader, info: TensorInfo, start: int, count: int) -> NDArray[np.uint8]:
        import numpy as np

        raw = np.empty(count, np.uint8)
        files.read_into(info, start, raw.data)
        return raw


@cache
def _pairs() -> NDArray[np.uint64]:
    """The two values of every byte, as one number of the bytes of two float32."""
    import numpy as np

    values = np.array(E2M1, np.float32)
    codes = np.arange(256)
    return np.stack([values[codes & 15], values[codes >> 4]], axis=1).view(np.uint64).reshape(-1)


@cache
def powers() -> NDArray[np.float32]:
    """The scale of every e8m0 byte."""
    import numpy as np

    found: NDArray[np.float32] = np.ldexp(np.float32(1), np.arange(256).clip(max=254) - 127)
    found[255] = np.nan
    return found


def _decoded(codes: NDArray[np.uint8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """The values of bytes [rows, columns / 2] with scales [rows, groups]: float32 [rows, columns]."""
    import numpy as np

    values = _pairs()[codes].view(np.float32).reshape(*scales.shape, -1)
    with np.errstate(over="ignore", invalid="ignore"):  # a value that is not finite is reported where it is used
        values *= scales[:, :, None]
    return values.reshape(len(codes), -1)


def _tensor(values: NDArray[np.float32]) -> Tensor:
    import torch

    return torch.from_numpy(values)


def find_packed(reference: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """A model's tensors with those in four bits as floats, and without their scales.

    `ModelError` if scales are missing or do not fit, or if the values are scaled in a way that is not read.
    """
    found: dict[str, TensorInfo] = {}
    used: set[str] = set()
    for name, info in tensors.items():
        known = _form_of(name, info, tensors) if info.dtype == "U8" else None
        if known is None:
            found[name] = info
            continue
        stem, form = known
        packed = _checked(reference, stem, info, form, tensors)
        if stem in tensors and stem != name:
            raise ModelError(f"{stem}: {reference} has it both in four bits and as {tensors[stem].dtype}")
        used |= {stem + end for end in form.ends[1:]}
        found[stem] = packed.info()
    return {name: info for name, info in found.items() if name not in used}


def kind_of(info: TensorInfo) -> str:
    """The type that a tensor is stored in, in words."""
    return info.made.form.kind if isinstance(info.made, Packed) else info.dtype


def _form_of(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> tuple[str, Form] | None:
    """The tensor's own name, before the ends of its form, if it holds four-bit values."""
    if name.endswith(GPT_OSS.ends[0]) and info.shape[-1:] == (GPT_OSS.group // 2,) and len(info.shape) == 4:
        return name.removesuffix(GPT_OSS.ends[0]), GPT_OSS
    if name.endswith("weight_packed"):
        stem = name.removesuffix("_packed")
        scales = tensors.get(f"{stem}_scale")
        double = scales is None or scales.dtype == "F8_E4M3" or f"{stem}_global_scale" in tensors
        return stem, _COMPRESSED[double]
    scales = tensors.get(f"{name}_scale")
    if name.endswith("weight") and (f"{name}_scale_2" in tensors or (scales and scales.dtype == "F8_E4M3")):
        return name, _MODELOPT
    return None


def _checked(reference: str, stem: str, codes: TensorInfo, form: Form, tensors: Mapping[str, TensorInfo]) -> Packed:
    """The packed tensor; `ModelError` if its parts do not fit."""
    names = [stem + end for end in form.ends]
    missing = next((name for name in names if name not in tensors), None)
    if missing is not None:
        raise ModelError(f"{codes.name}: {reference} has {form.kind} and no scales", f"they would be called {missing}")
    scales, factor = tensors[names[1]], tensors[names[2]] if names[2:] else None
    shape = codes.shape[:-1] if form.turned else (*codes.shape[:-1], -(-2 * codes.shape[-1] // form.group))
    whole = form.turned or 2 * codes.shape[-1] % form.group == 0
    if len(codes.shape) < 2 or not whole or scales.shape != shape or scales.dtype not in form.scales:
        what = f"{scales.dtype} {list(scales.shape)}, {codes.name} {list(codes.shape)}"
        raise ModelError(f"{scales.name}: {reference} has {what}", str(form))
    if factor is not None and (factor.numel != 1 or factor.dtype not in ITEM_SIZE or not factor.is_float):
        what = f"{factor.dtype} {list(factor.shape)}"
        raise ModelError(f"{factor.name}: {reference} has {what}, one number was expected", str(form))
    turned = f"{stem.removesuffix('weight')}pre_quant_scale"
    if turned in tensors:
        what = f"{codes.name}: {reference} was scaled column by column before it was rounded ({turned})"
        raise ModelError(what, "merge the models it was made from, and quantize the result")
    return Packed(form, stem, codes, scales, factor)
