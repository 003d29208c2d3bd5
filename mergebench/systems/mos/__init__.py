"""Class-incremental learning with MOS: an adapter for each task of a sequence, kept in a bank and retrieved per
item."""

from mergebench.systems.mos.bank import Bank, read_bank
from mergebench.systems.mos.config import Config, load_config
from mergebench.systems.mos.evaluate import evaluate_banks
from mergebench.systems.mos.inference import Inferred, infer
from mergebench.systems.mos.retrieval import Retrieval, retrieve
from mergebench.systems.mos.run import Outcome, run_sequence

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
