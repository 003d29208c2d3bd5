"""On the quickstart's models, a search over lambda finds what the default of task arithmetic loses.

make quickstart && python -m pytest -m real tests/evaluation/search/test_chosen.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Cli

ROOT = Path(__file__).parents[3]

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (ROOT / "recipes/quickstart/cache/data/tweets-validation.jsonl").is_file(),
        reason="make quickstart fetches it",
    ),
]


def test_the_chosen_lambda_beats_the_default(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    changed = ("--set", "merge_method=task_arithmetic", "--set", "parameters={}")
    ran = cli(
        "search", "recipes/quickstart.yaml", *changed, "--over", "lambda=0.1/0.4/0.7", "--budget", "4",
        "--out", tmp_path / "out", "--results", tmp_path / "results", "--json",
    )  # fmt: skip
    assert ran.code == 0
    found = json.loads(ran.out)
    assert found["points"][found["best"]]["values"] == {"lambda": 0.4}
    assert found["verdict"].startswith("On test the chosen parameters beat the given ones: +")
    split = {record["split"] for record in found["evaluation"]["records"]}
    assert split == {"test"} and len(found["evaluation"]["records"]) == 4 * 7
