"""An adapter on its base as training saw it: rounded to NF4, as QLoRA (arXiv:2305.14314) loads it."""

from __future__ import annotations

from dataclasses import replace

from mergebench.adapters.fine_tune import is_linear
from mergebench.adapters.peft_names import stored_in_out
from mergebench.checkpoint.model import Model
from mergebench.deltas.nf4 import nf4
from mergebench.errors import ModelError


def as_trained(model: Model) -> Model:
    """The model `BASE+ADAPTER` with the base's linear layers, changed by the adapter or not, rounded to NF4 in blocks
    of 64.

    Embeddings, heads and all other tensors stay, as bitsandbytes leaves them. Raises `ModelError` if there is not one
    adapter on a base, or the base stores its layers [in, out], so that the blocks lie otherwise than in training.
    """
    if len(model.adapters) != 1:
        raise ModelError(f"{model.reference}: as_trained: nf4 is for one adapter on a base", "BASE+ADAPTER")
    linear = {name: info.shape for name, info in model.tensors.items() if is_linear(name, info.shape) and info.is_float}
    if stored_in_out(model, linear):
        raise ModelError(f"{model.reference}: as_trained: nf4 rounds layers that are stored [out, in]", "leave it out")
    rounded = {name: (nf4.on(shape, {}), *model.deltas.get(name, ())) for name, shape in linear.items()}
    return replace(model, deltas={**model.deltas, **rounded})
