"""NeMo Evaluator's bundles: `eval-RUN.json` names the benchmark, `results.jsonl` beside it has a problem a line, with
its reward and what each scorer gave."""

from __future__ import annotations

import math
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


def is_log(file: Path) -> bool:
    """Whether a file is a bundle, or the results beside one."""
    return _benchmark(file) is not None or (file.name == RESULTS and bool(_bundles(file.parent)))


def logs_in(folder: Path) -> list[Path]:
    """The bundles in a folder and in the folders in it."""
    return _bundles(folder, "**/eval-*.json")


def read(file: Path) -> list[Log]:
    """A log of the rewards and of each scorer that scored every problem; of one that ran again the last line counts."""
    bundle = file if file.name != RESULTS else _bundles(file.parent)[0]
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
    several = len({repeat for _, repeat in rows}) > 1
    task = str(_benchmark(bundle))
    scorers = [set(record.get("scorer_rewards") or {}) for _, record in rows.values()]
    logs = [Log(TOOL, task, metric) for metric in [REWARD, *sorted(set.intersection(*scorers))]]
    for (problem, repeat), (where, record) in rows.items():
        item = f"{problem}, repeat {repeat}" if several else problem
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


def _bundles(folder: Path, names: str = "eval-*.json") -> list[Path]:
    return [file for file in sorted(folder.glob(names)) if _benchmark(file) is not None]


def _benchmark(file: Path) -> str | None:
    """The benchmark that a bundle names."""
    if file.suffix != ".json" or not file.name.startswith("eval-"):
        return None
    try:
        found = read_json(file, Any)["benchmark"]["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None
