"""The jobs of an array share one evaluation: disjoint parts, and the table of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mergebench
from mergebench.errors import RecipeError
from mergebench.evaluation.measure import measure_part
from mergebench.evaluation.part import parse
from tests.cluster.conftest import kept
from tests.conftest import Cli

MODELS = ["base", "one", "two"]


@pytest.mark.parametrize("count", [1, 2, 4, 6, 9])
def test_parts_are_disjoint_and_whole(count: int, place: Path) -> None:
    before: dict[str, int] = {}
    for number in range(1, count + 1):
        missing = measure_part(f"{number}/{count}", "suite.yaml", MODELS, device="cpu")
        now = kept("results")
        assert before.items() <= now.items(), "a result of another part was measured again"
        assert len(now) == 6 - len(missing) == 6 * number // count
        before = now
    whole = mergebench.measure("suite.yaml", MODELS, device="cpu")
    assert whole.made["known"] == 6


def test_the_last_job_prints_the_table(place: Path, cli: Cli) -> None:
    models = ["suite.yaml", *MODELS]
    expected = cli("eval", *models, "--out", "whole", "--results", "elsewhere").out
    ran = cli("eval", *models, "--part", "2/2")
    assert (ran.code, ran.out) == (0, "") and not Path("evaluations").exists()
    assert "part 2/2 is measured; 3 results missing yet: base on one, base on two, one on one" in ran.err
    ran = cli("eval", *models, "--part", "2/2", "--json")
    assert [one["model"] for one in json.loads(ran.out)["missing"]] == ["base", "base", "one"]
    ran = cli("eval", *models, "--part", "1/2")
    assert (ran.code, ran.out) == (0, expected)
    assert (place / "evaluations" / "work" / "evaluation.json").is_file() or any(place.glob("evaluations/*"))


def test_a_model_that_fails_stops_no_other(place: Path, cli: Cli) -> None:
    ran = cli("eval", "suite.yaml", "base", "nowhere", "two", "--part", "1/1")
    assert ran.code == 3 and "nowhere" in ran.err
    assert len(kept("results")) == 4
    assert cli("eval", "suite.yaml", "base", "two", "--part", "1/1").code == 0


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "a/b", "-1/2", "1/2/3"])
def test_parts_that_are_none(text: str) -> None:
    with pytest.raises(RecipeError, match="--part"):
        parse(text)


def test_parts_of_a_cluster(place: Path, cli: Cli) -> None:
    ran: Any = cli("eval", "suite.yaml", "base", "--part", "1/2", "--on", "ray")
    assert ran.code == 2 and "--part and --on" in ran.err
