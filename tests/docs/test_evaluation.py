"""The examples of docs/evaluation.md on comparing, run as a reader would.

python -m pytest tests/docs
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

import mergebench
from mergebench.evaluation import Record, Results, save
from mergebench.evaluation.task import Prediction

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## Comparing two models\n")[1].split("\n## ")[0]


def block(language: str) -> str:
    return re.findall(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)[0]


def test_the_file_of_predictions(tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text(block("json"), encoding="utf-8")
    (tmp_path / "new.json").write_text(f"[{','.join(block('json').splitlines())}]", encoding="utf-8")
    found = mergebench.compare(tmp_path / "old.jsonl", tmp_path / "new.json")
    assert [answer.score for answer in found.pairs[0].old.values()] == [1, 0]
    assert found.pairs[0].flips.difference == 0


def test_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("merged/quickstart").mkdir(parents=True)

    def record(model: str, role: Any, right: float) -> Record:
        answers = {"1": Prediction("x", right)}
        return Record(model, role, "t", "test", "accuracy", "higher", right, None, 1, None, 1.0, answers)

    save(Results({}, (record("base", "base", 0), record("pcb", "merged", 1))), Path("merged/quickstart"))
    exec(block("python"), {"__name__": "page"})
    assert capsys.readouterr().out == f"t 0.0 {math.erfc(1 / math.sqrt(2))} [(None, 'x')]\n"  # chi2 of 1
    save(Results({}, (record("base", "base", 1), record("pcb", "merged", 0))), Path("merged/quickstart"))
    with pytest.raises(SystemExit, match="more than 2%"):
        exec(block("python"), {"__name__": "page"})
