"""An adapter for the new base: the same parameters, checked against the new base."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from mergebench import __version__
from mergebench.adapters import cards
from mergebench.checkpoint import Model
from mergebench.checkpoint.content import identity
from mergebench.checkpoint.documents import document, parse_json
from mergebench.checkpoint.files import Files, copy_file, whole, write_atomically
from mergebench.checkpoint.mismatch import few
from mergebench.checkpoint.reference import locate_delta, reference_of
from mergebench.checkpoint.shards import OutTensor, Shard, write_shard
from mergebench.checkpoint.side_files import check_link
from mergebench.checkpoint.staging import Staging
from mergebench.checkpoint.target import PROVENANCE, check_target
from mergebench.deltas.formats.native import METADATA, is_delta_file, read_file
from mergebench.deltas.open import open_model
from mergebench.deltas.peft.directory import CONFIG, is_adapter
from mergebench.engine.run import Result
from mergebench.errors import ModelError
from mergebench.systems.portllm.opened import Opened, open_port

_OURS = {PROVENANCE, "README.md"}  # what a result of ours has of its own


def port_adapter(old: str, new: str, patch: str | Path, out: Path, *, overwrite: bool = False) -> Result:
    """Write an adapter made on `old` as one for `new`: a PEFT directory's files byte for byte but for the base's name;
    of a delta file the deltas, and the new base's identity.

    Raises `ModelError` if the adapter does not fit one of the bases.
    """
    started, patch = time.perf_counter(), locate_delta(patch)
    opened = open_port(old, new, patch)
    on_new = _on_new(new, patch)
    if not is_delta_file(patch) and not is_adapter(patch):
        raise ModelError(f"{patch}: it names no base that could change", f"use it as it is: {new}+{patch}")
    check_target(out, [place for place in (patch, opened.new.directory, opened.old.directory) if place], overwrite)
    with Staging(out, "", resume=False) as staging:
        if is_adapter(patch):
            lost = _copy_directory(patch, staging.directory, new)
        else:
            lost = _copy_file(patch, staging.directory, opened.new)
        identities = {"old": identity(opened.old), "new": identity(opened.new)}
        provenance: dict[str, Any] = {
            "mergebench": __version__,
            "command": "port",
            "adapter": reference_of(patch),
            "old": old,
            "new": new,
            "identities": identities,
            "notes": [*opened.notes, *notes_of(opened), *_moved(identities), *lost],
            "tensors": len(on_new.deltas),
        }
        readme = cards.ported_card(out, provenance)
        provenance = staging.finish(provenance, started, overwrite, readme)
    return Result(out, provenance)


def _on_new(new: str, patch: Path) -> Model:
    try:
        return open_model(f"{new}+{patch}")
    except ModelError as error:
        hint = f"{error.hint}; " * bool(error.hint)
        raise ModelError(
            error.message, f"{hint}the adapter does not fit the new base: --check says what differs"
        ) from None


def notes_of(opened: Opened) -> list[str]:
    """What a port of an adapter's parameters means where they are not a difference."""
    saved = [name for name in opened.patched if any(delta.replacement for delta in opened.added(name))]
    kinds = {
        delta.kind: None
        for name in opened.patched
        for delta in opened.added(name)
        if delta.needs_base and delta.replacement is None
    }
    notes = []
    if kinds:
        what = "is a function of the base's weights: its parameters are ported, so what it adds changes with the base"
        notes.append(f"{', '.join(kinds)} {what}; --difference adds what it added to the old base")
    if saved:
        tensors = f"{len(saved)} tensor{'s' * (len(saved) > 1)} saved whole ({few(saved)})"
        notes.append(f"{tensors} replace the new base's, with its update of them; --difference keeps that update")
    return notes


def _moved(identities: dict[str, str]) -> list[str]:
    same = identities["old"] == identities["new"]
    return [f"made on {identities['old']}, now for {identities['new']}" if not same else "the two bases are equal"]


def _copy_directory(patch: Path, place: Path, new: str) -> list[str]:
    """The files of a PEFT directory, a head beside it too; the config with the new base's name."""
    for file in sorted(patch.iterdir()):
        if file.is_file() and file.name not in {*_OURS, CONFIG}:
            check_link(file, patch, patch.glob("*.safetensors"))
            copy_file(file, place / file.name)
    config = document(patch / CONFIG) | {"base_model_name_or_path": new}
    config |= {"revision": None} if "revision" in config else {}  # the old base's
    write_atomically(place / CONFIG, json.dumps(config, indent=2) + "\n")
    return []


def _copy_file(patch: Path, place: Path, new: Model) -> list[str]:
    """The deltas of a file with the new base's identity; a note if what they changed in the old base is left out."""
    read = read_file(patch)
    if METADATA not in read.header.metadata:
        raise ModelError(
            f"{patch}: a patch of an earlier version has no identity to change", f"use it: {new.reference}+{patch}"
        )
    about = parse_json(read.header.metadata[METADATA]) | {"base": identity(new)}
    dropped = {entry.orig.name for entry in read.entries.values() if entry.orig is not None}
    kept = [info for info in read.header.tensors if info.name not in dropped]
    tensors = tuple(OutTensor(info.name, info.dtype, info.shape, info.nbytes) for info in kept)
    shard = Shard(patch.name, tensors, {METADATA: json.dumps(about)})
    stored = {info.name: info for info in kept}
    with Files() as files:
        write_shard(place, shard, lambda name: whole(files, stored[name]))
    return ["the old base's values are left out: the ported patch cannot be reverted exactly"] if dropped else []
