"""The examples of docs/evaluation.md on language models and scorers, run as a reader would."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mergebench.evaluation import Candidate, evaluate_models, load_suite, scorers
from mergebench.evaluation.scorer import Continuation
from tests.evaluation.conftest import Files
from tests.language import write_decoder

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def section(title: str) -> str:
    return PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]


def block(title: str, language: str) -> str:
    return re.findall(rf"```{language}\n(.*?)```", section(title), re.DOTALL)[0]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_suite_measures(here: Path, one_thread: None) -> None:
    """Its data are the rows that its comments show; the last task needs a network."""
    text = block("Language models", "yaml").split("  - name: arc")[0]
    for file, row in re.findall(r"data: (\S+) +# (\{.*\})", text):
        Path(file).write_text(row + "\n", encoding="utf-8")
    Path("suite.yaml").write_text(text, encoding="utf-8")
    model = Candidate("m", "base", Files(write_decoder(here / "model")))
    records = evaluate_models([model], load_suite("suite.yaml")).records
    assert [(record.task, record.n, record.metric) for record in records] == [
        ("facts", 1, "accuracy"), ("news", 1, "bits_per_byte"), ("capitals", 1, "accuracy"),
    ]  # fmt: skip


def test_the_scorer_ships(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = here / "site" / "my_scorers-1.0.dist-info"
    info.mkdir(parents=True)
    (here / "site" / "my_scorers.py").write_text(block("Scorers", "python"), encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-scorers\nVersion: 1.0\n", encoding="utf-8")
    entry = block("Scorers", "toml").split('"mergebench.scorers"]\n')[1].replace('"', "")
    (info / "entry_points.txt").write_text(f"[mergebench.scorers]\n{entry}", encoding="utf-8")
    monkeypatch.syspath_prepend(str(here / "site"))
    monkeypatch.setattr(scorers, "_registry", None)  # put back afterwards; this one has met no plug-ins yet
    fresh = scorers.Registry(
        scorers.__name__, "mergebench.scorers", "scorer", scorers.ScorerKind, "@scorer", dashes=True
    )
    for name in ("names", "origin", "get"):
        monkeypatch.setattr(scorers, name, getattr(fresh, name))
    (spec,) = re.findall(r"`scorer: \{(shorter): (\d+)\}`", section("Scorers"))
    Path("prompts.jsonl").write_text('{"id": 1, "prompt": "abc"}\n', encoding="utf-8")
    one = {"name": "a", "kind": "generation", "data": "prompts.jsonl", "scorer": {spec[0]: int(spec[1])}}
    (task,) = load_suite({"tasks": [one]}).tasks

    items = [Continuation("abc", "x" * length, "") for length in (0, 23, 24)]
    assert task.params.scorer(items) == [1, 1, 0]
    assert fresh.origin("shorter") == "my-scorers"
