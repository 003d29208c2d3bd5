"""What a log of any evaluator says."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from mergebench.evaluation.task import Direction, Prediction, cut


@dataclass
class Log:
    """A model's answers to one task, scored by one metric."""

    tool: str
    task: str
    metric: str
    direction: Direction = "higher"
    answers: dict[str, Prediction] = field(default_factory=dict)
    gold: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)  # what was asked, cut, if the log has it
    documents: dict[str, str] = field(default_factory=dict)  # what tells an item from another, if the log has it
    prompts: dict[str, str] = field(default_factory=dict)  # what tells how it was asked

    def add(self, item: str, answer: Prediction, gold: Any, asked: Any) -> None:
        self.answers[item] = answer
        self.gold[item] = text_of(gold)
        if isinstance(asked, str) and asked.strip():
            self.texts[item] = cut(asked)


def text_of(value: Any) -> str:
    """A value as a word in a table."""
    return value if isinstance(value, str) else json.dumps(value)
