"""Class-incremental learning: an adapter for each task of a growing sequence, kept in a bank, retrieved (MOS)."""

from mergebench.cil.bank import Bank, read_bank
from mergebench.cil.config import Config, load_config
from mergebench.cil.evaluate import evaluate_banks
from mergebench.cil.inference import Inferred, infer
from mergebench.cil.retrieval import Retrieval, retrieve
from mergebench.cil.run import Outcome, run_sequence

__all__ = [
    "Bank",
    "Config",
    "Inferred",
    "Outcome",
    "Retrieval",
    "evaluate_banks",
    "infer",
    "load_config",
    "read_bank",
    "retrieve",
    "run_sequence",
]
