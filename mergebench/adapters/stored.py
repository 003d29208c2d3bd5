"""An adapter of any type as stored: tensors by name, and the settings that give their meaning.

A directory as PEFT saves it, of any type, or one .safetensors file with its settings in the metadata, such as the
adapters of a bank. Only headers are read; the data of several adapters are read side by side, in pieces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.files import TORCH_DTYPE, Files
from mergebench.checkpoint.header import Header, TensorInfo, read_header
from mergebench.checkpoint.model import module_at
from mergebench.checkpoint.names import layer_of
from mergebench.checkpoint.naming import HEAD, find_weights
from mergebench.checkpoint.reference import locate_delta, name_of
from mergebench.deltas.formats import format_of
from mergebench.deltas.formats.lora import residual
from mergebench.deltas.peft.directory import CONFIG, PREFIX, WEIGHTS, is_adapter, read_directory
from mergebench.engine.noise import TILE
from mergebench.errors import ModelError, RunError

OUTSIDE = "other"  # tensors outside the layers
# settings for which modules have tensors; the tensors' names show this already
_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# settings that do not affect what the tensors do: origin, initialisation and training
_ABOUT = (
    "base_model_name_or_path", "tokenizer_name_or_path", "revision", "auto_mapping", "task_type", "inference_mode",
    "peft_version", "runtime_config", "format",
)  # fmt: skip
_TRAINING = ("init", "dropout")  # in their names
_HINT = "number by number, only adapters of one type, with equal settings and tensors, go together"


@dataclass(frozen=True)
class Stored:
    """An adapter of any type, settings and header read and checked."""

    path: Path
    settings: dict[str, Any]  # adapter_config.json, or the metadata of a single file
    header: Header

    @property
    def is_directory(self) -> bool:
        return self.header.file != self.path

    @property
    def name(self) -> str:
        """The directory's name, or the file's without its suffix."""
        return name_of(self.path) if self.is_directory else self.path.stem

    @property
    def files(self) -> list[Path]:
        return [*([self.path / CONFIG] if is_adapter(self.path) else []), self.header.file]

    @property
    def kind(self) -> str:
        """PEFT's type, such as LORA; of a single file or a module the type it names, such as bottleneck or ladder."""
        named = (self.settings.get(key) for key in ("peft_type", "kind", "module"))
        return str(next((kind for kind in named if kind is not None), "untyped"))

    @property
    def base(self) -> str | None:
        base = self.settings.get("base_model_name_or_path")
        return base if isinstance(base, str) else None

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """In file order."""
        return {tensor.name: tensor for tensor in self.header.tensors}

    @property
    def parameters(self) -> int:
        """Floats: positions are none."""
        return sum(tensor.numel for tensor in self.header.tensors if tensor.is_float)

    @property
    def layers(self) -> dict[str, list[str]]:
        """The names of the floats in each layer, by depth; tensors outside the layers come last."""
        found: dict[tuple[str, int], list[str]] = {}
        outside: list[str] = []
        for name, info in self.tensors.items():
            if info.is_float:
                layer = layer_of(name.removeprefix(PREFIX))
                (outside if layer is None else found.setdefault(layer[:2], [])).append(name)
        inside = {f"{stack}.{number}".lstrip("."): found[stack, number] for stack, number in sorted(found)}
        return inside | ({OUTSIDE: outside} if outside else {})


def read_stored(path: str | Path) -> Stored:
    """Read a PEFT directory, a module or a single .safetensors file; `ModelError` if it is no adapter."""
    path = locate_delta(path)
    module = module_at(path)
    if module is not None:
        settings, header = dict(module.metadata), module
    elif not is_adapter(path) and (other := format_of(path)) is not None:
        shown = f"mergebench inspect BASE+{path} shows what it changes"
        raise ModelError(f"{path}: it is {other.what}, not an adapter as PEFT saves it", shown)
    elif path.is_dir():
        inside = [*path.glob("*.safetensors"), *(config.parent for config in path.glob(f"*/{CONFIG}"))]
        told = find_weights(path) or inside == [path / HEAD]  # read_directory does
        if inside and not is_adapter(path) and not told:
            raise ModelError(f"{path}: not an adapter: no {CONFIG}", f"name what it holds, such as {min(inside)}")
        settings, header = read_directory(path)
        if not isinstance(settings.get("peft_type"), str):
            raise ModelError(f"{path / CONFIG}: it names no peft_type", "name a directory as PEFT saves it")
    elif path.suffix == ".safetensors":
        if path.name == WEIGHTS and is_adapter(path.parent):
            raise ModelError(f"{path}: its settings are in {CONFIG} beside it", f"name the directory: {path.parent}")
        header = read_header(path)
        settings = dict(header.metadata)
    else:
        raise ModelError(f"{path}: not an adapter", "a directory as PEFT saves it, or a .safetensors file")
    if not header.tensors:
        raise ModelError(f"{path}: the adapter holds no tensors")
    return Stored(path, settings, header)


