"""Measures and tables of a sequence of tasks: by hand, by brute force, against scipy, and what they must not claim."""

from __future__ import annotations

import csv
import io
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mergebench.checkpoint import drawing
from mergebench.errors import RunError
from mergebench.evaluation.tables.sheet import written
from mergebench.systems.mos import plot, report
from mergebench.systems.mos.metrics import NAMES, difference, estimate, forgetting, measures, runs_of


def record(method: str, seed: int, by_task: list[float], retrieval: dict[str, Any] | None = None) -> dict[str, Any]:
    """After as many tasks of ten items as there are accuracies."""
    return {
        "method": method, "seed": seed, "stage": len(by_task), "tasks": len(by_task), "by_task": by_task,
        "items_by_task": [10] * len(by_task), "accuracy": sum(by_task) / len(by_task), "retrieval": retrieval,
    }  # fmt: skip


def run(method: str, seed: int, *stages: list[float], retrieval: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    return [record(method, seed, by_task, retrieval) for by_task in stages]


def found(steps: list[float]) -> dict[str, Any]:
    return {"steps": steps, "evaluations": 1.25, "cycles": 0.1, "agreement": 0.9}


BY_HAND = run("mos", 0, [1.0], [0.8, 0.6], [0.9, 0.4, 0.7])


def test_the_measures_of_a_run_by_hand() -> None:
    one = measures(BY_HAND)

    assert one.average == pytest.approx((1 + 0.7 + 2 / 3) / 3)
    assert one.last == pytest.approx(2 / 3)
    assert one.forgetting == pytest.approx(((1.0 - 0.9) + (0.6 - 0.4)) / 2)
    assert measures(BY_HAND[:1]).forgetting is None


def test_forgetting_is_the_published_tables() -> None:
    """Chaudhry et al. 2018 as its users compute it, on the whole matrix: absent tasks are 0, the last is left out."""
    rng = np.random.default_rng(0)
    for tasks in (2, 3, 7):
        by_stage = [rng.random(stage).tolist() for stage in range(1, tasks + 1)]
        matrix = np.zeros((tasks, tasks))
        for stage, row in enumerate(by_stage):
            matrix[stage, : stage + 1] = row
        expected = np.mean((matrix.max(0) - matrix[-1])[:-1])

        assert forgetting(run("mos", 0, *by_stage)) == pytest.approx(expected)


def test_the_error_and_the_interval_are_scipys() -> None:
    values, others = {0: 0.71, 1: 0.78, 2: 0.74}, {0: 0.60, 1: 0.72, 2: 0.61, 3: 0.99}
    paired = [values[seed] - others[seed] for seed in values]
    expected = stats.ttest_rel(list(values.values()), [others[seed] for seed in values]).confidence_interval(0.95)

    assert estimate(list(values.values())).stderr == pytest.approx(stats.sem(list(values.values())))
    assert difference(values, others).mean == pytest.approx(np.mean(paired))
    assert difference(values, others).interval == pytest.approx((expected.low, expected.high))
    assert difference({0: 0.5}, others).interval is None
    assert difference({9: 0.5}, others) is None


def test_three_seeds_are_few() -> None:
    """Twice the standard error is within noise at two degrees of freedom, 4.4 times is not."""
    deviations = np.array([-1, 0, 1]) * math.sqrt(3)  # a standard error of one
    for mean, beyond in ((2.0, False), (4.2, False), (4.4, True), (-4.4, True)):
        values = dict(enumerate(mean + deviations))

        assert difference(values, dict.fromkeys(values, 0.0)).beyond_noise is beyond


def test_runs_that_are_not_done_do_not_count() -> None:
    late = run("mos", 1, [0.0], [0.0, 0.0])

    assert runs_of([*late, *BY_HAND[::-1]]) == {"mos": {0: BY_HAND}}
    with pytest.raises(RunError, match="stage 2 stands twice"):
        runs_of([*BY_HAND, BY_HAND[1]])
    with pytest.raises(RunError, match="nothing to tabulate"):
        report.table([])


def cells(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return line.strip()[len(name) :].split()


WENT = found([0.5, 0.7, 0.8, 0.8])
THREE = [
    *(one for seed, last in enumerate([0.7, 0.8, 0.9]) for one in run("mos", seed, [1], [last] * 2, retrieval=WENT)),
    *(one for seed, last in enumerate([0.5, 0.6, 0.8]) for one in run("sequential", seed, [0.9], [last, last])),
    *(one for seed, last in enumerate([0.6, 0.7, 0.8]) for one in run("simplecil", seed, [0.9], [last, last])),
    *(one for seed in range(3) for one in run("own method", seed, [0.9], [0.1, 0.1])),
]  # fmt: skip


def test_the_table_shows_means_errors_and_what_is_noise() -> None:
    text = report.table(THREE)
    names = [NAMES.get(one, one) for one in ("own method", "simplecil", "sequential", "mos")]
    places = [text.index(f"\n {name} ") for name in names]

    assert all(a < b for a, b in pairwise(places))
    assert " ".join(cells(text, "MOS ")) == "90.0 ± 2.9 80.0 ± 5.8 20.0 ± 5.8 –"
    assert cells(text, NAMES["sequential"])[-3:] == ["−16.7", "[−31.0,", "−2.3]*"]  # by scipy's ttest_rel
    assert cells(text, NAMES["simplecil"])[-3:] == ["−10.0", "[−10.0,", "−10.0]*"]
    assert "3 seeds, each with the same 20 test items" in " ".join(text.split())
    second = text[text.index("step 0") :]
    assert cells(second, "MOS ")[:3] == ["50.0", "±", "0.0"]
    assert NAMES["simplecil"] not in second


def test_noise_and_single_seeds_are_called_so() -> None:
    noise = [one for one in THREE if one["method"] == "mos"]
    noise += [one for seed, last in enumerate([0.9, 0.8, 0.7]) for one in run("no-ensemble", seed, [1.0], [last, last])]
    text = " ".join(report.table(noise).split())
    assert "none leaves out 0, each may be noise" in text and "]*" not in text

    text = " ".join(report.table([one for one in THREE if one["seed"] == 1]).split())
    assert "nothing says which differences are noise" in text and "±" not in text and "*" not in text
    assert "One seed, 20 test items" in text


def test_the_stages_and_markdown() -> None:
    assert " ".join(cells(report.stages(THREE), "MOS ")) == "100.0 ± 0.0 80.0 ± 5.8"
    text = report.markdown(THREE)
    assert text.startswith("After the last task the best is MOS: 80.0 ± 5.8% of all test items right.\n\n| method")
    assert r"| **−16.7 \[−31.0, −2.3\]\*** |" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [len(one) for one in tables] == [6, 6, 3]
    assert all(line.count("|") == one[0].count("|") for one in tables for line in one)


def test_csv_has_errors_apart() -> None:
    rows = list(csv.DictReader(io.StringIO(written(report.sheets(THREE), "csv"))))
    mos = next(row for row in rows if row["method"] == "MOS")
    assert (mos["A_B"], mos["A_B ±"]) == ("80.0", "5.8") and "A_B against MOS" in mos and "A_B against MOS ±" not in mos


def test_the_plot_holds_every_point() -> None:
    one_run = [one for one in THREE if one["method"] == "simplecil" and not one["seed"]]
    (three,), (one,) = plot.figures(THREE), plot.figures(one_run)
    assert len(three.draw(drawing.WIDTH).axes) == 2  # the second plot is there where something is retrieved
    (axes,) = one.draw(drawing.WIDTH).axes
    assert list(axes.lines[0].get_ydata()) == pytest.approx([100 * record["accuracy"] for record in one_run])
