"""A model on disk: tensors by the names in its files, deltas on top, side files.

Names, shapes and order are those of the files, never those of a loaded model's state dict.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from mergebench.checkpoint import distributed
from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.documents import document, read_json
from mergebench.checkpoint.fp4 import find_packed
from mergebench.checkpoint.header import GGUF_HINT, INDEX, SINGLE, Header, TensorInfo, damaged, read_header
from mergebench.checkpoint.naming import (
    USUAL,
    Naming,
    components,
    encoder_folder,
    find_other_weights,
    find_weights,
    module_folders,
    stem_of,
)
from mergebench.errors import ModelError, RunError, counted

if TYPE_CHECKING:
    import torch

    from mergebench.checkpoint.files import Files
    from mergebench.checkpoint.values import Values

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
VECTOR = {"holds": "task vector"}  # metadata of a file whose tensors are differences
FACTORS = {"holds": "factors of weights"}  # of a file whose linear layers are products of two
MODULE = {"holds": "module"}  # of a file of what runs beside a model: no weights of it can hold that
MODULE_FILE = "module.safetensors"


class Config(TypedDict, total=False):
    """What is read of config.json."""

    architectures: list[str] | None
    model_type: str | None


class Index(TypedDict):
    """What is read of an index of shards: the file of each tensor."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class Model:
    """A checkpoint on disk: headers are read and checked, data is not touched."""

    reference: str  # as the user wrote it
    directory: Path | None  # None for a bare .safetensors file
    headers: list[Header]
    tensors: dict[str, TensorInfo]  # in file order, shard after shard
    naming: Naming = USUAL  # of its files, and of those written in its place
    deltas: dict[str, tuple[Delta, ...]] = field(default_factory=dict)  # by the base's names, folded left to right
    adapters: tuple[Path, ...] = ()  # where the deltas come from
    modules: tuple[Path, ...] = ()  # files of what runs beside it; only of a model that is opened to be run
    is_task_vector: bool = False  # its tensors already are differences to the base
    config_changes: Mapping[str, Any] | None = None  # for a model composed of others, or with another vocabulary
    origins: Mapping[str, str] = field(default_factory=dict)  # of a model composed of layers: whose each tensor is
    tokenizer_files: Mapping[str, bytes] | None = None  # instead of those in its directory
    remarks: tuple[str, ...] = ()  # notes for the user

    def __repr__(self) -> str:
        return f"<Model {self.reference}: {counted(len(self.tensors), 'tensor')}>"

    @property
    def sliced(self) -> bool:
        """Whether it is composed of layers of other models: no file has its order of tensors."""
        return bool(self.origins)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, or {} if there is none."""
        path = self.side_directory / "config.json"
        if self.directory is None or not path.is_file():
            return {}
        config: dict[str, Any] = document(path, Config)
        return config | dict(self.config_changes or {})

    @property
    def config_directory(self) -> Path | None:
        """Where the model's own config and tokenizer files are; None for a bare file."""
        return None if self.directory is None else self.directory / self.naming.main

    @property
    def side_directory(self) -> Path:
        """Where config and tokenizer files are."""
        return self.config_directory or next(iter(self.headers)).file.parent

    def own_directory(self) -> Path | None:
        """The directory that belongs to this model alone: that of the last adapter, if any."""
        return self.adapters[-1] if self.adapters else self.directory

    @cached_property
    def delta_digest(self) -> str | None:
        """A hash of the deltas' properties outside their files; None if there are no deltas."""
        if not self.deltas:
            return None
        listed = [(name, [delta.digest for delta in deltas]) for name, deltas in self.deltas.items()]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def settle(self, files: Files) -> None:
        """Compute now what all workers need for tensors composed of others."""
        for info in self.tensors.values():
            if info.made is not None:
                info.made.settle(files)

    def values(self, files: Files) -> Values:
        """The values of the model's tensors, with deltas folded in."""
        from mergebench.checkpoint.values import Values

        return Values(self.tensors, self.deltas, files)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All tensors in memory: floats as float32 with the deltas folded in, the others as stored."""
        from mergebench.checkpoint.files import Files

        if self.is_task_vector:
            raise ModelError(f"model '{self.reference}': it holds differences to a base, no model", _VECTOR_HINT)
        with Files() as files:
            values = self.values(files)
            return {name: values.whole(name) for name in self.tensors}


def open_checkpoint(reference: str, place: Path) -> Model:
    """Open a checkpoint, a directory or a .safetensors file: reads headers only and checks them all.

    Raises `ModelError` if it is not a checkpoint, `RunError` if a file is damaged.
    """
    if place.is_dir() and find_weights(place) is None and not find_other_weights(place):
        shards = distributed.find(place)
        if shards is not None:
            return _open_sharded(reference, place, shards)
    if place.is_dir():
        directory, (headers, naming) = place, open_weights(reference, place)
    else:
        directory, naming = None, USUAL
        if place.suffix == ".gguf":
            raise ModelError(f"{place}: a GGUF file, not a .safetensors file", GGUF_HINT)
        if place.suffix != ".safetensors":
            raise ModelError(f"{place}: not a .safetensors file", _PICKLE_HINT)
        headers = [read_header(place)]
    tensors: dict[str, TensorInfo] = {}
    doubled = []
    for tensor in (tensor for header in headers for tensor in header.tensors):
        before = tensors.pop(tensor.name, None)
        if before is not None:  # wherever the index places it, all libraries take the last
            files = f"{before.file.name} and {tensor.file.name}"
            doubled.append(f"{tensor.name} is in {files}, read from the latter as by transformers")
        tensors[tensor.name] = tensor
    if not tensors:
        raise ModelError(f"model '{reference}': it holds no tensors")
    config = Model(reference, directory, headers, tensors, naming).config  # a damaged one fails here, not at the end
    if any(info.dtype == "U8" for info in tensors.values()):
        tensors = find_packed(reference, tensors, config)
    if any(info.is_quantized for info in tensors.values()):
        from mergebench.checkpoint.fp8 import find_scales  # this import loads torch

        tensors = find_scales(reference, tensors, config)
    remarks = (doubled[0] + (f" (and {len(doubled) - 1} more)" if doubled[1:] else ""),) if doubled else ()
    vector = holds_vector(headers)
    return Model(reference, directory, headers, tensors, naming, is_task_vector=vector, remarks=remarks)


def _open_sharded(reference: str, place: Path, shards: Path) -> Model:
    """A checkpoint in shards of ranks; its config and tokenizer lie beside the shards, or beside their folder."""
    read = distributed.read_sharded(shards)
    beside = place if place != shards or (place / "config.json").is_file() else place.parent
    directory = beside if (beside / "config.json").is_file() else place
    return Model(reference, directory, read.headers, read.tensors, remarks=read.remarks)


def holds_vector(headers: Iterable[Header]) -> bool:
    """Whether the files are marked as differences to a base."""
    return any(header.metadata.items() >= VECTOR.items() for header in headers)


def holds_factors(headers: Iterable[Header]) -> bool:
    """Whether the files are marked as those of a compressed model."""
    return any(header.metadata.items() >= FACTORS.items() for header in headers)


def module_at(place: Path) -> Header | None:
    """The header of the module that a directory holds, or that a file is; None if it is none."""
    file = place / MODULE_FILE if place.is_dir() else place
    if file.suffix != ".safetensors" or not file.is_file():
        return None
    header = read_header(file)
    return header if header.metadata.items() >= MODULE.items() else None


def open_directory(reference: str, directory: Path) -> list[Header]:
    """The headers of a directory's files."""
    return open_weights(reference, directory)[0]


