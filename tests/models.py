"""Small checkpoints on disk, written by the safetensors library, or byte by byte where they are to be wrong."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


def tiny_tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two layers, a vector each, an odd size, and an integer tensor."""
    random = torch.Generator().manual_seed(seed)
    tensors = {
        "embed.weight": torch.randn(11, 8, generator=random),
        "layers.0.weight": torch.randn(8, 8, generator=random),
        "layers.0.bias": torch.randn(8, generator=random),
        "layers.1.weight": torch.randn(8, 8, generator=random),
        "layers.1.bias": torch.randn(8, generator=random),
        "norm.weight": torch.randn(3, generator=random),
    }
    return {name: value.to(dtype) for name, value in tensors.items()} | {"steps": torch.arange(5)}


def fine_tuned(tensors: Mapping[str, Tensor], seed: int, scale: float = 0.05) -> dict[str, Tensor]:
    """The floats moved a little, everything else as it is."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: (value + scale * torch.randn(value.shape, generator=random)).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in tensors.items()
    }


def write_model(
    directory: Path,
    tensors: Mapping[str, Tensor],
    *,
    shards: Sequence[Sequence[str]] | int = 1,
    names: str = "model-{:05d}-of-{:05d}.safetensors",
    config: Mapping[str, Any] | None = CONFIG,
    metadata: dict[str, str] | None = None,
    side_files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """A checkpoint directory: one file, or `shards` (a number, or the names of each) with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(shards, int):
        keys = list(tensors)
        shards = [keys[number::shards] for number in range(shards)]
    files = [SINGLE] if len(shards) == 1 else [names.format(n, len(shards)) for n in range(1, len(shards) + 1)]
    for file, keys in zip(files, shards, strict=True):
        # save_file refuses views and tensors that share memory
        save_file({key: tensors[key].clone().contiguous() for key in keys}, directory / file, metadata=metadata)
    if len(files) > 1:
        weight_map = {key: file for file, keys in zip(files, shards, strict=True) for key in keys}
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config, indent=2))
    for name, content in (side_files or {}).items():
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return directory


def write_statistics(place: Path, method: str, model: Path) -> Path:
    """Made-up statistics of a model, of the kind that a method reads."""
    from mergebench import methods
    from mergebench.checkpoint.content import identity
    from mergebench.checkpoint.measured import FILE, write_measured
    from mergebench.deltas.open import open_model
    from mergebench.testing.methods import length_of, statistics_of

    opened = open_model(str(model))
    floats = {name: value for name, value in opened.state_dict().items() if value.is_floating_point()}
    made = statistics_of(methods.get(method), floats)
    about = {"kind": methods.get(method).statistics, "model": {"identity": identity(opened)}}
    place.mkdir(parents=True, exist_ok=True)
    shapes = {name: tuple(value.shape) for name, value in made.items()}
    write_measured(place / FILE, shapes, made.__getitem__, {**about, "data": {}, "norm": length_of(made)})
    return place


def read_model(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory, read by the safetensors library."""
    if (directory / SINGLE).exists():
        return dict(load_file(directory / SINGLE))
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        found = load_file(directory / file)
        assert {name for name, place in weight_map.items() if place == file} == found.keys()
        tensors |= found
    return tensors


def pack(header: Mapping[str, Any] | bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file byte by byte; `length` is what it claims its header to have."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def unpack(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and its data, to be changed and packed again."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_recipe(path: Path, method: str, models: Sequence[Any], base: Any = None, **more: Any) -> Path:
    """A recipe file; every model is a reference, or an entry as a mapping. (JSON is YAML.)"""
    entries = [model if isinstance(model, dict) else {"model": str(model)} for model in models]
    recipe = {"merge_method": method, "models": entries} | ({"base_model": str(base)} if base else {}) | more
    path.write_text(json.dumps(recipe, indent=1))
    return path


def hashes(place: Path) -> dict[str, str]:
    """Every file below a directory with the hash of its bytes, every directory and link by its kind."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_dir():
            found[name] = "directory"
        elif not path.is_file():
            found[name] = "a pipe"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def names(folder: Path) -> list[str]:
    """What stands in a directory."""
    return sorted(path.name for path in folder.iterdir())
