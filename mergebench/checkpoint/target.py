"""Where a result may go: what lies there already, whether it is an input, whether there is room.

A result is built beside its target and renamed to it. A mounted volume cannot be replaced by a rename; there it is
built inside, in `.partial`, and moved out file by file (`staging.py`).
"""

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
JOURNAL = ".journal.json"  # of an unfinished result
STAGES = ".stages"  # in a directory that no rename replaces: results that a recipe's later stages need
# in such a directory: what is ours and not the result, and what a new disk comes with
_INSIDE = {STAGES, ".partial", ".old", ".scratch.partial", "lost+found"}
_KINDS: dict[str, type | tuple[type, ...]] = {  # of what the provenance holds, where it holds it
    "mergebench": str, "command": str, "fingerprint": str, "recipe": dict, "method": dict, "versions": dict,
    "answers": dict, "kept": dict, "lines": dict, "tasks": dict, "stages": dict, "notes": list, "folders": list,
    "inputs": list, "edits": list, "seconds": (int, float), "peak_memory": int,
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
    """Refuse an output that is an input (or holds one, or lies in one), or that is not empty."""
    target = target_of(out)
    fixed = stays(target)
    other = f"choose a directory in it: --out {out / 'NAME'}" if fixed else "choose another --out"
    old = beside(target, "old")
    written = {target, beside(target, "partial"), old}
    for place in inputs:
        directory = place.resolve()
        if fixed and target / STAGES in directory.parents:
            continue
        if not written.isdisjoint([directory, *directory.parents]) or directory in target.parents:
            raise RecipeError(f"{out}: it overlaps the input {place}", other)
    try:
        if not out.exists():
            return
        if not out.is_dir():
            raise RecipeError(f"{out}: it exists and is not a directory", "choose another --out")
        half = moving(partial(target))  # then what was there before lies in `old`
        empty = not contents(target) and not half
    except OSError as error:
        raise write_error(out, error) from None
    if not empty:
        if is_foreign(old) and overwrite:
            raise RecipeError(f"{old}: it exists and mergebench did not make it", "move it away, or choose another")
        if finished(old if half else out) is None:
            if half:
                return
            raise RecipeError(f"{out}: it exists and mergebench did not make it", other)
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
    place = partial(target_of(out))
    free = shutil.disk_usage(next(folder for folder in place.parents if folder.exists())).free
    held = size_on_disk(place)
    if free + held < needed:
        need, have = needed / 1e9, (free + held) / 1e9
        raise RunError(f"{out}: the result needs {need:.2f} GB, the disk has {have:.2f} GB", "choose another --out")


def size_on_disk(folder: Path) -> int:
    """The bytes that the files in a folder take."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*")) if folder.is_dir() else 0


def stays(target: Path) -> bool:
    """Whether a directory cannot be replaced by a rename: it is a mount point, or its parent may not be written."""
    if not target.is_dir():
        return False
    return _is_mount(target) or not os.access(target.parent, os.W_OK)


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


def contents(target: Path) -> list[Path]:
    """What lies in a directory apart from what we keep there while we work; the file that marks a result comes
    last, after the configs, without which nothing loads it."""
    found = [path for path in target.iterdir() if path.name not in (_INSIDE if stays(target) else ())]
    return sorted(found, key=lambda path: (path.name == PROVENANCE, path.name.endswith("config.json"), path.name))


def beside(target: Path, what: str) -> Path:
    """The hidden directory for `what` (`partial`, `old`): next to the target, or in it where that stays."""
    return target / f".{what}" if stays(target) else target.with_name(f".{target.name}.{what}")


def partial(target: Path) -> Path:
    """Where a result is built; target: its path without links."""
    return beside(target, "partial")


def moving(place: Path) -> list[str]:
    """The names of a complete result that a killed run was moving out of `place`; empty if it was not moving one."""
    if not (place / PROVENANCE).is_file():  # it goes last
        return []
    try:
        names = read_json(place / JOURNAL, dict[str, Any]).get("moving", [])
    except (OSError, ValueError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def is_foreign(old: Path) -> bool:
    """Whether a directory in the place of a replaced result is something else, which must not be deleted."""
    if old.is_symlink() or not old.is_dir():
        return old.is_symlink() or old.exists()
    return finished(old) is None and any(old.iterdir())
