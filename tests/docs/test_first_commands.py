"""What a newcomer types first: every command is on the PATH by then, and every extra named is one."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from mergebench import plugins
from mergebench.errors import RecipeError

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*/README.md")]
ACTIVATE = "source .venv/bin/activate"


def commands(page: Path) -> list[list[str]]:
    """The indented blocks of a page, each line without its comment."""
    lines = page.read_text(encoding="utf-8").splitlines()
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.startswith("    "):
            blocks[-1].append(re.sub(r"\s+# .*", "", line).strip())
        elif blocks[-1]:
            blocks.append([])
    return [block for block in blocks if block]


def requirements(name: str) -> set[str]:
    """The libraries that an extra brings, with those of the extras in it."""
    inner = [re.fullmatch(r"mergebench\[(\w+)\]", each) for each in EXTRAS[name]]
    plain = {re.match(r"[\w-]+", each)[0] for each, within in zip(EXTRAS[name], inner, strict=True) if not within}
    return plain.union(*(requirements(within[1]) for within in inner if within))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    for block in commands(page):
        for at, command in enumerate(block):
            if command.startswith("python recipes/"):
                assert ACTIVATE in block[:at]
                assert any(re.fullmatch(r"pip install -e '\.\[\w+\]'.*", line) for line in block[:at])
    text = page.read_text(encoding="utf-8")
    assert "mergebench[" not in text  # from a clone no index is asked
    assert set(re.findall(r"\.\[(\w+)\]", text)) <= EXTRAS.keys()


def test_the_readme_activates_before_its_first_command() -> None:
    first = [command for block in commands(ROOT / "README.md") for command in block]
    assert first[:2] == ["make quickstart", ACTIVATE]
    assert next(command for command in first if command.startswith("mergebench")).split()[1] == "plan"
    for path in re.findall(r"recipes/[\w/]+\.yaml", " ".join(first)):
        assert (ROOT / path).is_file()


def test_the_quickstart_ends_with_the_next_step() -> None:
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    command = ["make", "--no-print-directory", "-n", "quickstart", "VENV=else where"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    last = subprocess.run(["sh", "-c", done.stdout.splitlines()[-1]], capture_output=True, text=True, check=True)
    says = "next:\n    source 'else where/bin/activate'\n    mergebench report merged/quickstart --open\n"
    assert last.stdout == says


def test_fetching_ends_with_the_next_step(tmp_path: Path) -> None:
    """What is typed where the user is, whether mergebench is on the PATH or not; nothing under make, which says it."""
    for name in ("base", "data"):
        (tmp_path / "smollm2" / "cache" / name).mkdir(parents=True)
    for name in ("fetching.py", "smollm2/fetch.py"):
        shutil.copyfile(ROOT / "recipes" / name, tmp_path / name)

    def lines(cwd: Path, **more: str) -> list[str]:
        environment = {"PATH": "/usr/bin:/bin", **more}
        command = [sys.executable, str(tmp_path / "smollm2" / "fetch.py")]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[1:]

    tool = tmp_path / "bin" / "mergebench"
    tool.parent.mkdir()
    tool.touch(mode=0o755)
    evaluate = "    mergebench eval recipes/smollm2/suite.yaml recipes/smollm2/cache/base "
    evaluate += "recipes/smollm2/cache/base+recipes/smollm2/news"
    activate = Path(sys.prefix, "bin", "activate")
    source = [f"    source {shlex.quote(str(activate))}"] if activate.is_file() else []
    assert lines(tmp_path.parent) == ["next:", *source, evaluate]
    assert lines(tmp_path, PATH=f"{tool.parent}:/usr/bin") == ["next:", f"    cd {tmp_path.parent}", evaluate]
    assert lines(tmp_path, MAKELEVEL="1") == []


@pytest.mark.parametrize("script", sorted((ROOT / "recipes").glob("*/fetch*.py")), ids=lambda path: path.parent.name)
def test_every_fetch_script_begins_and_ends_alike(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert re.search(r"^    run\(.*main", text, re.MULTILINE) and "KeyboardInterrupt" not in text
    assert "ModuleNotFoundError" not in text and "find_spec" not in text
    for path in re.findall(r"(?:recipes|benchmarks)/[\w/]+\.yaml", text):
        assert (ROOT / path).is_file(), path


def test_the_image_of_the_docs_is_of_this_version() -> None:
    page = (ROOT / "docs" / "containers.md").read_text(encoding="utf-8")
    torch = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert torch is not None and torch[0] in page
    assert set(re.findall(r"'/src\[(\w+)\]'", page)) <= EXTRAS.keys()
    for line in re.findall(r"^COPY (.*) \S+$", page, re.MULTILINE):
        assert all((ROOT / path).exists() for path in line.split())


@pytest.mark.parametrize("library", sorted(requirements("eval")))
def test_a_hint_names_the_smallest_extra(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(library: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(plugins, "version", absent)
    with pytest.raises(RecipeError) as error:
        plugins.need(library, "tests")
    (name,) = set(re.findall(r"\[(\w+)\]", error.value.hint))
    having = [each for each in EXTRAS if library in requirements(each)]
    assert name == min(having, key=lambda each: len(requirements(each)))


def in_a_copy(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run recipes/smollm2/fetch.py of a copy that has no cache, with this Python's own modules alone."""
    for name in ("fetching.py", "smollm2/fetch.py", "smollm2/requirements.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / "recipes" / name, folder / name)
    command = [sys.executable, "-I", "-S", str(folder / "smollm2" / "fetch.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_what_fetching_needs_is_asked_before_the_download(tmp_path: Path) -> None:
    done = in_a_copy(tmp_path)
    says = "fetch.py: torch, transformers, accelerate not installed: pip install -e "
    says += f"'{tmp_path.parent}[eval]'\n"  # typed elsewhere
    assert (done.returncode, done.stdout, done.stderr) == (1, "", says)
    assert not (tmp_path / "smollm2" / "cache").exists()


def test_what_is_there_is_not_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "recipes")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    import fetching

    content = {name: f"the files of {name}".encode() for name in ("one", "two")}
    lines = [f"{name}==1.0 --hash=sha256:{hashlib.sha256(text).hexdigest()}\n" for name, text in content.items()]
    (tmp_path / "requirements.txt").write_text("# a comment\n" + "".join(lines))
    packages = tmp_path / "packages"
    packages.mkdir()

    def download() -> Any:
        return fetching.download(tmp_path / "requirements.txt", packages)

    (packages / "one-1.0-py3-none-any.whl").write_bytes(content["one"])
    with pytest.raises(SystemExit, match="download failed"):
        download()
    (packages / "two-1.0-py3-none-any.whl").write_bytes(content["one"])
    with pytest.raises(SystemExit, match="download failed"):
        download()
    (packages / "two-1.0-py3-none-any.whl").write_bytes(content["two"])
    download()
