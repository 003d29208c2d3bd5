"""The LoRA factors of one module, whatever it is: B [out, r] and A [r, in] of a matrix, and a scale.

linear       lora_A [r, in], lora_B [out, r]
embedding    lora_embedding_A [r, tokens], lora_embedding_B [width, r]: the tensor [tokens, width] is [in, out]
convolution  lora_A [r, in, k...], lora_B [out, r, 1...]: the tensor [out, in, k...] is a matrix [out, in * k...]
block        BD-LoRA stores the blocks of A or B that lie on its diagonal, one below the other
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.kind import DeltaKind, Part
from mergebench.checkpoint.laid_out import diagonal
from mergebench.deltas.dora import dora
from mergebench.deltas.low_rank import low_rank
from mergebench.deltas.peft.directory import CONFIG
from mergebench.deltas.peft.module import patterned
from mergebench.deltas.peft.names import on_stored
from mergebench.errors import ModelError

_SAMPLER = ("std_prior", "expert_weights_prior", "gaussian_var_prior", "expert_weights")  # MonteCLoRA's, of training
PATTERNS = {
    "A": re.compile(r"(.+)\.lora_A(?:\.default)?\.weight"),
    "B": re.compile(r"(.+)\.lora_B(?:\.default)?\.weight"),
    "bias": re.compile(r"(.+)\.lora_B(?:\.default)?\.bias"),
    "embedding A": re.compile(r"(.+)\.lora_embedding_A(?:\.default)?(?:\.weight)?"),
    "embedding B": re.compile(r"(.+)\.lora_embedding_B(?:\.default)?(?:\.weight)?"),
    "magnitude": re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?"),
    "base": re.compile(r"(.+?)\.base_layer\.weight"),
    "tokens": re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.default)?"),
    **{
        name: re.compile(rf"(.+)\.lora_monteclora_sampler(?:\.default)?\.{name}") for name in _SAMPLER
    },
}  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """One module's part of an adapter: scale * B @ A, with DoRA's magnitude and the bias of B if present."""

    a: TensorInfo
    b: TensorInfo
    scale: float
    magnitude: TensorInfo | None
    bias: TensorInfo | None
    embedding: bool = False
    kernel: tuple[int, ...] = ()  # of a convolution
    inputs: int = 0  # of a convolution
    base: TensorInfo | None = None  # the weight that the factors are added to, where it is saved too

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in], even if the base stores [in, out]."""
        return self.b.shape[0], self.a.shape[1]

    def stored_shape(self, in_out: bool) -> tuple[int, ...]:
        """The shape of the base's tensor; in_out: whether linear layers are stored [in, out]."""
        if self.kernel:
            return (self.shape[0], self.inputs, *self.kernel)
        return self.shape[::-1] if in_out or self.embedding else self.shape

    def delta(self, in_out: bool) -> tuple[DeltaKind, dict[str, Part | None], dict[str, Any]]:
        """The kind of delta on the base's tensor, taken as a matrix, its parts and settings."""
        turned = self.embedding or (in_out and not self.kernel)
        parts = on_stored(self.b, self.a, turned)
        if self.magnitude is None:
            return low_rank, parts, {"scale": self.scale}
        return dora, parts | {"magnitude": Part(self.magnitude)}, {"scale": self.scale, "columns": turned}


def read_factors(
    directory: Path, module: str, found: Mapping[str, TensorInfo], config: Mapping[str, Any], key: str | None = None
) -> Factors:
    """A module's factors; key: its name in `alpha_pattern`, if that is not the module's."""
    embedding = "embedding A" in found or "embedding B" in found
    names = ("embedding A", "embedding B") if embedding else ("A", "B")
    if not set(names) <= found.keys():
        one, other = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        raise ModelError(f"{directory}: {module}: only one of {one} and {other} is there")
    a, b = (found[name] for name in names)
    kernel, inputs = _kernel(directory, module, a, b)
    if kernel:
        a = a._replace(shape=(a.shape[0], inputs * math.prod(kernel)))
        b = b._replace(shape=b.shape[:2])
    elif config.get("use_bdlora") and not embedding:
        a, b = _block_diagonal(directory, module, a, b, config["use_bdlora"])
    rank = a.shape[0] if a.shape else 0
    if not (a.is_float and b.is_float and len(a.shape) == len(b.shape) == 2 and rank == b.shape[1] and rank):
        raise ModelError(f"{directory}: {module}: factors {list(a.shape)} and {list(b.shape)} do not multiply")
    vectors = {}
    for part, setting in (("magnitude", "use_dora"), ("bias", "lora_bias")):
        vector = found.get(part)
        if (vector is not None) != bool(config.get(setting)):
            raise ModelError(
                f"{directory}: {module}: {setting} is {config.get(setting)!r}, but its vector says otherwise"
            )
        if vector is not None and (
            vector.numel != b.shape[0] or not vector.is_float or max(vector.shape, default=1) != vector.numel
        ):
            raise ModelError(f"{directory}: {module}: {part} {list(vector.shape)} does not fit B {list(b.shape)}")
        vectors[part] = None if vector is None else vector._replace(shape=b.shape[:1])
    scale = _alpha(directory, key or module, config) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    base = found.get("base")
    return Factors(a, b, scale, vectors["magnitude"], vectors["bias"], embedding, kernel, inputs, base)


def _kernel(directory: Path, module: str, a: TensorInfo, b: TensorInfo) -> tuple[tuple[int, ...], int]:
    """The kernel of a convolution's A [r, in, k...], and `in`; an empty one for other factors."""
    if not 3 <= len(a.shape) <= 5 or len(b.shape) != len(a.shape) or math.prod(b.shape[2:]) != 1:
        return (), 0
    if a.shape[0] != b.shape[1]:  # B has groups: [out, r / groups, 1...]
        raise ModelError(
            f"{directory}: {module}: factors {list(a.shape)} and {list(b.shape)} are of a convolution in groups, "
            "and their product is no difference of its weight: it cannot be folded"
        )
    return a.shape[2:], a.shape[1]


def _block_diagonal(
    directory: Path, module: str, a: TensorInfo, b: TensorInfo, settings: Any
) -> tuple[TensorInfo, TensorInfo]:
    """B and A with the blocks of one on its diagonal."""
    blocks = settings.get("nblocks") if isinstance(settings, dict) else None
    if not isinstance(blocks, int) or blocks < 1:
        raise ModelError(f"{directory / CONFIG}: use_bdlora must give nblocks")
    found = []
    for info, key in ((a, "target_modules_bd_a"), (b, "target_modules_bd_b")):
        inside = any(str(part) in module for part in settings.get(key) or [])
        if inside and (len(info.shape) != 2 or info.shape[0] % blocks):
            raise ModelError(f"{directory}: {module}: {info.name} {list(info.shape)} is not {blocks} blocks")
        found.append(diagonal(info, blocks) if inside else info)
    return found[0], found[1]


def _alpha(directory: Path, module: str, config: Mapping[str, Any]) -> float:
    try:
        return float(patterned(directory, module, config, "alpha_pattern", config["lora_alpha"]))
    except (TypeError, ValueError):
        raise ModelError(f"{directory / CONFIG}: alpha_pattern must map modules to numbers") from None
