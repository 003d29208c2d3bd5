"""The files of a merged adapter beside its factors: PEFT's config, the card, hashes of the inputs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor

from mergebench.adapters.combine import finite
from mergebench.adapters.peft_names import targets_of, task_type
from mergebench.checkpoint.content import sha256_of
from mergebench.checkpoint.files import Files, copy_file
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.shards import OutTensor, Shard, ShardFiles, create, described
from mergebench.checkpoint.target import check_room
from mergebench.deltas.formats.lora import Adapter
from mergebench.deltas.peft.directory import CONFIG, PREFIX, WEIGHTS
from mergebench.deltas.svd import Product
from mergebench.deltas.verbs import Converted
from mergebench.errors import RecipeError, RunError

_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_SHARED = ("task_type", "auto_mapping", "revision")


def key(module: str, factor: str, embedding: bool = False) -> str:
    return f"{PREFIX}{module}.lora_embedding_{factor}" if embedding else f"{PREFIX}{module}.lora_{factor}.weight"


def lay_out(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], embeddings: Collection[str] = ()) -> Shard:
    """The file of factors, float32: A [rank, in] and B [out, rank] of every module; of an embedding, in: tokens."""
    tensors = []
    for module, (rows, columns) in shapes.items():
        rank = ranks[module]
        flat = module in embeddings
        tensors.append(OutTensor(key(module, "A", flat), "F32", (rank, columns), 4 * rank * columns))
        tensors.append(OutTensor(key(module, "B", flat), "F32", (rows, rank), 4 * rank * rows))
    return Shard(WEIGHTS, tuple(tensors))


def put(written: ShardFiles, module: str, product: Product, embedding: bool = False) -> None:
    """Write a module's factors; `RunError` if one is not finite."""
    if not (product.a.isfinite().all() and product.b.isfinite().all()):
        raise RunError(f"{module}: its factors hold NaN or infinity", "use another model, adapter or patch")
    written.write(key(module, "A", embedding), 0, product.a.contiguous().reshape(-1))
    written.write(key(module, "B", embedding), 0, product.b.contiguous().reshape(-1))


def product_of(found: Converted, in_out: bool) -> Product:
    """B [out, r] and A [r, in] of factors of a weight as it is stored; in_out: whether that is [in, out]."""
    b, a = (found.parts.a.T, found.parts.b.T) if in_out else (found.parts.b, found.parts.a)
    return Product(b.contiguous(), a.contiguous(), found.kept * found.total, found.total)