def open_weights(reference: str, directory: Path) -> tuple[list[Header], Naming]:
    """The headers of a directory's files, and how they are named.

    Folders that belong to the model come after its own weights: there a tensor is called FOLDER/NAME. A pipeline of
    diffusers has no weights but its components'.
    """
    inside, main = components(directory), ""
    pipeline = bool(inside)
    if not pipeline:
        inside, main = module_folders(directory), encoder_folder(directory)
    parts = {folder: _open_part(reference, directory, folder, pipeline) for folder in inside if folder != main}
    headers = [] if pipeline and any(parts.values()) else _open_files(reference, directory / main)
    stem = stem_of(headers[0].file.name) if headers else USUAL.stem
    stems = {folder: stem_of(found[0].file.name) for folder, found in parts.items() if found}
    return [*headers, *chain(*parts.values())], Naming(stem, stems, main, pipeline)


def _open_files(reference: str, directory: Path) -> list[Header]:
    """The headers of one file, or of the shards that an index names."""
    weights = find_weights(directory)
    if weights is None:
        files = find_other_weights(directory)
        if len(files) > 1:
            hint = f"name the file that is the model; of a model in shards, copy {INDEX} too"
            raise ModelError(f"model '{reference}': {len(files)} .safetensors files and no {INDEX}", hint)
        if not files:
            raise _no_weights(reference, directory)
        weights = files[0]
    return _open_shards(weights) if weights.suffix == ".json" else [read_header(weights)]


