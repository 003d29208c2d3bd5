"""The files beside the weights: config, tokenizer and code, copied; config.json names the stored type."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mergebench.checkpoint.fp8 import without_scales
from mergebench.checkpoint.header import FP8
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.reference import SIDE_SUFFIXES
from mergebench.errors import ModelError

CONFIG_DTYPE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LEAVE = {"README.md", "mergebench.json", "evaluation.json", "evaluation.md", "head.safetensors", "compress.json"}
TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges*", "special_tokens_map*", "added_tokens*", "*.model", "*.tiktoken"),
    "chat_template*",
)
_DECISIVE = ("config.json", "generation_config.json", "*processor_config.json", *TOKENIZER_FILES)


def decisive_files(directory: Path) -> list[Path]:
    """The files beside a model's weights that affect its output, by name."""
    return _matching(directory, _DECISIVE)


def tokenizer_files(directory: Path) -> list[Path]:
    """The tokenizer files in a directory, by name; none if the directory is missing."""
    return _matching(directory, TOKENIZER_FILES)


def _matching(directory: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in directory.glob(pattern) if file.is_file()})


def check_link(file: Path, directory: Path) -> None:
    """`ModelError` if a file of a model is a link out of its directory: a copy would publish what another place holds.

    The snapshots of the hub cache are links to its blobs, which may be followed.
    """
    real, home = file.resolve(), directory.resolve()
    blobs = [place.parent / "blobs" for place in home.parents if place.name == "snapshots"]
    if not any(real.is_relative_to(place) for place in [home, *blobs]):
        raise ModelError(f"{file}: a link out of the model's directory, to {real}", "put the file itself there")


def side_files(source: Model) -> list[Path]:
    """The files of a model that are copied along with its weights; `ModelError` for a link out of its directory.

    Weights, adapters, earlier results, stale indexes and replaced tokenizers stay behind.
    """
    if source.directory is None:
        return []
    stale = set() if source.tokenizer_files is None else set(tokenizer_files(source.directory))
    scaled = any(info.dtype in FP8 for info in source.tensors.values())
    found = []
    for path in sorted(source.directory.iterdir()):
        skip = path.name in _LEAVE or path.name.startswith((".", "adapter_")) or path.name.endswith(".index.json")
        skip |= path in stale
        skip |= scaled and path.name == "hf_quant_config.json"
        if not skip and path.suffix in SIDE_SUFFIXES and path.is_file():
            check_link(path, source.directory)
            found.append(path)
    return found


def copy_side_files(source: Model, directory: Path, stored_dtype: str | None) -> list[str]:
    """Copy config, tokenizer and code files of `source` byte by byte; config.json names the stored type.

    Returns the names copied.
    """
    from mergebench.checkpoint.files import copy_file, write_atomically  # this import loads torch

    if source.directory is None:
        return []
    copied = []
    for path in side_files(source):
        copy_file(path, directory / path.name)
        copied.append(path.name)
    for name, content in (source.tokenizer_files or {}).items():
        write_atomically(directory / name, content)
        copied.append(name)
    scaled = any(info.dtype in FP8 for info in source.tensors.values())
    config = dict(source.config)
    changed = bool(source.config_changes)
    if scaled:
        plain = without_scales(config)
        changed |= plain != config
        config = plain
    if config and stored_dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        changed |= config.get(key) != CONFIG_DTYPE[stored_dtype]
        config[key] = CONFIG_DTYPE[stored_dtype]
    if config and changed:
        write_atomically(directory / "config.json", json.dumps(config, indent=2) + "\n")
    return copied
