"""`mergebench doctor install`: what is there, what an extra lacks, and what is broken."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from mergebench.cli import installation
from mergebench.plugins import install_command
from tests.conftest import Cli


def parts(cli: Cli, code: int = 0) -> dict[str, dict[str, str]]:
    ran = cli("doctor", "install", "--json")
    assert (ran.code, ran.err) == (code, "")
    found = json.loads(ran.out)
    assert found.keys() == {"ok", "installation"} and found["ok"] == (code == 0)
    return {part["name"]: part for part in found["installation"]}


def test_this_installation(cli: Cli) -> None:
    found = parts(cli)
    for name in ("torch", "transformers", "safetensors"):
        assert (found[name]["mark"], found[name]["found"]) == ("ok", version(name))
    assert found["devices"]["found"].startswith("cpu, ") and "GB free" in found["working directory"]["found"]
    out = cli("doctor", "install").out
    assert out.splitlines()[0].strip() == "installation" and "one model" not in out


def test_an_extra_that_is_missing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no fault; the command that brings it is said."""
    known = installation._version
    monkeypatch.setattr(installation, "_version", lambda name: None if name == "peft" else known(name))
    monkeypatch.setattr(installation, "_required", lambda extra: {"peft": ">=0.21"} if extra == "train" else {})
    train = parts(cli)["[train]"]
    assert (train["mark"], train["found"]) == ("missing", "training with PEFT: no peft")
    assert train["hint"] == install_command("train")
    assert f"[train]: {install_command('train')}" in cli("doctor", "install").out


def test_a_user_without_a_home(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container: of a user id that has no name."""
    for name in ("HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 54321)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert parts(cli)["hub cache"]["hint"] == "this user has no home: set HF_HOME"
    code, _, err = cli("methods", "~/my.py:f")
    assert code == 2 and err.startswith("error: ~/my.py: no such file\n")


@pytest.mark.parametrize(
    ("wanted", "found", "hint"),
    [
        ({"torch": ">=99"}, f"{version('torch')}, wanted >=99", "pip install 'torch>=99'"),
        ({"scipy": "<1"}, f"{version('scipy')}, wanted <1", "pip install 'scipy<1'"),
    ],
)
def test_a_version_that_does_not_fit(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, str], found: str, hint: str
) -> None:
    monkeypatch.setattr(installation, "_required", lambda extra: {} if extra else wanted)
    (name,) = wanted
    part = parts(cli, code=1)[name]
    assert (part["mark"], part["found"], part["hint"]) == ("broken", found, hint)


def test_what_a_package_asks_for() -> None:
    """As pyproject.toml has it, extras within extras too."""
    assert installation._required(None)["torch"] == ">=2.8"
    assert "torch" not in installation._required("eval")
    assert {"scikit-learn", "lm-eval", "pillow"} <= installation._required("eval").keys()


def test_a_plug_in_that_does_not_load(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "other_merges-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: other-merges\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[mergebench.edits]\nother = other_merges:other\n")
    (tmp_path / "other_merges.py").write_text("import nothing_of_that_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("MERGEBENCH_PLUGINS", raising=False)
    broken = parts(cli, code=1)["other"]
    assert broken["mark"] == "broken"
    assert broken["found"].startswith("edits, of other-merges: ModuleNotFoundError: No module named 'nothing_of")
    monkeypatch.setenv("MERGEBENCH_PLUGINS", "")
    assert parts(cli)["plug-ins"]["found"] == "1 installed, off by MERGEBENCH_PLUGINS"
    sys.modules.pop("other_merges", None)


def test_torch_that_cannot_be_imported(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    broken = parts(cli, code=1)["devices"]
    assert broken["found"].startswith("torch: ModuleNotFoundError") and broken["hint"] == "install torch again"