def _no_weights(reference: str, directory: Path) -> ModelError:
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        return ModelError(f"model '{reference}': no safetensors file, only {pickles[0]}", _PICKLE_HINT)
    gguf = sorted(path.name for path in directory.glob("*.gguf"))
    if gguf:
        return ModelError(f"model '{reference}': no safetensors file, only GGUF: {gguf[0]}", GGUF_HINT)
    parts = sorted({path.parent.name for path in directory.glob("*/*.safetensors")})
    hint = f"name one of its parts: {', '.join(f'{reference}/{part}' for part in parts[:4])}" if parts else None
    hint = hint or next((way for pattern, way in _STATES.items() if any(directory.glob(pattern))), None)
    return ModelError(f"model '{reference}': the directory holds no .safetensors file", hint)


def _open_shards(index: Path) -> list[Header]:
    """The headers of the shards, each with those of its tensors that the index lists: it is the list of tensors."""
    directory = index.parent
    try:
        weight_map = read_json(index, Index)["weight_map"]
    except (OSError, ValueError) as error:
        raise damaged(index, f"not a readable index of shards: {error}") from None
    names: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        names.setdefault(file, set()).add(tensor)
    headers, present = [], {path.name for path in directory.iterdir()}
    for file in sorted(names):
        # An index may name only files in its own directory; hub snapshots are links, so only names are checked.
        if Path(file).name != file or file in ("", ".", ".."):
            inside = Path(file).parts and not Path(file).is_absolute() and ".." not in Path(file).parts
            hint = "put the shards beside the index, and their bare names into it" if inside else None
            raise RunError(f"{index}: it names '{file}', which is outside its directory", hint)
        if file not in present:  # asked for by name, a name may be impossible
            raise damaged(index, f"it names '{file}', which is missing")
        header = read_header(directory / file)
        listed = [tensor for tensor in header.tensors if tensor.name in weight_map]
        missing = names[file] - {tensor.name for tensor in listed}
        if missing:
            raise damaged(index, f"it places '{min(missing)}' in {file}, which does not hold it")
        headers.append(replace(header, tensors=listed))
    return headers


def _open_part(reference: str, directory: Path, folder: str, pipeline: bool) -> list[Header]:
    """The headers of a folder, each tensor under the name FOLDER/NAME; none if it holds no weights."""
    place = directory / folder
    stored, pickles = ({p.name for one in some for p in place.glob(one)} for some in (("*.safetensors",), PICKLES))
    if not pipeline and (stored or pickles) and SINGLE not in stored:  # its library looks for no other name
        what = f"its module {folder} has no {SINGLE}, only {min(stored or pickles)}"
        hint = "save it again with sentence-transformers: SentenceTransformer(DIR).save_pretrained(NEW)"
        raise ModelError(f"model '{reference}': {what}", hint)
    if pickles and not stored:
        what = f"its component {folder} has no safetensors file, only {min(pickles)}"
        hint = "save it again with diffusers: DiffusionPipeline.from_pretrained(DIR).save_pretrained(NEW)"
        raise ModelError(f"model '{reference}': {what}", hint)
    headers = _open_files(f"{reference}/{folder}", place) if stored else []
    return [replace(one, tensors=[t._replace(name=f"{folder}/{t.name}") for t in one.tensors]) for one in headers]


_FSDP = "these are FSDP's shards of a run without their .metadata: copy that file too"
_STATES = {  # what a run leaves that is no model yet
    "*.distcp": _FSDP,
    "*/*.distcp": _FSDP,
    "global_step*/*.pt": "DeepSpeed's state of a run: zero_to_fp32.py --safe_serialization makes a model of it",
}
_VECTOR_HINT = "name a task with its base, BASE+DIR/tasks/NAME; in a recipe, the vector as task_vector: DIR"
_PICKLE_HINT = (
    "pickle files are never loaded, they can run code: save the model as safetensors "
    "(transformers: from_pretrained(DIR).save_pretrained(NEW))"
)
