"""One model as its files show it: tensors by the names on disk, an adapter on top, side files.

Names, shapes and order are the files', never those of a loaded model's state dict.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergebench.checkpoint.fp8 import find_scales
from mergebench.checkpoint.header import FP8, GGUF_HINT, INDEX, SINGLE, Header, TensorInfo, damaged, read_header
from mergebench.checkpoint.lora import LowRank, is_adapter, read_lora
from mergebench.checkpoint.masked import FOLDER, Masked, holds_vector, is_task, read_task, tasks_in
from mergebench.checkpoint.patched import METADATA as PATCH
from mergebench.checkpoint.patched import Patched
from mergebench.checkpoint.reference import locate
from mergebench.errors import ModelError, RunError

if TYPE_CHECKING:
    import torch

    from mergebench.checkpoint.files import Files

Delta = LowRank | Masked | Patched  # what is added to a tensor of the base as it is read
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Model:
    """A checkpoint on disk, headers read and checked, no data touched."""

    reference: str  # as the user wrote it
    directory: Path | None  # None for a bare .safetensors file
    headers: list[Header]
    tensors: dict[str, TensorInfo]  # in file order, shard after shard
    deltas: dict[str, Delta] = field(default_factory=dict)  # what the adapter adds, by the base's names
    adapter: Path | None = None
    is_task_vector: bool = False  # its tensors already are differences to the base
    config_changes: Mapping[str, Any] | None = None  # of a model put together from others, or with other tokens
    sliced: bool = False  # put together from layers of others: the order of its tensors is no file's
    tokenizer_files: Mapping[str, bytes] | None = None  # instead of those in its directory
    replaced: dict[str, TensorInfo] = field(default_factory=dict)  # what the base has where the adapter has its own
    remarks: tuple[str, ...] = ()  # how its tensors were found under the base's names

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, or {} where there is none."""
        path = self.side_directory / "config.json"
        if self.directory is None or not path.is_file():
            return {}
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise RunError(f"{path}: not readable as JSON") from None
        if not isinstance(config, dict):
            raise RunError(f"{path}: not a JSON object")
        return config | dict(self.config_changes or {})

    @property
    def side_directory(self) -> Path:
        """Where config and tokenizer files are."""
        return self.directory if self.directory is not None else next(iter(self.headers)).file.parent

    def layout(self) -> Iterator[TensorInfo]:
        """The tensors as the base stores them, also those that the adapter holds whole."""
        for name, info in self.tensors.items():
            yield self.replaced.get(name, info)

    def files(self) -> Iterator[Header]:
        """Every file this model is read from, the adapter's too."""
        yield from self.headers

    def own_directory(self) -> Path | None:
        """The directory that is this model's alone: the adapter's where there is one."""
        return self.adapter or self.directory

    def settle(self, files: Files) -> None:
        """Compute now what all workers need of tensors that are made of others."""
        for info in self.tensors.values():
            if info.made is not None:
                info.made.settle(files)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All tensors in memory: floats as float32 with the adapter folded in, the others as stored."""
        from mergebench.checkpoint.values import read_whole

        if self.is_task_vector:
            raise ModelError(f"model '{self.reference}': it holds differences to a base, no model", _VECTOR_HINT)

        return {name: read_whole(self, name) for name in self.tensors}


def open_model(reference: str, *, folders: Sequence[Path] = (), task_vector: bool = False) -> Model:
    """Open the model a reference names: headers only, every one checked.

    Raises `ModelError` where it is missing or no checkpoint, `RunError` where a file is damaged.
    """
    place = locate(reference, folders)
    if place.checkpoint.is_dir():
        directory, headers = place.checkpoint, _open_directory(reference, place.checkpoint)
    else:
        directory = None
        if place.checkpoint.suffix == ".gguf":
            raise ModelError(f"{place.checkpoint}: a GGUF file, not a .safetensors file", GGUF_HINT)
        if place.checkpoint.suffix != ".safetensors":
            raise ModelError(f"{place.checkpoint}: not a .safetensors file", _PICKLE_HINT)
        headers = [read_header(place.checkpoint)]
        if PATCH in headers[0].metadata:
            raise ModelError(f"model '{reference}': it is a patch, not a model", f"{_ITS_MODEL}: BASE+{reference}")
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for tensor in header.tensors:
            if tensor.name in tensors:
                raise damaged(header.file, f"'{tensor.name}' also stands in {tensors[tensor.name].file.name}")
            tensors[tensor.name] = tensor
    if not tensors:
        raise ModelError(f"model '{reference}': it holds no tensors")
    if any(".lora_A." in name for name in tensors):
        raise ModelError(f"model '{reference}': it is an adapter, not a model", f"{_ITS_MODEL}: BASE+DIRECTORY")
    config = Model(reference, directory, headers, tensors).config  # a damaged one shows here, not when all is done
    if any(info.dtype in FP8 for info in tensors.values()):
        tensors = find_scales(reference, tensors, config)
    deltas: dict[str, Delta] = {}
    replaced: dict[str, TensorInfo] = {}
    if place.adapter is not None:
        if not place.adapter.is_dir():
            from mergebench.checkpoint.patch import read_patch  # which reads models

            if place.adapter.suffix != ".safetensors":
                raise ModelError(f"{place.adapter}: an adapter is a directory, a patch a .safetensors file")
            patched, header = read_patch(place.adapter, reference, tensors)
            deltas |= patched
            headers = [*headers, header]
        elif is_task(place.adapter):
            masked, more = read_task(place.adapter, _vector_of(place.adapter), tensors)
            deltas |= masked
            headers = [*headers, *more]
        elif tasks := tasks_in(place.adapter):
            hint = f"name one of its tasks: {reference}/{FOLDER}/{tasks[0]}"
            raise ModelError(f"{place.adapter}: it holds {', '.join(tasks)}, not one task", hint)
        else:
            low_rank, whole, header = read_lora(place.adapter, tensors)
            deltas |= low_rank
            headers = [*headers, header]
            replaced = {name: tensors[name] for name in whole}
            tensors |= whole
    else:
        task_vector |= holds_vector(headers)
    model = Model(reference, directory, headers, tensors, deltas, place.adapter, task_vector, replaced=replaced)
    _check_tied(model)
    return model


def _vector_of(task: Path) -> list[Header]:
    """The files of the vector that a task's mask is for: two folders above it."""
    directory = task.resolve().parents[1]
    try:
        headers = _open_directory(str(directory), directory)
    except ModelError:
        headers = []
    if not holds_vector(headers):
        raise ModelError(f"{task}: {directory} does not hold the vector of this mask", "keep what was written together")
    return headers


