"""The layers of Stable Diffusion's network, in the names of single files, as diffusers calls them: _ for each dot.

With L layers in a block, input block n = (L + 1) b + l + 1 is layer l of down block b, or its downsampler for l = L;
output block n = (L + 1) b + l is layer l of up block b. In each, 0 is the residual layer, 1 the attention.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_OUTSIDE = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}
_RESIDUAL = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_BLOCK = re.compile(r"(input|output)_blocks_(\d+)_(\d+)_(.+)")
_MIDDLE = re.compile(r"middle_block_([012])_(.+)")
_DOWN = re.compile(r"input_blocks_(\d+)_0_op")


def layers_of(keys: Iterable[str]) -> int:
    """L, told by the first downsampler, or by the layers of diffusers' first block."""
    keys = list(keys)
    first = min((int(found[1]) for found in map(_DOWN.fullmatch, keys) if found), default=0)
    numbers = [int(found[1]) for found in map(re.compile(r"down_blocks_0_resnets_(\d+)_.+").fullmatch, keys) if found]
    return first - 1 if first > 1 else max(numbers, default=1) + 1


def in_diffusers(key: str, layers: int) -> str | None:
    """A layer's name in diffusers; None if it is no layer of a single file's network."""
    if key in _OUTSIDE:
        return _OUTSIDE[key]
    middle, block = _MIDDLE.fullmatch(key), _BLOCK.fullmatch(key)
    if middle is not None:
        number = int(middle[1])
        rest = _RESIDUAL.get(middle[2]) if number != 1 else middle[2]
        return rest and (f"mid_block_attentions_0_{rest}" if number == 1 else f"mid_block_resnets_{number // 2}_{rest}")
    if block is None:
        return None
    down, inside, rest = block[1] == "input", int(block[3]), block[4]
    number, place = divmod(int(block[2]) - down, layers + 1)
    start = f"{'down' if down else 'up'}_blocks_{number}"
    if down and place == layers:
        return f"{start}_downsamplers_0_conv" if rest == "op" else None
    if rest == "conv":
        return f"{start}_upsamplers_0_conv"
    if inside == 0:
        return f"{start}_resnets_{place}_{_RESIDUAL[rest]}" if rest in _RESIDUAL else None
    return f"{start}_attentions_{place}_{rest}"
