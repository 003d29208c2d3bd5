"""Convert an adapter of any type to a LoRA directory that PEFT loads: exactly if its rank allows it, else truncated.

One matrix is in memory at a time. Tensors that the adapter saves whole stay whole; biases that it changes are saved as
PEFT saves trained biases.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergebench import __version__
from mergebench.adapters import cards, peft_directory
from mergebench.adapters.fine_tune import is_linear
from mergebench.adapters.peft_names import modules_of, stored_in_out, without_layer
from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.files import Files, write_atomically
from mergebench.checkpoint.fp8 import Scales
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.reference import locate_delta, reference_of
from mergebench.checkpoint.staging import Staging
from mergebench.checkpoint.target import check_target
from mergebench.checkpoint.values import chain, split
from mergebench.deltas.open import is_tied, open_model, put_on
from mergebench.deltas.peft.directory import CONFIG, PREFIX
from mergebench.deltas.svd import Product
from mergebench.deltas.verbs import Converted, as_low_rank
from mergebench.engine.machine import one_thread
from mergebench.engine.run import Result
from mergebench.errors import ModelError

_FOLD = "fold it into the base instead: mergebench adapters fold"
_PART = f"{_FOLD}; or take what a LoRA holds: mergebench adapters extract --model BASE+ADAPTER"


def convert_adapter(
    base: str,
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Write what an adapter changes in its base as the LoRA directory `out`, at scale 1.

    Without `rank` and `energy` the conversion must be exact. rank: of every module, at most. energy: the smallest rank
    of each module that keeps this share of its squared norm. seed: of the search for a large matrix's first directions.
    progress: called with the modules done and the total.

    Raises `RecipeError` if the settings are invalid, `ModelError` if the adapter is not for this base, has no exact
    low-rank form and neither `rank` nor `energy` is given, or changes tensors that no LoRA can hold.
    """
    started = time.perf_counter()
    out, place = Path(out), locate_delta(adapter)
    peft_directory.check_kept(rank, energy)
    plain = open_model(base)
    adapted = _Adapted(plain, put_on(plain, place))
    check_target(out, [one for one in (plain.directory, place) if one is not None], overwrite)
    with Staging(out, "", resume=False) as staging, one_thread():
        products: dict[str, Product] = {}
        with Files() as files:
            for number, (name, module) in enumerate(adapted.modules.items()):
                found = adapted.low_rank(files, name, rank=rank, energy=energy, seed=seed)
                products[module] = peft_directory.product_of(found, adapted.in_out)
                progress(number + 1, len(adapted.modules))
            saved = adapted.saved(files)
        apart = adapted.without_layer()
        ranks = peft_directory.one_rank({module: len(product.a) for module, product in products.items()}, apart)
        products = {name: _padded(products.get(name), rank, *adapted.out_in(name)) for name, rank in ranks.items()}
        usual = next((ranks[module] for module in ranks if module in apart), None)
        peft_directory.write_factors(staging.directory, out, products, saved=saved)
        config = peft_directory.config(ranks, adapted.in_out, plain, usual, **adapted.config)
        write_atomically(staging.directory / CONFIG, json.dumps(config, indent=2) + "\n")
        total = sum(product.total for product in products.values())
        provenance = {
            "mergebench": __version__,
            "command": "adapters convert",
            "base": base,
            "adapter": reference_of(place),
            "rank": rank,
            "energy": energy,
            "seed": seed,
            "modules": {
                module: {"rank": ranks[module], "energy_kept": one.kept / one.total if one.total else 1.0}
                for module, one in products.items()
            },
            "energy_kept": sum(one.kept for one in products.values()) / total if total else 1.0,
        }
        provenance = staging.finish(provenance, started, overwrite, cards.converted_card(out, provenance))
    return Result(out, provenance)


def _padded(product: Product | None, rank: int, rows: int, columns: int) -> Product:
    """The product with zeros up to a rank; None: of a module that was not changed."""
    if product is None:
        return Product(torch.zeros(rows, rank), torch.zeros(rank, columns), 0.0, 0.0)
    more = rank - len(product.a)
    a, b = (torch.nn.functional.pad(one, (0, *by)) for one, by in ((product.a, (0, 0, more)), (product.b, (more,))))
    return product._replace(a=a, b=b) if more else product