def _check_tied(model: Model) -> None:
    """Half of a tied pair cannot change alone: what PEFT makes of the other half is not in the files."""
    tied = model.config.get("tie_word_embeddings", True)
    for name, info in model.replaced.items():
        if tied and len(info.shape) == 2 and _TIED.search(name):
            raise ModelError(
                f"{model.adapter}: '{name}' is saved whole, the base ties input and output embeddings",
                "fold it with PEFT's merge_and_unload() and name the model that gives",
            )


_TIED = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|shared|word_embeddings|lm_head|embed_out|decoder)\.weight$")
_ITS_MODEL = "name the model it belongs to"
_VECTOR_HINT = "name a task with its base, BASE+DIR/tasks/NAME; in a recipe, the vector as task_vector: DIR"
_PICKLE_HINT = (
    "pickle files are never loaded, they can run code: save the model as safetensors "
    "(transformers: from_pretrained(DIR).save_pretrained(NEW))"
)


def _open_directory(reference: str, directory: Path) -> list[Header]:
    if is_task(directory):
        raise ModelError(f"model '{reference}': it is a task's mask, no model", f"name its base: BASE+{reference}")
    if (directory / SINGLE).exists():  # as in transformers, a single file wins over an index beside it
        return [read_header(directory / SINGLE)]
    if (directory / INDEX).exists():
        return _open_shards(directory)
    if is_adapter(directory):
        raise ModelError(f"model '{reference}': it is an adapter, not a model", f"{_ITS_MODEL}: BASE+{reference}")
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return [read_header(files[0])]
    if files:
        raise ModelError(f"model '{reference}': {len(files)} .safetensors files and no {INDEX}")
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        raise ModelError(f"model '{reference}': no safetensors file, only {pickles[0]}", _PICKLE_HINT)
    gguf = sorted(path.name for path in directory.glob("*.gguf"))
    if gguf:
        raise ModelError(f"model '{reference}': no safetensors file, only GGUF: {gguf[0]}", GGUF_HINT)
    parts = sorted({path.parent.name for path in directory.glob("*/*.safetensors")})
    hint = f"name one of its parts: {', '.join(f'{reference}/{part}' for part in parts[:4])}" if parts else None
    raise ModelError(f"model '{reference}': the directory holds no .safetensors file", hint)


def _open_shards(directory: Path) -> list[Header]:
    index = directory / INDEX
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names: dict[str, set[str]] = {}
        for tensor, file in weight_map.items():
            if not isinstance(file, str):
                raise TypeError
            names.setdefault(file, set()).add(tensor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise damaged(index, "not a readable index of shards") from None
    headers = []
    for file in sorted(names):
        # An index may name only files beside it; hub snapshots are links, so the name decides.
        if Path(file).name != file or file in ("", ".", ".."):
            raise RunError(f"{index}: it names '{file}', which is outside its directory")
        if not (directory / file).exists():
            raise damaged(index, f"it names '{file}', which is missing")
        header = read_header(directory / file)
        missing = names[file] - {tensor.name for tensor in header.tensors}
        if missing:
            raise damaged(index, f"it places '{min(missing)}' in {file}, which does not hold it")
        headers.append(header)
    return headers
