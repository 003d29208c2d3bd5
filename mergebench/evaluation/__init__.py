"""Measure models side by side: suites of tasks, results, and tables of results.

    suite = load_suite("suite.yaml")
    results = evaluate_models([Candidate("base", "base", model), ...], suite)
    save(results, directory)
    print(report(results))

Neither torch nor transformers is imported before something is measured.
"""

from mergebench.evaluation.batch import Candidate, Step
from mergebench.evaluation.compare.comparison import Comparison
from mergebench.evaluation.compare.flips import Flips
from mergebench.evaluation.results import Record, Results, mean_relatives, mean_values
from mergebench.evaluation.run import evaluate_models
from mergebench.evaluation.suite import Suite, Task, load_suite
from mergebench.evaluation.tables.flips import comparison_report
from mergebench.evaluation.tables.results import document_of, legend, markdown, report, save, sheets
from mergebench.networks.loadable import LoadableModel

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
    "comparison_report",
    "document_of",
    "evaluate_models",
    "legend",
    "load_suite",
    "markdown",
    "mean_relatives",
    "mean_values",
    "report",
    "save",
    "sheets",
]
