"""Where a result comes from, in the hub's terms: ids of the models it was made of, their licences, its pipeline."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from mergebench.checkpoint.documents import read_bytes, read_json
from mergebench.checkpoint.naming import MODULES, components, encoder_folder
from mergebench.checkpoint.reference import reference_of

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENCE = re.compile(r"^license:[ \t]*['\"]?([A-Za-z0-9][\w.+-]*)['\"]?[ \t]*")
_CACHED = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]+)/(.+)$")  # in the hub's cache
_PIPELINES = {  # by the end of the architecture's name
    "ForCausalLM": "text-generation", "LMHeadModel": "text-generation", "ForSequenceClassification":
    "text-classification", "ForTokenClassification": "token-classification", "ForQuestionAnswering":
    "question-answering", "ForMaskedLM": "fill-mask", "ForImageClassification": "image-classification",
    "ForConditionalGeneration": "text2text-generation", "ForObjectDetection": "object-detection",
    "ForSemanticSegmentation": "image-segmentation",
}  # fmt: skip


class Parent(NamedTuple):
    """A model or delta that a result was made of. id: on the hub; None if it lies only here."""

    name: str
    id: str | None
    licence: str | None


def parents(references: Iterable[object], folders: Sequence[Path] = ()) -> list[Parent]:
    """Each part of these references (`A+B` has two) once. Looked up are files here alone, never the hub."""
    names = dict.fromkeys(part for one in references if one for part in str(one).split("+") if part)
    return [_parent(name, folders) for name in names]


def place_of(name: str, folders: Sequence[Path] = ()) -> Path | None:
    """Where a name is a path, as references are looked up."""
    with suppress(OSError, RuntimeError, ValueError):
        path = Path(name).expanduser() if name.startswith("~") else Path(name)
        return next((place for place in (path, *(folder / path for folder in folders)) if place.exists()), None)
    return None


def as_from(reference: object, out: Path) -> str:
    """A reference without absolute paths of this machine: they are as from the result, or by id in the hub's cache."""
    here = os.path.realpath(out)

    def told(part: str) -> str:
        found = reference_of(Path(part)) if Path(part).is_absolute() else part
        return os.path.relpath(found, here) if Path(found).is_absolute() else found

    return "+".join(map(told, str(reference).split("+")))


def portable(provenance: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The provenance with its input files named so that they tell nothing of this machine: those of the hub by id and
    revision, others as from the result."""
    if not provenance.get("inputs"):
        return dict(provenance)

    def named(file: str) -> str:
        cached = _CACHED.search(file)
        return f"{cached[1].replace('--', '/', 1)}@{cached[2]}/{cached[3]}" if cached else as_from(file, out)

    inputs = [{**one, "file": named(one["file"])} if "file" in one else one for one in provenance["inputs"]]
    given = [dict(one) for one in provenance.get("statistics", ())]
    for one in given:
        one["data"] = {key: named(text) if key == "file" else text for key, text in one["data"].items()}
        settings = one.get("settings", {})
        one["settings"] = {**settings, **({"head": named(settings["head"])} if "head" in settings else {})}
    return {**provenance, "inputs": inputs, **({"statistics": given} if given else {})}


def _parent(name: str, folders: Sequence[Path]) -> Parent:
    place = place_of(name, folders)
    if place is not None:
        directory = place if place.is_dir() else place.parent
        return Parent(name, _cached_id(directory), _licence(directory / "README.md"))
    known, _, revision = name.partition("@")
    if not _ID.fullmatch(known):
        return Parent(name, None, None)
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(known, "README.md", revision=revision or None)
    return Parent(name, known, _licence(Path(file)) if isinstance(file, str) else None)


def _cached_id(directory: Path) -> str | None:
    """The hub's id of a snapshot in its cache.

    What a config names (`_name_or_path`) is not the checkpoint's own id, but what it was made from.
    """
    path = os.path.realpath(directory)
    reference = reference_of(Path(path))
    return None if reference == path else "/".join(reference.partition("@")[0].split("/")[:2])


def front_matter(card: Path) -> tuple[list[str], list[str]]:
    """The lines of a card that the hub reads, between its first two rules, and the lines after them."""
    lines = read_bytes(card).decode("utf-8-sig", errors="replace").splitlines()
    if lines[:1] == ["---"] and "---" in lines[1:]:
        end = lines.index("---", 1)
        return lines[1:end], lines[end + 1 :]
    return [], lines


def _licence(card: Path) -> str | None:
    """What the front matter of a card says."""
    with suppress(OSError):
        found = next(filter(None, map(_LICENCE.fullmatch, front_matter(card)[0])), None)
        return None if found is None or found[1] == "other" else found[1]
    return None


def library_of(directory: Path) -> str:
    """The hub's name of the library that loads the model that lies here."""
    if (directory / MODULES).is_file():
        return "sentence-transformers"
    with suppress(OSError, ValueError):
        if components(directory) or "_class_name" in read_json(directory / "config.json", dict[str, Any]):
            return "diffusers"
    return "transformers"


def pipeline_of(directory: Path) -> str | None:
    """The hub's task of the model whose config lies here."""
    with suppress(OSError, ValueError):
        config = read_json(directory / encoder_folder(directory) / "config.json", Any)
        name = str((config.get("architectures") or [""])[0])
        known = next((task for end, task in _PIPELINES.items() if name.endswith(end)), None)
        return known or ("feature-extraction" if name.endswith("Model") else None)
    return None
