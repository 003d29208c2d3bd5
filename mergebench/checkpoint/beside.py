"""What the files beside the weights of two models say differently: generation, templates, processors, components."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergebench.checkpoint.documents import read_bytes, read_json
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.naming import part_folders
from mergebench.checkpoint.side_files import GENERATION

_FILES = (GENERATION, "preprocessor_config.json", "processor_config.json", "sentence_bert_config.json")
_SILENT = ("transformers_version", "dtype", "torch_dtype")  # and keys that begin with _
_SHOWN = 2


def other_files(base: Model, model: Model, chosen: bool) -> str | None:
    """A sentence on the files that differ from the base's, whose are copied; None if there are none.

    chosen: whether the recipe says which chat template the result has, and with it where turns end.
    """
    if base.directory is None or model.directory is None or model.is_task_vector:
        return None
    found = [] if chosen else list(_templates(base.side_directory, model.side_directory))
    names = [name for name in _FILES if not (chosen and name == GENERATION)]
    pairs = [(name, base.side_directory / name, model.side_directory / name) for name in names]
    for folder in part_folders(base.directory):
        if folder != base.naming.main:
            files = sorted((base.directory / folder).glob("*config.json"))
            pairs += [(f"{folder}/{file.name}", file, model.directory / folder / file.name) for file in files]
    for name, ours, theirs in pairs:
        if (keys := _keys(ours, theirs)) is not None:
            found.append(f"{name} ({', '.join([*keys[:_SHOWN], *['...'] * (len(keys) > _SHOWN)])})" if keys else name)
    if not found:
        return None
    return f"it differs from {base.reference} in {', '.join(found)}; the result has what {base.reference} has"


def _keys(ours: Path, theirs: Path) -> list[str] | None:
    """The keys that two files give other values; [] where only the model has the file, None where nothing differs."""
    if not theirs.is_file():
        return None
    if not ours.is_file():
        return []
    try:
        one, other = (read_json(file, dict[str, Any]) for file in (ours, theirs))
    except (OSError, ValueError):
        return None
    keys = [key for key in {**one, **other} if not key.startswith("_") and key not in _SILENT]
    return [key for key in keys if one.get(key) != other.get(key)] or None


def _templates(ours: Path, theirs: Path) -> Iterator[str]:
    one, other = _template(ours), _template(theirs)
    if other is not None and one != other:
        yield "chat template (chat_template: auto takes the usual one)"


def _template(directory: Path) -> Any:
    try:
        if (directory / "chat_template.jinja").is_file():
            return read_bytes(directory / "chat_template.jinja").decode(errors="replace").strip()
        template = read_json(directory / "tokenizer_config.json", dict[str, Any]).get("chat_template")
    except (OSError, ValueError):
        return None
    return template.strip() if isinstance(template, str) else template
