"""A patch as a LoRA of rank 1 that PEFT loads, to switch an edit on and off in a running model.

Every changed neuron gets the same direction v times an amount of its own, so the change of a matrix is an outer
product. If the neurons are rows of a Linear [out, in], A [1, in] is v and B [out, 1] the amounts, zero for unchanged
neurons; if they are columns, the other way round.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from mergebench import __version__
from mergebench.adapters import cards, peft_directory
from mergebench.adapters.fine_tune import is_linear
from mergebench.adapters.peft_names import modules_of, stored_in_out
from mergebench.checkpoint.files import Files, write_atomically
from mergebench.checkpoint.format import Base
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.staging import Staging
from mergebench.checkpoint.target import check_target
from mergebench.deltas.open import open_model
from mergebench.deltas.peft.directory import CONFIG
from mergebench.deltas.svd import Product
from mergebench.deltas.verbs import as_low_rank
from mergebench.editing.patches import Patch, open_patch
from mergebench.engine.run import Result
from mergebench.errors import ModelError

_AS_IT_IS = "use the patch as it is: MODEL+PATCH, or mergebench patch apply"


def patch_to_lora(
    model: str,
    patch: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Write the differences in a patch as the LoRA directory `out`, at rank 1 and scale 1.

    The base with the LoRA equals the patched model to within one unit of the stored type: PEFT rounds the difference
    before adding it. progress: called with the modules done and the total.

    Raises `ModelError` if the patch belongs to another model, or changes tensors that are no module in PEFT.
    """
    started = time.perf_counter()
    out, base, read = Path(out), open_model(model), open_patch(patch)
    shapes = {name: _shape(read, base, name) for name in read.names}
    modules = modules_of(base, shapes)
    missing = next((name for name in shapes if name not in modules), None)
    if missing is not None:
        raise ModelError(f"{missing}: PEFT finds no module of that name in this model's class", _AS_IT_IS)
    linear = {name: info.shape for name, info in base.tensors.items() if is_linear(name, info.shape)}
    in_out = stored_in_out(base, linear)  # from all layers, because square ones do not show it
    check_target(out, [place for place in (base.directory, read.file) if place is not None], overwrite)
    with Staging(out, "", resume=False) as staging:
        products = {}
        for number, name in enumerate(shapes, 1):
            products[modules[name]] = _product(read, base, name, in_out)
            progress(number, len(shapes))
        peft_directory.write_factors(staging.directory, out, products)
        ranks = dict.fromkeys(products, 1)
        config = peft_directory.config(ranks, in_out, base)
        write_atomically(staging.directory / CONFIG, json.dumps(config, indent=2) + "\n")
        provenance = {
            "mergebench": __version__,
            "command": "patch to-lora",
            "base": model,
            "patch": str(patch),
            "made": dict(read.about),
            "modules": len(products),
        }
        provenance = staging.finish(provenance, started, overwrite, cards.patch_card(out, provenance))
    return Result(out, provenance)


def _shape(patch: Patch, model: Model, name: str) -> tuple[int, int]:
    """The shape of the matrix that a patch changes."""
    shape = patch.neurons_in(model.tensors, model.reference, name).info.shape
    if len(shape) != 2:
        raise ModelError(f"{name} is {list(shape)}: PEFT has no LoRA for experts in one tensor", _AS_IT_IS)
    return shape[0], shape[1]


def _product(patch: Patch, base: Model, name: str, in_out: bool) -> Product:
    """B [out, 1] and A [1, in] of the patch's change to one matrix."""
    delta = patch.deltas.on(name, Base(base.reference, base.tensors, base.config))
    with Files() as files:
        return peft_directory.product_of(as_low_rank(files, delta), in_out)
