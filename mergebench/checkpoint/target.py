"""Where a result may go: what lies there already, whether it is an input, whether there is room."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mergebench.checkpoint.documents import fault_of, read_json
from mergebench.checkpoint.files import write_error
from mergebench.errors import RecipeError, RunError

PROVENANCE = "mergebench.json"
_KINDS: dict[str, type | tuple[type, ...]] = {  # of what the provenance holds, where it holds it
    "mergebench": str, "command": str, "fingerprint": str, "recipe": dict, "method": dict, "versions": dict,
    "answers": dict, "kept": dict, "lines": dict, "tasks": dict, "stages": dict, "notes": list, "inputs": list,
    "edits": list, "seconds": (int, float), "peak_memory": int,
}  # fmt: skip


def finished(out: Path) -> dict[str, Any] | None:
    """The provenance of a finished result at `out`, or None."""
    try:
        found = read_json(out / PROVENANCE, Any)
    except (OSError, ValueError):
        return None
    return found if is_provenance(found) else None


def is_provenance(found: object) -> bool:
    """Whether a document is what mergebench writes beside a result, as far as programs rely on it."""
    if not isinstance(found, dict):
        return False
    if not all(isinstance(found[name], kind) for name, kind in _KINDS.items() if name in found):
        return False
    models, edits, inputs = found.get("recipe", {}).get("models") or [], found.get("edits", []), found.get("inputs", [])
    listed = isinstance(models, list) and all(isinstance(one, dict) for one in [*models, *edits, *inputs])
    return listed and all(isinstance(edit.get("patch"), str) for edit in edits)


def check_target(out: Path, inputs: Iterable[Path], overwrite: bool) -> None:
    """Refuse an output that is an input (or holds one, or lies in one), is a mount point, or is not empty."""
    target = target_of(out)
    written = {target, beside(target, "partial"), beside(target, "old")}
    for place in inputs:
        directory = place.resolve()
        if not written.isdisjoint([directory, *directory.parents]) or directory in target.parents:
            raise RecipeError(f"{out}: it is, holds or lies in the input {place}", "choose another --out")
    if _is_mount(target):  # the partial directory would lie on another disk, and no rename replaces a mount point
        raise RecipeError(f"{out}: it is a mount point", f"choose a directory in it: --out {out / 'NAME'}")
    try:
        if not out.exists():
            return
        if not out.is_dir():
            raise RecipeError(f"{out}: it exists and is not a directory", "choose another --out")
        empty = not any(out.iterdir())
    except OSError as error:
        raise write_error(out, error) from None
    if not empty:
        if is_foreign(old := beside(target, "old")) and overwrite:
            raise RecipeError(f"{old}: it exists and mergebench did not make it", "move it away, or choose another")
        if finished(out) is None:
            raise RecipeError(f"{out}: it exists and mergebench did not make it", "choose another --out")
        if not overwrite:
            raise RecipeError(
                f"{out}: it holds a finished result", "replace it with --overwrite, or choose another --out"
            )


def check_file(out: Path, inputs: Iterable[Path], overwrite: bool, what: str, hint: str) -> None:
    """The same for an output that is one .safetensors file; what, hint: what it is, for messages."""
    if out.suffix != ".safetensors":
        raise RecipeError(f"--out: '{out}' is no place for {what}", hint)
    target = target_of(out)
    for place in inputs:
        if place.resolve() in (target, *target.parents):
            what = "is an input" if place.resolve() == target else f"lies in an input, {place}"
            raise RecipeError(f"{out}: it {what}", "choose another --out")
    if out.is_dir() or (out.exists() and not overwrite):
        raise RecipeError(f"{out}: it exists", "replace it with --overwrite, or choose another --out")


def target_of(out: Path) -> Path:
    """Where an output really lies; `RecipeError` for a path that no file can have."""
    fault = fault_of(out) or fault_of(target := Path(os.path.realpath(out)))
    if fault is not None:
        raise RecipeError(f"{out}: {fault}", "choose another --out")
    return target


def check_room(out: Path, needed: int) -> None:
    """Refuse to start if `needed` bytes do not fit; leftovers of an interrupted run are deleted or reused."""
    target = target_of(out)
    free = shutil.disk_usage(next(folder for folder in target.parents if folder.exists())).free
    partial = beside(target, "partial")
    held = sum(path.stat().st_blocks * 512 for path in partial.rglob("*")) if partial.is_dir() else 0
    if free + held < needed:
        need, have = needed / 1e9, (free + held) / 1e9
        raise RunError(f"{out}: the result needs {need:.2f} GB, the disk has {have:.2f} GB", "choose another --out")


def _is_mount(target: Path) -> bool:
    """Whether the target is a mount point; `ismount` misses bind mounts of the same disk, which Linux lists."""
    if os.path.ismount(target):
        return True
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    place = os.fsencode(target)
    for letter in b"\\ \t\n":  # the backslash first
        place = place.replace(bytes([letter]), b"\\%03o" % letter)
    return any(line.split(b" ")[4] == place for line in mounts)


def beside(target: Path, what: str) -> Path:
    """The hidden directory for `what` (`partial`, `old`), next to the target."""
    return target.with_name(f".{target.name}.{what}") if target.name else target


def partial(target: Path) -> Path:
    """Where a result is built; target: its path without links."""
    return beside(target, "partial")


def is_foreign(old: Path) -> bool:
    """Whether a directory in the place of a replaced result is something else, which must not be deleted."""
    if old.is_symlink() or not old.is_dir():
        return old.is_symlink() or old.exists()
    return finished(old) is None and any(old.iterdir())
