"""The tables, letter by letter."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

import pytest

from mergebench.evaluation import Record, Results, markdown, report
from mergebench.evaluation.tables.layout import number
from mergebench.evaluation.tables.results import share_of, sheets, short_names, value_of
from mergebench.evaluation.tables.sheet import Cell, Sheet, written
from mergebench.evaluation.task import Prediction, accuracy

RIGHT = {  # of 300, by model; columns are the tasks
    "cache/base": (210, 219, 189, 204),
    "cache/base+adapters/tweets": (279, 240, 216, 190),
    "cache/base+adapters/products": (249, 276, 210, 200),
    "cache/base+adapters/reviews": (240, 243, 237, 201),
    "cache/base+adapters/nouns": (200, 210, 180, 246),
    "linear": (261, 255, 222, 225),
    "ties": (264, 258, 222, 221),
    "pcb": (267, 258, 225, 219),
}
TASKS = ("tweets", "products", "reviews", "nouns")
ROLES = dict.fromkeys(RIGHT, "input") | {
    "cache/base": "base",
    "linear": "baseline",
    "ties": "baseline",
    "pcb": "merged",
}


def a_record(model: str, role: Any, task: str, right: int, own: int | None, **more: Any) -> Record:
    score = accuracy({str(i): Prediction("x", float(i < right)) for i in range(300)})
    relative = None if own is None else right / own
    whole = {"metric": "accuracy", "direction": "higher", "value": score.value, "stderr": score.stderr, **more}
    return Record(
        model=model, role=role, task=task, split="test", n=300, relative=relative, seconds=1.0, predictions={}, **whole
    )


@pytest.fixture
def results() -> Results:
    own = [max(right[i] for right in RIGHT.values()) for i in range(4)]  # each fine-tune is best at its task
    return Results(
        {},
        tuple(
            a_record(model, ROLES[model], task, RIGHT[model][i], own[i])
            for model in RIGHT
            for i, task in enumerate(TASKS)
        ),
    )


TABLE = """\
 model                   tweets    products     reviews       nouns  mean  relative
 ───────────────────────────────────────────────────────────────────────────────────
 base      base      70.0 ± 2.6  73.0 ± 2.6  63.0 ± 2.8  68.0 ± 2.7  68.5     79.3%

 tweets    input     93.0 ± 1.5  80.0 ± 2.3  72.0 ± 2.6  63.3 ± 2.8  77.1     88.8%
 products  input     83.0 ± 2.2  92.0 ± 1.6  70.0 ± 2.6  66.7 ± 2.7  77.9     89.8%
 reviews   input     80.0 ± 2.3  81.0 ± 2.3  79.0 ± 2.4  67.0 ± 2.7  76.8     88.9%
 nouns     input     66.7 ± 2.7  70.0 ± 2.6  60.0 ± 2.8  82.0 ± 2.2  69.7     80.9%

 linear    baseline  87.0 ± 1.9  85.0 ± 2.1  74.0 ± 2.5  75.0 ± 2.5  80.2     92.8%
 ties      baseline  88.0 ± 1.9  86.0 ± 2.0  74.0 ± 2.5  73.7 ± 2.5  80.4     92.9%

 pcb       merged    89.0 ± 1.8  86.0 ± 2.0  75.0 ± 2.5  73.0 ± 2.6  80.8     93.3%

 Accuracy in % ± standard error, 300 test items per task; relative: mean share of
 what each task's own fine-tune reaches."""

MARKDOWN = """\
| model |  | tweets | products | reviews | nouns | mean | relative |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |
| base | base | 70.0 ± 2.6 | 73.0 ± 2.6 | 63.0 ± 2.8 | 68.0 ± 2.7 | 68.5 | 79.3% |
| tweets | input | 93.0 ± 1.5 | 80.0 ± 2.3 | 72.0 ± 2.6 | 63.3 ± 2.8 | 77.1 | 88.8% |
| products | input | 83.0 ± 2.2 | 92.0 ± 1.6 | 70.0 ± 2.6 | 66.7 ± 2.7 | 77.9 | 89.8% |
| reviews | input | 80.0 ± 2.3 | 81.0 ± 2.3 | 79.0 ± 2.4 | 67.0 ± 2.7 | 76.8 | 88.9% |
| nouns | input | 66.7 ± 2.7 | 70.0 ± 2.6 | 60.0 ± 2.8 | 82.0 ± 2.2 | 69.7 | 80.9% |
| linear | baseline | 87.0 ± 1.9 | 85.0 ± 2.1 | 74.0 ± 2.5 | **75.0 ± 2.5** | 80.2 | 92.8% |
| ties | baseline | 88.0 ± 1.9 | **86.0 ± 2.0** | 74.0 ± 2.5 | 73.7 ± 2.5 | 80.4 | 92.9% |
| pcb | merged | **89.0 ± 1.8** | **86.0 ± 2.0** | **75.0 ± 2.5** | 73.0 ± 2.6 | **80.8** | **93.3%** |

Accuracy in % ± standard error, 300 test items per task; relative: mean share of what each task's own fine-tune \
reaches; bold: the best merge.
"""


