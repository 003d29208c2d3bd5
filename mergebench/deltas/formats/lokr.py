"""LoKr as PEFT saves it: the two matrices of a Kronecker product, each whole or as factors, or with a Tucker core."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.deltas.kronecker import kronecker
from mergebench.deltas.peft.lycoris import kronecker_parts
from mergebench.deltas.peft.module import Change, Module, peft_type


@peft_type(
    "LOKR",
    w1="lokr_w1",
    w1_a="lokr_w1_a",
    w1_b="lokr_w1_b",
    w2="lokr_w2",
    w2_a="lokr_w2_a",
    w2_b="lokr_w2_b",
    t2="lokr_t2",
)
def lokr(module: Module) -> Iterator[Change]:
    """The matrices of a module: the kernel of a convolution is among the columns of the second."""
    if "w2" in module.parts and len(module.part("w2").shape) == 3:
        # PEFT trains it with the dimensions of the two paired from the last one on, the kernel's with inputs
        raise module.error("w2 of a convolution in one dimension is whole: its product is not a Kronecker product")
    alpha = module.setting("alpha", "alpha_pattern")
    parts, rank = kronecker_parts(module)
    # factors tell the rank: saving sorts the patterns, so theirs may mean another
    rank = module.setting("r", "rank_pattern") if rank is None else rank
    if not isinstance(alpha, int | float) or not isinstance(rank, int) or rank < 1:
        raise module.error(f"no scale: alpha {alpha!r}, rank {rank!r}")
    yield Change(kronecker, parts, {"scale": alpha / rank}, shape=module.as_matrix)
