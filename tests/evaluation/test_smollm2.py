"""The language-model example, whole, gives the table that its README shows. Minutes on two cores.

python recipes/smollm2/fetch.py && python -m pytest -m real tests/evaluation/test_smollm2.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.conftest import Cli

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "recipes" / "smollm2"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (PLACE / "cache").is_dir(), reason="python recipes/smollm2/fetch.py fetches it"),
]


def test_the_readme_shows_what_comes_out(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("profanity_check")
    monkeypatch.chdir(ROOT)
    place = PLACE.relative_to(ROOT)
    models = [f"{place}/cache/base", f"{place}/cache/base+{place}/news"]
    ran = cli("eval", place / "suite.yaml", *models, "--out", tmp_path / "out", "--results", tmp_path)
    assert ran.code == 0

    shown = {}
    for line in (PLACE / "README.md").read_text(encoding="utf-8").splitlines():
        if found := re.match(r" +(base|news) +(?:base|input) +", line):
            shown[found[1]] = [float(number) for number in re.findall(r"([\d.]+) ±", line)]
    records = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))["records"]
    assert len(shown) == 2
    assert len(records) == 6
    for record in records:
        name = "news" if record["model"].endswith("news") else "base"
        kinds, news, profanity = shown[name]
        if record["task"] == "kinds":  # another processor may round an item or two the other way
            assert 100 * record["value"] == pytest.approx(kinds, abs=1.5)
        elif record["task"] == "news":
            assert record["value"] == pytest.approx(news, abs=0.001)
        else:  # and draw other words from there on
            assert record["value"] == pytest.approx(profanity, abs=0.08)
