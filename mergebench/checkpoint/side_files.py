"""The files beside the weights. What a file is decides whether it goes along with the model's merge or edit:

config, tokenizer, processor, templates, code, licence     copied
weights: those read, or the same in another format         stay
the state, logs and scores of the run that made them       stay

In folders, code and templates are copied, and all of this in the modules of sentence-transformers and the components
of a pipeline. Another folder with weights of its own is another model, or another format of this one, and stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from mergebench.checkpoint.documents import open_file
from mergebench.checkpoint.fp8 import without_scales
from mergebench.checkpoint.model import PICKLES, Model
from mergebench.checkpoint.naming import part_folders
from mergebench.checkpoint.reference import LEGAL, SIDE_SUFFIXES
from mergebench.errors import ModelError

CONFIG_DTYPE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_OURS = {
    *("README.md", "mergebench.json", "compress.json", "search.json", "best.yaml", "statistics.json"),
    *("evaluation.json", "evaluation.md", "report.html"),
}  # made anew for each result
_WEIGHTS = (
    *("*.safetensors", *PICKLES, "*.gguf", "*.h5", "*.msgpack", "*.ot", "*.npz", "*.onnx", "*.onnx_data", "*.tflite"),
    *("*.mlmodel", "*.pb", "openvino_*", "*.distcp"),
)
_INDEX = ("*.index.json", "*.index.*.json")
_RUN = ("trainer_*.json", "training_*.json", "*results.json", "*results.txt", "zero_to_fp32.py", "adapter_*")
_IN_FOLDERS = (".py", ".jinja")
TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges*", "special_tokens_map*", "added_tokens*", "*.model", "*.tiktoken"),
    "chat_template*",
)
SENTENCEPIECE = "pip install sentencepiece, or put a tokenizer.json beside it"
GENERATION = "generation_config.json"
_DECISIVE = ("config.json", GENERATION, "*processor_config.json", *TOKENIZER_FILES)


def needs_sentencepiece(directory: Path) -> str | None:
    """Why a tokenizer cannot be read: it is a SentencePiece model alone, and the package is not installed."""
    for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"):
        file = directory / name
        if file.is_file() and not (directory / "tokenizer.json").exists() and find_spec("sentencepiece") is None:
            with open_file(file) as stream:
                if stream.read(1) == b"\n":  # the message's first field, its pieces; tiktoken's files are text
                    return f"{name} is a SentencePiece model, and the package sentencepiece is not installed"
    return None


def decisive_files(directory: Path) -> list[Path]:
    """The files beside a model's weights that affect its output, by name."""
    return _matching(directory, _DECISIVE)


def tokenizer_files(directory: Path) -> list[Path]:
    """The tokenizer files in a directory, by name; none if the directory is missing."""
    return _matching(directory, TOKENIZER_FILES)


def _matching(directory: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in directory.glob(pattern) if file.is_file()})


def check_link(file: Path, directory: Path, weights: Iterable[Path]) -> None:
    """`ModelError` if a file of a model is a link out of its directory: a copy would publish what another place holds.

    A link may lead to the file of its name beside the weights, wherever these really lie, and to the blobs of the hub
    cache, which snapshots and older `local_dir` downloads link to.
    """
    real, name = file.resolve(), file.relative_to(directory)
    blob = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    if blob or real.is_relative_to(directory.resolve()):
        return
    if real not in {one.resolve().parent / name for one in weights}:
        what = f"{file}: a link out of the model's directory, to {real}"
        raise ModelError(what, f"put the file itself there, or link to the {name} beside the weights")


class Beside(NamedTuple):
    """The names of a model's files other than its weights. Of a folder that stays as a whole, the name with a slash.
    Replaced tokenizers are in neither list."""

    copied: list[str]
    left: list[str]


