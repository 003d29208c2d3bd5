"""Truncate a LoRA to one budget of singular values over all its matrices.

The largest singular values of the products s B A are kept, wherever they are, so every module gets the rank that its
change is worth. Of all choices of so many triplets this one keeps the most energy (Eckart-Young). It is AdaLoRA's
(arXiv:2303.10512) allocation of a budget by magnitude, without training.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mergebench import __version__
from mergebench.adapters import cards, peft_directory
from mergebench.checkpoint.files import Files, whole, write_atomically
from mergebench.checkpoint.reference import locate_delta, reference_of
from mergebench.checkpoint.staging import Staging
from mergebench.checkpoint.target import check_target
from mergebench.deltas.formats.lora import Adapter, read_adapter
from mergebench.deltas.peft.directory import CONFIG, WEIGHTS
from mergebench.deltas.svd import Product, compress
from mergebench.engine.machine import one_thread
from mergebench.engine.run import Result
from mergebench.errors import ModelError, RecipeError, RunError


def truncate_adapter(
    directory: str | Path,
    out: str | Path,
    *,
    budget: int | float,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Write the LoRA `directory` with its `budget` largest singular values as the LoRA directory `out`, at scale 1.

    budget: singular values in all, as an integer; or as a float, a share of those there are. A module that keeps none
    is left out. progress: called with the modules done and the total.

    Raises `RecipeError` if the budget is invalid, `ModelError` if it is no plain LoRA, `RunError` if it is damaged or
    not finite.
    """
    started = time.perf_counter()
    out, adapter = Path(out), read_adapter(locate_delta(directory))
    _check_plain(adapter)
    there = sum(one.rank for one in adapter.modules.values())
    count = budget if isinstance(budget, int) else round(budget * there)
    if not 1 <= count <= there or (isinstance(budget, float) and budget > 1):
        raise RecipeError(
            f"--budget: must be from 1 to {there} singular values, got {count}", "or a share, such as 50%"
        )
    check_target(out, [adapter.directory], overwrite)
    with Staging(out, "", resume=False) as staging, one_thread():
        products = _decomposed(adapter, progress)
        ranks = allocate({module: _values(product) for module, product in products.items()}, count)
        kept = {module: _cut(product, ranks[module]) for module, product in products.items()}
        written = {module: product for module, product in kept.items() if ranks[module]}
        embeddings = [module for module in written if adapter.modules[module].embedding]
        peft_directory.write_factors(staging.directory, out, written, embeddings)
        config = peft_directory.merged_config([adapter], {module: ranks[module] for module in written})
        if written.keys() != adapter.modules.keys():
            config |= {"target_modules": sorted(written)}
        write_atomically(staging.directory / CONFIG, json.dumps(config, indent=2) + "\n")
        total = sum(product.total for product in kept.values())
        provenance = {
            "mergebench": __version__,
            "command": "adapters truncate",
            "adapter": reference_of(adapter.directory),
            "base": adapter.config.get("base_model_name_or_path"),
            "budget": count,
            "of": there,
            "modules": {
                module: {"rank": ranks[module], "energy_kept": one.kept / one.total if one.total else 1.0}
                for module, one in kept.items()
            },
            "energy_kept": sum(one.kept for one in kept.values()) / total if total else 1.0,
            "inputs": peft_directory.inputs([adapter.directory / CONFIG, adapter.directory / WEIGHTS]),
        }
        provenance = staging.finish(provenance, started, overwrite, cards.truncated_card(out, provenance))
    return Result(out, provenance)


def allocate(values: dict[str, torch.Tensor], budget: int) -> dict[str, int]:
    """The rank of each module if the `budget` largest singular values of all are kept; of equal ones the first."""
    everything = torch.cat(list(values.values()))
    owners = torch.cat([torch.full((len(one),), number) for number, one in enumerate(values.values())])
    chosen = owners[everything.argsort(descending=True, stable=True)[:budget]]
    counts = torch.bincount(chosen, minlength=len(values)).tolist()
    return dict(zip(values, counts, strict=True))


def _check_plain(adapter: Adapter) -> None:
    if adapter.beside is not None:
        what = f"{adapter.beside}: only factors of linear layers and embeddings are cut"
        raise ModelError(f"{adapter.directory}: {what}", "fold it, and extract a LoRA")
    for module, one in adapter.modules.items():
        if one.magnitude is not None or one.bias is not None:
            what = "a DoRA's change" if one.magnitude is not None else "a bias of B"
            raise ModelError(
                f"{adapter.directory}: {module}: {what} is no product of two factors",
                "convert it first: mergebench adapters convert --rank R",
            )
    if adapter.whole:
        what = f"'{next(iter(adapter.whole))}' is saved whole"
        raise ModelError(
            f"{adapter.directory}: {what}: it has no singular values to cut", "fold it, and extract a LoRA"
        )


def _decomposed(adapter: Adapter, progress: Callable[[int, int], None]) -> dict[str, Product]:
    """The product of every module by its singular triplets, the largest first."""
    products = {}
    with Files() as files:
        for module, one in adapter.modules.items():
            b, a = one.scale * whole(files, one.b).float(), whole(files, one.a).float()
            if not (b.isfinite().all() and a.isfinite().all()):
                raise RunError(f"{one.a.file}: '{one.a.name}' or its B holds NaN or infinity")
            products[module] = compress(b, a, one.rank)
            progress(len(products), len(adapter.modules))
    return products


def _values(product: Product) -> torch.Tensor:
    """Singular values, from the lengths of the factors' directions."""
    b, a = product.b.double(), product.a.double()
    values: torch.Tensor = torch.linalg.vector_norm(b, dim=0) * torch.linalg.vector_norm(a, dim=1)
    return values


def _cut(product: Product, rank: int) -> Product:
    kept = float(_values(product)[:rank].square().sum())
    return Product(product.b[:, :rank], product.a[:rank], kept, product.total)
