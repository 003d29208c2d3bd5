"""Files of predictions, a model's answers to the items of one task: JSON lines or a list.

{"id": 1, "pred": "good", "gold": "bad"}       right or wrong
{"id": 1, "pred": "a sentence", "score": 0.83}  any score, higher is better; `gold` may be there too
`text` says what was asked
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from mergebench.errors import RunError
from mergebench.evaluation.task import Prediction, cut
from mergebench.networks.items import records, word

HINT = 'an item is {"id": 1, "pred": "a", "gold": "b"}, or has a score: {"id": 1, "pred": "a", "score": 0.5}'


class Predictions(NamedTuple):
    """What one file holds, by id."""

    answers: dict[str, Prediction]
    gold: dict[str, str]  # the right answers of those items that say it
    texts: dict[str, str]  # what those items ask that say it
    scored: bool  # whether the file has scores; else the score is 1 for a right answer


def read_predictions(file: Path) -> Predictions:
    """Read a file strictly; `RunError` with file and line for broken or missing fields, or a repeated id."""
    found = Predictions({}, {}, {}, False)
    places: dict[str, str] = {}
    for where, record in records(file):
        wanted = ("id", "pred") if "score" in record else ("id", "pred", "gold")
        lacking = [name for name in wanted if name not in record]
        if lacking:
            raise RunError(f"{where}: no column '{lacking[0]}', it has {', '.join(record) or 'none'}", HINT)
        item = word(record, "id", where)
        if item in places:
            raise RunError(f"{where}: id '{item}' is in {places[item]} already", "each item needs an id of its own")
        places[item] = where
        if not found.answers:
            found = found._replace(scored="score" in record)
        elif found.scored != ("score" in record):
            raise RunError(f"{where}: it has {'no' if found.scored else 'a'} score, unlike those before it", HINT)
        output = _text(record["pred"], "pred", where)
        if "gold" in record or not found.scored:
            found.gold[item] = _text(record["gold"], "gold", where)
        if isinstance(record.get("text"), str):
            found.texts[item] = cut(record["text"])
        score = _score(record["score"], where) if found.scored else float(output == found.gold[item])
        found.answers[item] = Prediction(output, score)
    if not found.answers:
        raise RunError(f"{file}: it holds no items", HINT)
    return found


def _text(value: Any, name: str, where: str) -> str:
    """An answer: text as it is, a number or true and false as JSON writes them; null is no answer."""
    if isinstance(value, dict | list) or (name == "gold" and value is None):
        raise RunError(f"{where}: {name} must be text or a number, got {json.dumps(value)[:60]}", HINT)
    return value if isinstance(value, str) else json.dumps(value)


def _score(value: Any, where: str) -> float:
    if where.rpartition(":")[0].lower().endswith(".csv"):  # whose cells are texts
        with suppress(ValueError):
            value = float(value)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise RunError(f"{where}: score must be a finite number, got {json.dumps(value)[:60]}")
    return float(value)