def write_factors(
    directory: Path,
    out: Path,
    products: Mapping[str, Product],
    embeddings: Collection[str] = (),
    saved: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the factors of every module, and tensors `saved` by their names in the file; `out`: where there must be
    room."""
    shapes = {module: (len(product.b), product.a.shape[1]) for module, product in products.items()}
    ranks = {module: len(product.a) for module, product in products.items()}
    ordered = sorted((saved or {}).items(), key=lambda item: -item[1].dtype.itemsize)  # so that each is aligned
    whole = [described(name, value) for name, value in ordered]
    shard = Shard(WEIGHTS, (*lay_out(shapes, ranks, embeddings).tensors, *whole))
    check_room(out, shard.nbytes)
    create(directory / WEIGHTS, shard)
    with closing(ShardFiles(directory, [shard])) as written:
        for module, product in products.items():
            put(written, module, product, module in embeddings)
        for name, value in ordered:
            written.write(name, 0, value.contiguous().reshape(-1))


def check_kept(rank: int | None, energy: float | None) -> None:
    """`RecipeError` if `rank` and `energy` do not say how much of a difference is kept."""
    if rank is not None and energy is not None:
        raise RecipeError("--rank and --energy: one of them says how much is kept")
    if rank is not None and rank < 1:
        raise RecipeError(f"--rank: must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"--energy: must be above 0, at most 1, got {energy:g}", "a share: 95% is 0.95")


def one_rank(ranks: Mapping[str, int], without_layer: Collection[str]) -> dict[str, int]:
    """The ranks that PEFT can load: it joins the factors of a layer's experts, and takes one rank for all that are no
    linear layers of the class.

    Experts without factors are added where others in their layer have some.
    """
    least = max((rank for module, rank in ranks.items() if module in without_layer), default=0)
    layers = {layer for module in ranks if module in without_layer and (layer := _experts_of(module))}
    added = [module for module in without_layer if _experts_of(module) in layers]
    return {**ranks, **{module: least for module in [*ranks, *sorted(added)] if module in without_layer}}


def _experts_of(module: str) -> str | None:
    """`model.layers.1.mlp` of `model.layers.1.mlp.experts.3.up_proj`."""
    layer, found, number = module.partition(".experts.")
    return layer if found and number[0].isdigit() else None


def config(
    ranks: Mapping[str, int], transposed: bool, base: Model | None = None, usual: int | None = None, **more: Any
) -> dict[str, Any]:
    """adapter_config.json of factors with these ranks, whose product is the difference itself (alpha = r).

    base: the model that they belong to, if it is known; else every module is named whole. usual: `r`; by default the
    rank that most modules have.
    """
    rank = usual or rank_pattern(ranks)[0]
    pattern = _pattern(ranks, rank)
    about = {} if base is None else {"base_model_name_or_path": base.reference, "task_type": task_type(base)}
    return {
        "peft_type": "LORA",
        **about,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(ranks) if base is None else targets_of(base, ranks),
        "fan_in_fan_out": transposed,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    } | more


def plain_config(kind: str, base: Model, modules: Collection[str], **more: Any) -> dict[str, Any]:
    """adapter_config.json of an adapter of any type on these modules of a base."""
    about = {"peft_type": kind, "base_model_name_or_path": base.reference, "task_type": task_type(base)}
    return {**about, "target_modules": targets_of(base, modules), "inference_mode": True, **more}


def merged_config(adapters: Sequence[Adapter], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The config of a merged adapter: settings on which all inputs agree are kept."""
    first = adapters[0].config
    shared = {
        key: first.get(key) for key in _SHARED if all(adapter.config.get(key) == first.get(key) for adapter in adapters)
    }
    shared["base_model_name_or_path"] = first.get("base_model_name_or_path")
    return config(ranks, adapters[0].transposed, **shared, **_selection(adapters))


def rank_pattern(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The usual rank, and PEFT's `rank_pattern` of the others."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    return usual, _pattern(ranks, usual)


def _pattern(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """rank_pattern: PEFT takes the first key that equals a module's name, or its end after a dot."""
    names = {module for module, rank in ranks.items() if rank != usual}
    names |= {module for module in ranks if any(module.endswith(f".{name}") for name in names)}
    # keys are regular expressions; dots are not escaped, as is usual
    return {
        re.escape(name).replace(r"\.", "."): ranks[name] for name in sorted(names, key=lambda name: (-len(name), name))
    }


def _selection(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The inputs' target modules if all agree; else every module by its full name."""

    def said(adapter: Adapter) -> list[Any]:
        values = [adapter.config.get(key) for key in _SELECTION]
        return [sorted(map(str, value)) if isinstance(value, list) else value for value in values]

    first = adapters[0]
    alike = all(said(a) == said(first) and a.modules.keys() == first.modules.keys() for a in adapters)
    if alike and first.config.get("target_modules"):
        return {key: first.config[key] for key in _SELECTION if first.config.get(key) is not None}
    return {}


def copy(adapter: Adapter, directory: Path) -> None:
    """The adapter's own two files, byte for byte; `RunError` if a value is not finite."""
    with Files() as files:
        for tensor in adapter.header.tensors:
            finite(files, tensor)
    for name in (CONFIG, WEIGHTS):
        copy_file(adapter.directory / name, directory / name)


def inputs(paths: Iterable[Path]) -> list[dict[str, Any]]:
    found = []
    for path in paths:
        found.append({"file": str(path), "size": path.stat().st_size, "sha256": sha256_of(path)})
    return found


def different_bases(bases: Sequence[Any]) -> list[str]:
    """A note if the adapters name more than one base."""
    named = dict.fromkeys(str(base) for base in bases)
    return [f"the adapters name different bases: {', '.join(named)}"] if len(named) > 1 else []
