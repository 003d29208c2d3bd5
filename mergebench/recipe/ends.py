"""Which end of the layers a tensor outside of them stands at: what the first layer reads, or what reads the last.

Known by the outermost part of its name that tells: `embeddings.LayerNorm` stands before the layers, `lm_head.norm`
after them. The words are those of the models in transformers that have one stack of layers.
"""

from __future__ import annotations

import re
from typing import Any

_PARTS = re.compile(  # head: after the layers in spite of its name
    r"""(?:^|\.)(?:
    (?P<head>embed_out|unembed\w*|output_emb\w*|embedding_norm|embedding_projection|emb_layer_norm_after)
    |(?P<before>\w*emb(ed(ding)?s?)?(_\w+)?|embed\w+|wte|wpe|w|shared|tok(ens?)?|\w*_tokens?|pos(ition)?(_\w+)?
        |rel(ative)?_\w+|project_in|pre_la?yrnorm|ln_pre|input\w*|per_layer\w*|\w*patch\w*)
    |(?P<after>(\w+_)?layer_?norm|ln(_\w+)?|(\w+_)?norm(_f|_out)?|final\w*|\w*head|cls|pooler|\w*predictions\w*|score
        |classifier|lm_loss|proj_out|out_proj|project_out|output\w*|logit\w*|vocab\w*|neck|decoder(?=\.(weight|bias)$))
    )(?=\.|$)""",
    re.IGNORECASE | re.VERBOSE,
)
_BY_TYPE = {  # where other types have the same name at the other end
    ("bigbird_pegasus", "before"): "layernorm_embedding",
    ("sam3_vit_model", "after"): "layer_norm",
}


def comes_before(name: str, model_type: Any = None) -> bool | None:
    """Whether a tensor outside of the layers comes before them; None if its name does not tell."""
    found = _PARTS.search(name)
    if found is None:
        return None
    (end,) = (end for end in ("head", "before", "after") if found[end])
    return (end == "before") != (found[end] == _BY_TYPE.get((model_type, end)))