def test_in_the_terminal(results: Results) -> None:
    assert report(results) == TABLE
    assert report(results, width=100) == TABLE


def test_in_markdown(results: Results) -> None:
    assert markdown(results) == MARKDOWN


def test_bold_on_a_terminal(results: Results) -> None:
    text = report(results, styled=True)
    plain = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    assert plain[:14] == TABLE.splitlines()[:14]
    assert "bold: the best merge" in text
    (linear,) = (line for line in text.splitlines() if " linear " in line)
    (pcb,) = (line for line in text.splitlines() if " pcb " in line)
    assert "\x1b[1m75.0 ± 2.5\x1b[0m" in linear
    assert linear.count("\x1b[1m") == 1
    assert "\x1b[1m89.0 ± 1.8\x1b[0m" in pcb
    assert pcb.count("\x1b[1m") == 5


def test_long_names_fold_and_no_number_is_ever_cut(results: Results) -> None:
    long = "a-model-with-quite-a-long-name-of-its-own"
    renamed = Results({}, tuple(vars_of(r, model=long if r.model == "pcb" else r.model) for r in results.records))
    for width in (100, 80, 64):
        text = report(renamed, width=width)
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        for right in RIGHT.values():
            assert all(f"{right[i] / 3:.1f}" in text for i in range(4))
    assert report(renamed).splitlines()[0].startswith(" model     ")


def vars_of(record: Record, **changes: Any) -> Record:
    return Record(**{**vars(record), **changes})


def test_what_was_not_measured_is_a_dash(results: Results) -> None:
    fewer = Results({}, tuple(r for r in results.records if (r.model, r.task) != ("ties", "nouns")))
    (line,) = (line for line in markdown(fewer).splitlines() if line.startswith("| ties"))
    assert line == "| ties | baseline | 88.0 ± 1.9 | **86.0 ± 2.0** | 74.0 ± 2.5 | – | – | – |"


def test_where_lower_is_better() -> None:
    def one(model: str, role: str, value: float) -> Record:
        return a_record(model, role, "wiki", 1, None, metric="perplexity", direction="lower", value=value, stderr=None)

    text = markdown(
        Results({}, (one("base", "base", 9.0), one("linear", "baseline", 12.3456), one("pcb", "merged", 11.2)))
    )
    assert "| linear | baseline | 12.35 |\n" in text
    assert "| pcb | merged | **11.2** |\n" in text
    assert text.endswith(
        "\nPerplexity (lower is better) ± standard error, 300 test items per task; bold: the best merge.\n"
    )


def test_tasks_that_have_no_mean() -> None:
    """Each metric is named by its task, an error has two digits, and no column is empty."""

    def one(task: str, metric: str, way: str, value: float, stderr: float) -> Record:
        return a_record("base", "base", task, 1, None, metric=metric, direction=way, value=value, stderr=stderr)

    results = Results({}, (
        one("kinds", "accuracy", "higher", 0.6733, 0.03829),
        one("news", "bits_per_byte", "lower", 1.26714, 0.014042),
        one("long", "word_perplexity", "lower", 1034.4, 27.31),
    ))  # fmt: skip
    text = markdown(results).splitlines()
    assert text[0] == "| model |  | kinds | news | long |"
    assert text[2] == "| base | base | 67.3 ± 3.8 | 1.267 ± 0.014 | 1034 ± 27 |"
    assert text[4].startswith(
        "kinds: accuracy in %; news: bits\\_per\\_byte (lower is better); long: word\\_perplexity (lower is better), ±"
    )


