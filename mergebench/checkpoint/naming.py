"""The names of a checkpoint's files: those that transformers, diffusers, open_clip and sentence-transformers look for.

STEM.safetensors, or STEM-00001-of-00002.safetensors, ... and STEM.safetensors.index.json
modules.json                sentence-transformers: a list of modules, each in a folder or beside the list
0_Transformer/...           the encoder, where it is not beside the list: its tensors are the model's
2_Dense/model.safetensors   the weights of another module: NAME in this file is the model's tensor 2_Dense/NAME
model_index.json            diffusers: a pipeline, each component in a folder
unet/...                    a component: NAME in its files is the pipeline's tensor unet/NAME
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from mergebench.checkpoint.documents import read_json

DIFFUSERS = "diffusion_pytorch_model"
STEMS = ("model", DIFFUSERS, "open_clip_model", "consolidated")  # where several lie side by side, the first is read
MODULES, PIPELINE = "modules.json", "model_index.json"
HEAD = "head.safetensors"  # of a task, beside a model or what was trained
_SINGLE, _INDEX = ".safetensors", ".safetensors.index.json"
_NUMBERED = re.compile(r"(.+)-\d{5,}-of-\d{5,}\.safetensors")


class Naming(NamedTuple):
    """How a checkpoint's files are named."""

    stem: str = STEMS[0]
    folders: Mapping[str, str] = {}  # parts that have weights of their own, with the stem of their files
    main: str = ""  # the folder of all other weights
    pipeline: bool = False  # of diffusers, which reads the shards of a folder

    def folder_of(self, tensor: str) -> str | None:
        """The folder of the part that a tensor belongs to, if it is one of them."""
        return next((folder for folder in self.folders if tensor.startswith(f"{folder}/")), None)

    def files(self, count: int, folder: str | None = None) -> list[str]:
        """The names of as many files, of a part in a folder or of the other weights."""
        stem = self.stem if folder is None else self.folders[folder]
        start = Path(self.main if folder is None else folder)
        if count == 1:
            return [str(start / (stem + _SINGLE))]
        return [str(start / f"{stem}-{number:05d}-of-{count:05d}.safetensors") for number in range(1, count + 1)]


USUAL = Naming()


def index_of(file: str) -> str:
    """The name of the index that belongs to a numbered file."""
    numbered = _NUMBERED.fullmatch(file)
    return (numbered[1] if numbered else STEMS[0]) + _INDEX


def stem_of(file: str) -> str:
    """The known stem that a file's or an index's name begins with, else the usual one."""
    return next((stem for stem in STEMS if re.match(rf"{stem}[.-]", file)), STEMS[0])


def find_weights(directory: Path) -> Path | None:
    """The file or index of a model by the names that libraries look for; None if there is none."""
    for stem in STEMS:
        # transformers takes a single file before an index beside it, diffusers the index
        for end in (_INDEX, _SINGLE) if stem == DIFFUSERS else (_SINGLE, _INDEX):
            if (directory / f"{stem}{end}").exists():
                return directory / f"{stem}{end}"
    return None


def find_other_weights(directory: Path) -> list[Path]:
    """Files under other names: the one index, such as that of a variant, else every file."""
    indexes = sorted(directory.glob("*.safetensors.index*.json"))
    return indexes if len(indexes) == 1 else sorted(directory.glob("*.safetensors"))


class _Module(TypedDict):
    """An entry of modules.json, as far as it is read."""

    path: str


def module_folders(directory: Path) -> tuple[str, ...]:
    """The folders that modules.json names; () where it is no list of modules."""
    try:
        paths = [Path(module["path"]) for module in read_json(directory / MODULES, list[_Module])]
    except (OSError, ValueError):
        return ()
    # the path of a module that lies beside the list is ""
    return tuple(dict.fromkeys(path.as_posix() for path in paths if path.parts and _is_inside(path)))


def encoder_folder(directory: Path) -> str:
    """The folder of sentence-transformers' encoder; "" where weights lie beside the list of modules."""
    if find_weights(directory) is None and not any(directory.glob("*.safetensors")):
        for folder in module_folders(directory):
            if "model_type" in _mapping(directory / folder / "config.json"):
                return folder
    return ""


def components(directory: Path) -> tuple[str, ...]:
    """The folders of a pipeline's components, with and without weights; () where there is no pipeline."""
    listed = _mapping(directory / PIPELINE)
    loaded = (name for name, value in listed.items() if isinstance(value, list) and None not in value)
    return tuple(name for name in loaded if Path(name).name == name and (directory / name).is_dir())


def part_folders(directory: Path) -> tuple[str, ...]:
    """The folders that belong to a model as a whole."""
    return components(directory) or module_folders(directory)


def _mapping(file: Path) -> dict[str, Any]:
    """A JSON file; {} where it is none, or no mapping."""
    try:
        found: dict[str, Any] = read_json(file, dict[str, Any])
    except (OSError, ValueError):
        return {}
    return found


def _is_inside(path: Path) -> bool:
    return not path.is_absolute() and ".." not in path.parts
