"""The files beside the weights: config, tokenizer and code, copied; config.json names the stored type."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from mergebench.checkpoint.fp8 import without_scales
from mergebench.checkpoint.header import FP8
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.reference import SIDE_SUFFIXES

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


def copy_side_files(source: Model, directory: Path, stored_dtype: str | None) -> list[str]:
    """Copy config, tokenizer and code files of `source` byte by byte; config.json names the stored type.

    Returns the names copied. Weights, adapters, earlier results and stale indexes stay behind.
    """
    from mergebench.checkpoint.files import write_atomically  # this import loads torch

    if source.directory is None:
        return []
    copied = []
    replaced = source.tokenizer_files
    stale = [] if replaced is None else tokenizer_files(source.directory)
    scaled = any(info.dtype in FP8 for info in source.tensors.values())
    for path in sorted(source.directory.iterdir()):
        skip = path.name in _LEAVE or path.name.startswith((".", "adapter_")) or path.name.endswith(".index.json")
        skip |= path in stale
        skip |= scaled and path.name == "hf_quant_config.json"
        if skip or path.suffix not in SIDE_SUFFIXES or not path.is_file():
            continue
        shutil.copyfile(path, directory / path.name)
        copied.append(path.name)
    for name, content in (replaced or {}).items():
        (directory / name).write_bytes(content)
        copied.append(name)
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