def side_files(source: Model, keeps_scales: bool = False) -> Beside:
    """What is copied along with a model's weights, and what stays behind.

    keeps_scales: the result is in eight or four bits, as the model is.

    `ModelError` for a link out of the model's directory among those copied. To be asked before the work.
    """
    if source.directory is None:
        return Beside([], [])
    main, place = PurePath(source.naming.main), source.side_directory
    stale = [] if source.tokenizer_files is None else [str(main / path.name) for path in tokenizer_files(place)]
    if any(info.is_quantized for info in source.tensors.values()) and not keeps_scales:
        stale.append(str(main / "hf_quant_config.json"))
    read = {header.file for header in source.headers}
    copied: list[str] = []
    left: list[str] = []
    for name, wanted in _beside(source.directory):
        if name not in stale and source.directory / name not in read:
            (copied if wanted else left).append(name)
    for name in copied:
        check_link(source.directory / name, source.directory, read)
    return Beside(copied, left)


def copy_side_files(
    source: Model,
    directory: Path,
    stored_dtype: str | None,
    beside: Beside | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, list[str]]:
    """Copy what goes along with `source`, byte by byte; config.json names the stored type.

    beside: as `side_files` told it before the work. config: instead of the model's, if the result is in eight or four
    bits.
    Returns for the provenance what was copied, `side_files`, and what stayed, `left_behind`.
    """
    from mergebench.checkpoint.files import copy_file, write_atomically  # this import loads torch

    if source.directory is None:
        return {"side_files": [], "left_behind": []}
    beside = side_files(source) if beside is None else beside
    copied = list(beside.copied)
    for name in copied:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source.directory / name, directory / name)
    for name, content in (source.tokenizer_files or {}).items():
        name = str(PurePath(source.naming.main) / name)
        write_atomically(directory / name, content)
        copied += [name] if name not in copied else []
    scaled = any(info.is_quantized for info in source.tensors.values())
    if config is None:
        config = without_scales(source.config) if scaled else source.config
    config = dict(config)
    changed = bool(source.config_changes) or config != source.config
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    if stored_dtype is not None and (key in config or "model_type" in config):  # that of diffusers names no type
        changed |= config.get(key) != CONFIG_DTYPE[stored_dtype]
        config[key] = CONFIG_DTYPE[stored_dtype]
    if config and changed:
        write_atomically(directory / source.naming.main / "config.json", json.dumps(config, indent=2) + "\n")
    return {"side_files": copied, "left_behind": beside.left}


def _beside(directory: Path) -> Iterator[tuple[str, bool]]:
    """What stands in a model's directory, by name, and whether it goes along. Hidden files, indexes and what this
    program writes anew are not listed; of a folder that stays only the name is."""
    parts = part_folders(directory)

    def inside(folder: Path, start: str, foreign: bool) -> Iterator[tuple[str, bool]]:
        for path in _listed(folder):
            name = f"{start}{path.name}"
            if path.name.startswith((".", "__pycache__")) or _is_any(path.name, _INDEX) or name in _OURS:
                continue
            if not path.is_dir():
                whole = not start or start.rstrip("/") in parts
                wanted = _goes_along(path.name) and (whole or path.suffix in _IN_FOLDERS)
                yield name, wanted and not foreign and path.is_file()
            elif path.is_symlink():
                yield f"{name}/", False
            else:
                other = name not in parts and any(_is_any(below.name, _WEIGHTS) for below in _listed(path))
                below = list(inside(path, f"{name}/", foreign or other))
                if any(wanted for _, wanted in below):
                    yield from below
                elif below:
                    yield f"{name}/", False

    return inside(directory, "", False)


def _listed(folder: Path) -> list[Path]:
    """What stands in a folder, by name; nothing if it may not be read."""
    try:
        return sorted(folder.iterdir())
    except PermissionError:
        return []


def _goes_along(name: str) -> bool:
    """Whether a file is part of a model, by its name, and neither weights nor of the run that made them."""
    if _is_any(name, (*_WEIGHTS, *_RUN)):
        return False
    return Path(name).suffix in SIDE_SUFFIXES or _is_any(name, (*TOKENIZER_FILES, *(f"*{word}*" for word in LEGAL)))


def _is_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)
