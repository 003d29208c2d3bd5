"""Measuring models side by side: suites of tasks, results, and the tables made of them.

    suite = load_suite("suite.yaml")
    results = evaluate([Candidate("base", "base", model), ...], suite)
    save(results, directory / "evaluation.json")
    print(markdown(results))

Neither torch nor transformers is imported before something is measured.
"""

from mergebench.evaluate.report import markdown, table
from mergebench.evaluate.results import Record, Results, load, mean_relatives, mean_values, save
from mergebench.evaluate.run import Candidate, LoadableModel, Step, evaluate
from mergebench.evaluate.suite import Suite, Task, load_suite

__all__ = [
    "Candidate",
    "LoadableModel",
    "Record",
    "Results",
    "Step",
    "Suite",
    "Task",
    "evaluate",
    "load",
    "load_suite",
    "markdown",
    "mean_relatives",
    "mean_values",
    "save",
    "table",
]