def check_alike(adapters: Sequence[Stored]) -> None:
    """`ModelError` if settings or tensors of two adapters differ, so that their numbers do not mean the same."""
    first = adapters[0]
    for other in adapters[1:]:
        _check_settings(first, other)
        _check_tensors(first, other)


def together(files: Files, adapters: Sequence[Stored], name: str) -> Iterator[tuple[int, list[Tensor]]]:
    """A tensor of all adapters in flat pieces: the start of each piece, and a row for each adapter; floats as float32.

    `RunError` if an adapter is not finite, `ModelError` if values other than floats differ.
    """
    infos = [adapter.tensors[name] for adapter in adapters]
    for start in range(0, infos[0].numel, TILE):
        rows: list[Tensor] = []
        for info in infos:
            row = torch.empty(min(TILE, info.numel - start), dtype=TORCH_DTYPE[info.dtype])
            files.read_elements(info, start, row)
            if info.is_float:
                row = row.float()
                if not torch.isfinite(row).all():
                    raise RunError(f"{info.file}: '{name}' holds NaN or infinity", "use another adapter")
            elif rows and not torch.equal(row, rows[0]):
                other = adapters[len(rows)].path
                raise ModelError(f"{name}: {adapters[0].path} and {other} hold other {info.dtype} numbers", _HINT)
            rows.append(row)
        yield start, rows


def _check_settings(first: Stored, other: Stored) -> None:
    if first.is_directory != other.is_directory or first.kind != other.kind:
        what = f"{first.path} is of type {first.kind}, {other.path} of type {other.kind}"
        raise ModelError(what, _HINT)
    for key in {**first.settings, **other.settings}:
        mine, theirs = _setting(first, key), _setting(other, key)
        if mine != theirs and key not in _SELECTION:
            both = key in first.settings and key in other.settings
            # a missing setting has its default: None, or a value that is not known here
            if both or not first.is_directory or isinstance(mine or theirs, bool | list | dict):
                raise _differ(key, first, other)


def _check_tensors(first: Stored, other: Stored) -> None:
    for one, two in ((first, other), (other, first)):
        missing = next((name for name in one.tensors if name not in two.tensors), None)
        if missing is not None:
            if _setting(one, "target_modules") != _setting(two, "target_modules"):
                raise _differ("target_modules", first, other)
            raise ModelError(f"{two.path}: it has no tensor '{missing}', {one.path} has", _HINT)
    for name, mine in first.tensors.items():
        theirs = other.tensors[name]
        if mine.shape != theirs.shape:
            what = f"{first.path} has {list(mine.shape)}, {other.path} has {list(theirs.shape)}"
            raise ModelError(f"{name}: {what}", _HINT)
        if mine.dtype != theirs.dtype and not (mine.is_float and theirs.is_float):
            raise ModelError(f"{name}: {first.path} has {mine.dtype}, {other.path} has {theirs.dtype}", _HINT)


def _setting(adapter: Stored, key: str) -> Any:
    """A setting in a comparable form: none, off and empty are equal, and lists of names have no order."""
    if key == "init_lora_weights":
        return residual(adapter.settings)
    if key in _ABOUT or any(part in key for part in _TRAINING):
        return None
    value = adapter.settings.get(key) or None
    return sorted(map(str, value)) if isinstance(value, list) else value


def _differ(key: str, first: Stored, other: Stored) -> ModelError:
    said = [json.dumps(adapter.settings.get(key))[:200] for adapter in (first, other)]
    what = f"{key}: {first.path} has {said[0]}, {other.path} has {said[1]}"
    lora = "; LoRAs of any rank: --method linear" * (first.kind == "LORA")
    return ModelError(what, _HINT + lora)
