"""How something is trained: steps, learning rates, measurements."""

from __future__ import annotations

from dataclasses import dataclass

from mergebench.parameters import param

SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How it is trained."""

    epochs: float = param(3.0, "times that each item is read", above=0)
    max_steps: int | None = param(None, "steps of the optimiser, in place of epochs", low=1)
    batch: int = param(32, "items of a step on each device", low=1)
    accumulate: int = param(1, "batches of a step", low=1)
    head_lr: float = param(1e-2, "learning rate of the task's head", above=0)
    weight_decay: float = param(0.01, "of AdamW", low=0)
    warmup: float = param(0.1, "share of the steps in which the learning rate rises", low=0, below=1)
    schedule: str = param("linear", "of the learning rate after that", choices=SCHEDULES)
    clip: float = param(1.0, "largest norm of the gradients", above=0)
    every: int | None = param(None, "steps between two measurements on validation; an epoch's where not given", low=1)
    bf16: bool = param(False, "forward and backward in bfloat16")
