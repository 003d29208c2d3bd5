"""Measuring models side by side: suites of tasks, results, and the tables made of them.

    suite = load_suite("suite.yaml")
    results = evaluate_models([Candidate("base", "base", model), ...], suite)
    results.save(directory)
    print(report(results))

Neither torch nor transformers is imported before something is measured.
"""

from mergebench.evaluation.comparison import Comparison, compare
from mergebench.evaluation.flip_tables import comparison_report
from mergebench.evaluation.flips import Flips, flips
from mergebench.evaluation.results import Record, Results, mean_relatives, mean_values
from mergebench.evaluation.run import Candidate, Step, evaluate_models
from mergebench.evaluation.suite import Suite, Task, load_suite
from mergebench.evaluation.tables import legend, markdown, report, table
from mergebench.running.model import LoadableModel

__all__ = [
    "Candidate",
    "Comparison",
    "Flips",
    "LoadableModel",
    "Record",
    "Results",
    "Step",
    "Suite",
    "Task",
    "compare",
    "comparison_report",
    "evaluate_models",
    "flips",
    "legend",
    "load_suite",
    "markdown",
    "mean_relatives",
    "mean_values",
    "report",
    "table",
]