def test_no_bold_where_nothing_differs(results: Results) -> None:
    alone = Results({}, tuple(r for r in results.records if r.role != "baseline"))
    assert "**" not in markdown(alone)
    assert "bold" not in markdown(alone)
    same = Results({}, (a_record("linear", "baseline", "a", 9, None), a_record("pcb", "merged", "a", 9, None)))
    assert "**" not in markdown(same)


def test_names_are_text_and_no_markup() -> None:
    odd = Results({}, (a_record("m[bold]|*x", "base", "t[red]|_y", 9, None),))
    assert "| m\\[bold\\]\\|\\*x | base |" in markdown(odd)
    assert "m[bold]|*x" in report(odd)
    assert "t[red]|_y" in report(odd)


def test_csv_is_read_back(results: Results) -> None:
    """Each error in a column of its own, the same numbers as in the table, names with commas whole."""
    odd = Results({}, tuple(vars_of(r, model='a, "b"' if r.model == "pcb" else r.model) for r in results.records))
    rows = list(csv.DictReader(io.StringIO(written(sheets(odd), "csv"))))
    assert len(rows) == 8 and rows[-1]["model"] == 'a, "b"' and None not in rows[-1]
    assert [rows[-1][name] for name in ("tweets", "tweets ±", "mean", "relative %")] == ["89.0", "1.8", "80.8", "93.3"]
    for row in rows:
        assert all(float(value) >= 0 for name, value in row.items() if name not in ("model", "role"))


def test_latex_has_no_special_letters() -> None:
    sheet = Sheet(["a_b", "50%"], [[Cell("x & y", best=True), Cell("−1 ± 2 <3\\")]], "100% {sure}")
    assert Sheet(["|a|"], [[Cell("[1]")], [Cell("* → ×")]], "two\nlines").latex().splitlines() == [
        "% two lines",
        r"\begin{tabular}{l}",
        r"\toprule",
        r"\textbar{}a\textbar{} \\",
        r"\midrule",
        r"{[}1] \\",  # else it would be how far below the line before
        r"{*} $\rightarrow$ $\times$ \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert sheet.latex().splitlines() == [
        "% 100% {sure}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"a\_b & 50\% \\",
        r"\midrule",
        r"\textbf{x \& y} & $-$1 $\pm$ 2 \textless{}3\textbackslash{} \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


@pytest.mark.parametrize(
    ("right", "n", "shown"),
    [(300, 300, "100.0 ≥98.8"), (0, 300, "0.0 ≤1.2"), (1, 1, "100.0 ≥2.5"), (299, 300, "99.7 ± 0.3")],
)
def test_an_error_is_never_zero(right: int, n: int, shown: str) -> None:
    """The rule of three, two-sided: 1 - 0.025^(1/300) is 1.2%."""
    score = accuracy({str(i): Prediction("x", float(i < right)) for i in range(n)})
    record = Record(**{**vars(a_record("m", "base", "t", 1, None)), **vars(score)})
    assert value_of(record) == share_of(right / n, n) == shown
    assert ("exact 95% interval" in report(Results({}, (record,)))) == (right in (0, n))


def test_zero_has_no_sign() -> None:
    assert [number(-0.0001, "accuracy"), number(-0.0, "loss"), number(-1e-5, "loss")] == ["0.0", "0", "-1e-05"]
    record = a_record("m", "base", "t", 1, None, metric="score", value=-0.004, stderr=0.05)
    assert value_of(record) == "-0.004 ± 0.050"
    assert value_of(vars_of(record, value=-0.0004)) == "0.000 ± 0.050"


def test_nothing_measured() -> None:
    assert "model" in report(Results({}, ()))
    assert "| model |" in markdown(Results({}, ()))


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["base"], ["base"]),
        (["a/b/c", "a/d"], ["c", "d"]),
        (["runs/1/out", "runs/2/out", "pcb"], ["1/out", "2/out", "pcb"]),
        (["x/out", "out"], ["x/out", "out"]),
        (["base+a/tweets", "base+b/nouns/"], ["tweets", "nouns"]),
        (["org/name@main", "/abs/olute"], ["name@main", "olute"]),
        (["a+b", "a/b"], ["a+b", "a/b"]),
        (["runs/ties (lambda 1e+3)", "b/ties (x/y)"], ["ties (lambda 1e+3)", "ties (x/y)"]),
        (["tweets (input)", "./"], ["tweets (input)", "./"]),
        ([], []),
    ],
)
def test_short_names(names: list[str], short: list[str]) -> None:
    assert short_names(names) == dict(zip(names, short, strict=True))
