"""The quickstart, whole, gives the table that the README shows.

make quickstart && python -m pytest -m real tests/evaluation/test_quickstart.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mergebench.evaluation import load_suite
from mergebench.evaluation.page.profile import Profile
from tests.conftest import Cli

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (QUICKSTART / "cache").is_dir(), reason="make quickstart fetches it"),
]


def test_the_readme_shows_what_comes_out(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ran = cli("merge", "recipes/quickstart.yaml", "--out", tmp_path / "out")
    assert ran.code == 0

    shown, flips = {}, {}
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if re.search(r" (base|input|baseline|merged) .*%$", line):
            name, numbers = re.split(r"  +(?:base|input|baseline|merged)  +", line.strip())
            shown[name] = [float(number) for number in re.findall(r"([\d.]+) ±", numbers)]
        if row := re.match(r" (.*?)  +(?:input|baseline|merged) .* (\d+) \([\d.]+ %\) +(\d+) \([\d.]+ %\)$", line):
            flips[row[1]] = [int(row[2]), int(row[3])]
    document = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    found: dict[str, list[float]] = {}
    for record in document["records"]:
        assert record["n"] == 300
        found.setdefault(record["model"], []).append(100 * record["value"])

    assert len(shown) == 8
    assert found.keys() == shown.keys()
    for name, values in found.items():  # another processor may round a text or two the other way
        assert values == pytest.approx(shown[name], abs=1.1), name
    lost_and_won = {one["new"]: [one["pooled"]["lost"], one["pooled"]["won"]] for one in document["comparisons"]}
    assert lost_and_won.keys() == flips.keys() == shown.keys() - {"base"}
    for name, counts in lost_and_won.items():
        assert counts == pytest.approx(flips[name], abs=6), name

    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        "Results", "Task by task", "Across tasks", "Flips against base", "Layer by layer", "Provenance",
    ]  # fmt: skip
    kept = Profile.load(tmp_path / "out")
    numel = sum(kept.numel.values())
    for model in range(4):  # the paper's density, of each model's elements
        assert sum(counts.kept[model] for counts in kept.counts.values()) / numel == pytest.approx(0.1, abs=1e-4)


def test_no_text_is_both_chosen_and_reported_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(QUICKSTART))
    from fetch import key

    suite = load_suite(QUICKSTART / "suite.yaml")
    texts: dict[tuple[str, str], set[str]] = {}
    for task in suite.tasks:
        lines = task.params.data.read_bytes().splitlines()  # of bytes: texts hold other ends of lines than \n
        texts[task.name, task.split] = {key(json.loads(line)["text"]) for line in lines}
    assert len(texts) == 8
    assert {len(one) for one in texts.values()} == {300}
    assert len(set.union(*texts.values())) == 8 * 300
