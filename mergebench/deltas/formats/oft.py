"""OFT as PEFT saves it: the triangles of skew-symmetric blocks, for linear layers, convolutions and embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mergebench.deltas.peft.module import Change, Module, peft_type
from mergebench.deltas.rotated import rotated


@peft_type("OFT", R="oft_R", embedding="oft_embedding_R", old="oft_r")
def oft(module: Module) -> Iterator[Change]:
    """The rotations of a module's inputs, or of an embedding's outputs."""
    config = module.config
    if "old" in module.parts:
        raise module.error("oft_r: an OFT of PEFT 0.15 or older, which PEFT does not read any more")
    if module.in_out:
        raise module.error("fan_in_fan_out: PEFT has no OFT of such layers")
    inverse = "embedding" in module.parts
    skew = module.part("embedding" if inverse else "R", None, None)
    if (skew.shape[0] == 1) < bool(config.get("block_share")):
        raise module.error(f"block_share, but {skew.shape[0]} blocks")
    terms = config.get("num_cayley_neumann_terms")
    # a series of no terms changes nothing, as one of one does
    terms = max(5 if terms is None else terms, 1) if config.get("use_cayley_neumann") else 0
    if terms and "peft_version" not in config:  # recorded since 0.18, which halved the last term
        raise module.error("use_cayley_neumann of a PEFT before 0.18, whose series was another one")
    longest = float(config.get("eps", 6e-5)) / math.sqrt(max(skew.shape[0], 1)) if config.get("coft") else 0.0
    settings = {"terms": terms, "longest": longest, "inverse": inverse}
    yield Change(rotated, {"skew": skew}, settings, shape=module.out_in)
