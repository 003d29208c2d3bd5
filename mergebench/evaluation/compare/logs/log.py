"""What a log of any evaluator says."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from mergebench.evaluation.task import Direction, Prediction, cut


@dataclass
class Log:
    """A model's answers to one task, scored by one metric.

    An item that was answered several times, as in inspect's epochs, counts once, with its mean score: its answers
    depend on one another, and the test is over items.
    """

    tool: str
    task: str
    metric: str
    direction: Direction = "higher"
    model: str = ""  # whose answers they are, as far as the log tells
    date: str = ""  # when it was written: later dates sort behind
    answers: dict[str, Prediction] = field(default_factory=dict)
    gold: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)  # what was asked, cut, if the log has it
    documents: dict[str, str] = field(default_factory=dict)  # what tells an item from another, if the log has it
    prompts: dict[str, str] = field(default_factory=dict)  # what tells how it was asked
    share: bool = True  # whether every score given was right or wrong, so that a mean is a share of right answers
    _given: dict[str, list[Prediction]] = field(default_factory=dict, repr=False)

    def add(self, item: str, answer: Prediction, gold: Any, asked: Any) -> None:
        """gold: the right answer, None where there is none."""
        given = self._given.setdefault(item, [])
        given.append(answer)
        said = " | ".join(dict.fromkeys(one.output for one in given))
        self.answers[item] = Prediction(said, math.fsum(one.score for one in given) / len(given))
        self.share = self.share and answer.score in (0, 1)
        if gold is not None:
            self.gold[item] = text_of(gold)
        if isinstance(asked, str) and asked.strip():
            self.texts[item] = cut(asked)


def text_of(value: Any) -> str:
    """A value as a word in a table."""
    return value if isinstance(value, str) else json.dumps(value)
