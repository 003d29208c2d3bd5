"""NeMo Evaluator's bundles: `eval-RUN.json` names the benchmark, `results.jsonl` beside it has a problem a line, with
its reward and what each scorer gave."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mergebench.checkpoint.documents import read_json
from mergebench.errors import RunError
from mergebench.evaluation.compare.logs.log import Log, text_of
from mergebench.evaluation.task import Prediction
from mergebench.networks.items import records

TOOL = "NeMo Evaluator"
RESULTS = "results.jsonl"
REWARD = "reward"


def files(folder: Path) -> Iterable[Path]:
    """The bundles in a folder and in the folders in it."""
    return sorted(folder.rglob("eval-*.json"))


def read(file: Path) -> list[Log] | None:
    """A log of the rewards and of each scorer that scored every problem; of one that ran again the last line counts."""
    beside = sorted(file.parent.glob("eval-*.json")) if file.name == RESULTS else [file]
    known = [(one, about) for one in beside if (about := _bundle(one)) is not None]
    if not known:
        return None
    bundle, about = known[-1]
    results = bundle.parent / RESULTS
    if not results.is_file():
        raise RunError(f"{bundle}: no {RESULTS} beside it", "copy it there: flips are counted problem by problem")
    rows: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
    for where, record in records(results):
        if "problem_idx" not in record:
            raise RunError(f"{where}: no problem_idx", "a line of NeMo Evaluator has problem_idx, repeat and reward")
        rows[str(record["problem_idx"]), str(record.get("repeat", 0))] = where, record
    if not rows:
        raise RunError(f"{results}: it holds no problems")
    scorers = [set(record.get("scorer_rewards") or {}) for _, record in rows.values()]
    config = about.get("config")
    model = str(config.get("model", "")) if isinstance(config, dict) else ""
    metrics = [REWARD, *sorted(set.intersection(*scorers))]
    task, date = about["benchmark"]["name"], str(about.get("timestamp", ""))
    logs = [Log(TOOL, task, metric, model=model, date=date) for metric in metrics]
    for (item, _), (where, record) in rows.items():
        answer = next((record[key] for key in ("extracted_answer", "model_response") if record.get(key)), "")
        for log in logs:
            value = record.get(REWARD) if log.metric == REWARD else record["scorer_rewards"][log.metric]
            if not isinstance(value, bool | int | float) or not math.isfinite(value):
                raise RunError(f"{where}: {log.metric} must be a number, got {text_of(value)[:60]}")
            log.add(
                item, Prediction(text_of(answer), float(value)), record.get("expected_answer"), record.get("prompt")
            )
            if isinstance(record.get("prompt"), str):
                log.prompts[item] = record["prompt"]
    return logs


def _bundle(file: Path) -> dict[str, Any] | None:
    """A bundle, which names its benchmark."""
    if file.suffix != ".json" or not file.name.startswith("eval-"):
        return None
    try:
        found = read_json(file)
        return found if isinstance(found["benchmark"]["name"], str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
