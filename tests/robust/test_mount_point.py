"""A volume mounted where the result should lie: refused before anything is read, for no rename could publish it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from models import fine_tuned, names, tiny_tensors, write_model, write_recipe

from tests.conftest import Cli

MOUNTED = next((place for place in ("/dev/shm", "/proc", "/dev") if os.path.ismount(place)), None)
Mount = Callable[..., Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts what the arguments of `mount` say at tmp_path/NAME."""
    places: list[Path] = []

    def run(name: str, *args: str) -> Path:
        place = tmp_path / name
        place.mkdir()
        if os.geteuid() != 0 or subprocess.run(["mount", *args, place], capture_output=True).returncode:
            pytest.skip("only root may mount")
        places.append(place)
        return place

    yield run
    for place in places:
        subprocess.run(["umount", place], check=True)


def recipe_in(folder: Path) -> Path:
    base = tiny_tensors()
    write_model(folder / "base", base)
    write_model(folder / "ft", fine_tuned(base, 1))
    return write_recipe(folder / "recipe.yaml", "task_arithmetic", [folder / "ft"], folder / "base")


@pytest.mark.parametrize("how", [(), ("--resume",), ("--overwrite",)])
def test_a_volume(tmp_path: Path, cli: Cli, mount: Mount, how: tuple[str, ...]) -> None:
    """`docker run -v data:/out ... --out /out`: an empty disk of its own."""
    recipe = recipe_in(tmp_path)
    out = mount("vol", "-t", "tmpfs", "tmpfs")
    before = names(tmp_path)
    error = f"error: {out}: it is a mount point\nhint: choose a directory in it: --out {out}/NAME\n"
    assert cli("merge", recipe, "-q", "--out", out, *how) == (2, "", error)
    assert (names(tmp_path), names(out)) == (before, [])
    assert cli("merge", recipe, "-q", "--out", out / "NAME", *how) == (0, f"{out}/NAME\n", "")


def test_a_folder_of_the_same_disk(tmp_path: Path, cli: Cli, mount: Mount) -> None:
    """Two volumes of one disk, one in the other: `os.path.ismount` does not see the inner one."""
    recipe = recipe_in(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    out = mount("a b\\c", "--bind", str(tmp_path / "elsewhere"))
    (tmp_path / "link").symlink_to(out)
    assert not os.path.ismount(out)
    for way in (out, tmp_path / "link"):
        code, _, err = cli("merge", recipe, "-q", "--out", way)
        assert (code, err.splitlines()[0]) == (2, f"error: {way}: it is a mount point")
    assert names(out) == []


@pytest.mark.skipif(MOUNTED is None, reason="nothing is mounted in the usual places")
def test_one_that_every_machine_has(tmp_path: Path, cli: Cli) -> None:
    recipe = recipe_in(tmp_path)
    with open(tmp_path / "ft" / "model.safetensors", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\xc0\x7f")  # NaN: who reads the tensors stops there
    assert cli("merge", recipe, "-q", "--out", tmp_path / "out").code == 1
    code, out, err = cli("merge", recipe, "-q", "--out", MOUNTED)
    assert (code, out, err.splitlines()[0]) == (2, "", f"error: {MOUNTED}: it is a mount point")
    assert not Path(MOUNTED).with_name(f".{Path(MOUNTED).name}.partial").exists()
