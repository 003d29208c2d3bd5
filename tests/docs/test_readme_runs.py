"""The README's commands about the quickstart, as they are typed and in their order.

make quickstart && python -m pytest -m real tests/docs/test_readme_runs.py
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.conftest import Cli

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "recipes" / "quickstart" / "cache"
PLACEHOLDER = re.compile(r"(?<![\w/.-])[A-Z][A-Z0-9_]*(?![\w/.-])|\[")  # MODEL, M, [METHOD ...]

pytestmark = [pytest.mark.real, pytest.mark.skipif(not CACHE.is_dir(), reason="make quickstart fetches it")]


def commands() -> list[list[str]]:
    """What can be typed as it stands: without placeholders, about the quickstart or nothing that has to be fetched."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [re.sub(r"\s+# .*", "", line) for line in re.findall(r"^    (mergebench .*)", text, re.MULTILINE)]
    others = {"train", "patch"}  # they continue from lines with placeholders, or train
    return [words for line in lines if not (PLACEHOLDER.search(line) or others & set(words := split(line)))]


def split(line: str) -> list[str]:
    """The words of a line as bash has them, with braces expanded."""
    words = []
    for word in shlex.split(line):
        before, brace, rest = word.partition("{")
        inside, _, after = rest.partition("}")
        words += [f"{before}{one}{after}" for one in inside.split(",")] if brace else [word]
    return words


def test_there_are_some() -> None:
    found = {words[1] for words in commands()}
    assert {"plan", "merge", "explain", "methods", "eval", "compare", "search", "auto", "report"} <= found


@pytest.mark.slow
def test_they_run(tmp_path: Path, shell: Cli) -> None:
    """In a copy of the recipes, so that nothing is in the way and nothing is left behind."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", symlinks=True, ignore=shutil.ignore_patterns("cache"))
    (tmp_path / "recipes" / "quickstart" / "cache").symlink_to(CACHE.resolve())
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    for words in [["mergebench", "merge", "recipes/quickstart.yaml", "--overwrite"], *commands()]:
        ran = shell(*words[1:], cwd=tmp_path, timeout=3600, PYTHONPATH=path, BROWSER="true")
        assert (ran.code, "Traceback" in ran.err) == (0, False), (words, ran.err)
        assert ran.out
