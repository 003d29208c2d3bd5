"""Check the installation: Python, torch and its devices, libraries, extras, plug-ins, room on the disks."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path
from typing import NamedTuple

from mergebench import __version__
from mergebench.engine.machine import available_memory, cores
from mergebench.errors import first_line, human
from mergebench.plugins import install_command

OK, MISSING, BROKEN = "ok", "missing", "broken"
LIBRARIES = ("torch", "transformers", "safetensors", "huggingface_hub", "numpy", "scipy")
EXTRAS = {"probe": "probes", "eval": "LM tasks and images", "train": "training with PEFT"}
LITTLE = 1 << 30  # bytes free on a disk that are too few for most models


class Part(NamedTuple):
    """One part of the installation: `ok`, `missing` (an extra that is not there) or `broken`."""

    name: str
    mark: str
    found: str
    hint: str | None = None


def examine_installation() -> list[Part]:
    """Every part; nothing is merged, and nothing is asked of the network."""
    parts = [Part("mergebench", OK, f"{__version__}, Python {platform.python_version()}, {Path(__file__).parents[1]}")]
    return [*parts, *_libraries(), _devices(), *_extras(), *_plugins(), *_disks()]


def _libraries() -> Iterator[Part]:
    wanted = _required(None)
    for name in LIBRARIES:
        found, fits = _version(name), wanted.get(name, "")
        if found is None:
            yield Part(name, BROKEN, "not installed", f"pip install '{name}{fits}'")
        elif not _fits(found, fits):
            yield Part(name, BROKEN, f"{found}, wanted {fits}", f"pip install '{name}{fits}'")
        else:
            yield Part(name, OK, found)


def _devices() -> Part:
    try:
        import torch

        cuda = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        names = [f"{one.name}, {human(one.total_memory)}" for one in cuda]
    except Exception as error:  # a driver that does not fit, a library that is not found
        return Part("devices", BROKEN, f"torch: {type(error).__name__}: {first_line(error)}", "install torch again")
    memory = available_memory()
    room = "" if memory is None else f", {human(memory)} of memory free"
    return Part("devices", OK, "; ".join([f"cpu, {cores()} cores{room}", *(names or ["no CUDA device"])]))


def _extras() -> Iterator[Part]:
    for extra, what in EXTRAS.items():
        lacking = [name for name in _required(extra) if _version(name) is None]
        name, hint = f"[{extra}]", install_command(extra)
        yield Part(name, MISSING, f"{what}: no {', '.join(lacking)}", hint) if lacking else Part(name, OK, what)


def _plugins() -> Iterator[Part]:
    groups = sorted(group for group in entry_points().groups if group.startswith("mergebench."))
    points = [point for group in groups for point in entry_points(group=group)]
    if os.environ.get("MERGEBENCH_PLUGINS") == "":
        yield Part("plug-ins", OK, f"{len(points)} installed, off by MERGEBENCH_PLUGINS")
        return
    if not points:
        yield Part("plug-ins", OK, "none installed")
    for point in points:
        what = f"{point.group.removeprefix('mergebench.')}, of {point.dist.name if point.dist else point.value}"
        try:
            point.load()
        except (Exception, SystemExit) as error:  # another package's code may raise anything when it is imported
            yield Part(point.name, BROKEN, f"{what}: {type(error).__name__}: {first_line(error)}", "see its package")
        else:
            yield Part(point.name, OK, what)


def _disks() -> Iterator[Part]:
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub"
    places = {
        "working directory": Path(),
        "hub cache": Path(os.path.expanduser(hub)),  # noqa: PTH111 - as the hub does, for a user without a home too
        "temporary": Path(tempfile.gettempdir()),
    }
    for name, path in places.items():
        there = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
        free = shutil.disk_usage(there).free
        hint = "little: most models need more" if free < LITTLE else None
        if "~" in path.parts:
            hint = "this user has no home: set HF_HOME"
        yield Part(name, OK, f"{human(free)} free, {path.absolute()}", hint)


def _required(extra: str | None) -> dict[str, str]:
    """The packages that mergebench (or an extra of it) asks for, and their versions as written."""
    try:
        lines = requires("mergebench") or []
    except PackageNotFoundError:  # it runs from its folder
        lines = []
    found: dict[str, str] = {}
    for line in lines:
        name, inner, fits, marker = _LINE.fullmatch(line).groups()  # type: ignore[union-attr]
        of = re.search(r"extra == ['\"](\w+)['\"]", marker or "")
        if (of and of[1]) != extra:
            continue
        if name == "mergebench":
            for one in inner.split(","):
                found |= _required(one)
        else:
            found[name] = fits
    return found


_LINE = re.compile(r"([\w.-]+)(?:\[([\w,]+)\])?\s*([^;]*?)\s*(?:;(.*))?")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _fits(found: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet  # comes with huggingface_hub

    return SpecifierSet(wanted).contains(found, prereleases=True)