class _Adapted:
    """A base with an adapter, and what becomes of each changed tensor in a LoRA: factors, a bias, or saved whole."""

    def __init__(self, plain: Model, model: Model) -> None:
        self._plain, self._model = plain, model
        below = plain.deltas
        changed = {n: deltas[-1] for n, deltas in model.deltas.items() if len(deltas) > len(below.get(n, ()))}
        self._linear = linear = {n: t.shape for n, t in plain.tensors.items() if is_linear(n, t.shape)}
        self.in_out = stored_in_out(plain, linear)  # from all layers, because square ones do not show it
        weights = {f"{n.rpartition('.')[0]}.weight" for n in changed} & plain.tensors.keys()
        names = {name: name.removesuffix(".weight") for name in linear}  # experts apart have the files' names
        names |= modules_of(plain, linear.keys() | weights)
        self._stored = {names[name]: name for name in linear}  # the weight's name by PEFT's module
        self._deltas: dict[str, Delta] = changed
        self.modules: dict[str, str] = {}  # PEFT's module by the weight's name
        self._biases = False
        self._whole: dict[str, str] = {}  # PEFT's module by the name of a tensor that is saved whole
        for name, delta in changed.items():
            module, _, part = name.rpartition(".")
            found = names.get(f"{module}.weight")
            if found is not None and delta.replacement is not None and not is_tied(plain, name):
                self._whole[name] = found
            elif found is not None and part == "weight" and name in linear:
                self.modules[name] = found
            elif found is not None and part == "bias":
                self._biases = True
            else:
                raise ModelError(f"{name}: {delta.describe()}: a LoRA cannot hold this change", _PART)
        if not self.modules:
            raise ModelError("the adapter changes no matrix of a linear layer: there is nothing for a LoRA", _FOLD)
        alone = [n for n in changed if n.endswith(".bias") and f"{n[:-5]}.weight" not in self.modules]
        if self._biases and any(n not in self._whole for n in alone):
            raise ModelError(f"{alone[0]}: PEFT saves the bias of a module that has factors, this one has none", _PART)

    @property
    def config(self) -> dict[str, Any]:
        """Settings of PEFT beside those of the factors."""
        whole = {"modules_to_save": sorted(set(self._whole.values()))} if self._whole else {}
        return whole | ({"bias": "lora_only"} if self._biases else {})

    def without_layer(self) -> set[str]:
        """The modules that are no linear layers in the class, such as experts, changed or not."""
        return without_layer(self._plain, self._stored)

    def out_in(self, module: str) -> tuple[int, int]:
        """The shape of a module's weight as PEFT has it."""
        rows, columns = self._linear[self._stored[module]]
        return (columns, rows) if self.in_out else (rows, columns)

    def low_rank(self, files: Files, name: str, **how: Any) -> Converted:
        """The factors of one matrix; `ModelError` if there are none that are exact, and nothing else is asked for."""
        info, deltas = split(self._plain.tensors[name], self._plain.deltas.get(name, ()))
        below = chain(files, Scales(files), info, deltas).top
        try:
            return as_low_rank(files, self._deltas[name], base=below, **how)
        except ModelError as error:
            raise ModelError(f"{name}: {error.message}", error.hint) from None

    def saved(self, files: Files) -> dict[str, Tensor]:
        """Tensors saved whole by their names in the file: as the adapter has them; biases as the folded model."""
        values = self._model.values(files)
        names = {name: f"{PREFIX}{module}.{name.rpartition('.')[2]}" for name, module in self._whole.items()}
        if self._biases:  # PEFT saves those of all modules with factors, changed or not
            for name, module in self.modules.items():
                bias = f"{name.removesuffix('weight')}bias"
                if bias in self._plain.tensors:
                    names[bias] = f"{PREFIX}{module}.base_layer.bias"  # as PEFT loads it
        return {key: values.whole(name) for name, key in names.items()}
