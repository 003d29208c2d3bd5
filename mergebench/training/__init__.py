"""Train what is put on a frozen base: a delta by its own formula, an adapter of PEFT's, or all weights; and measure it.

`transformers.Trainer` runs the loop. What is trained (`kinds`), on what (`tasks`) and towards what (`objectives`) are
files of their own; published systems add theirs in `mergebench/systems`.
"""

from mergebench.training.config import Config, load_config
from mergebench.training.run import Trained, train

__all__ = ["Config", "Trained", "load_config", "train"]
