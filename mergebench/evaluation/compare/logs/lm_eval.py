"""lm-evaluation-harness with `--log_samples`: `samples_TASK_DATE.jsonl`, a document and a filter a line, with every
metric's value."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergebench.checkpoint.documents import read_json
from mergebench.errors import RunError
from mergebench.evaluation.compare.logs.log import Log, text_of
from mergebench.evaluation.task import Direction, Prediction
from mergebench.networks.items import records

TOOL = "lm-eval"
_SAMPLES = re.compile(r"samples_(.+?)(?:_(\d{4}-\d\d-\d\dT[\d.:-]+))?\.jsonl")
_LOWER = ("perplexity", "bits_per_byte", "ter", "brier_score", "loss", "wer", "cer")  # ends of names
_ABOUT = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"}


def is_log(file: Path) -> bool:
    """Whether a file is called as samples are, or has their columns under another name."""
    if _SAMPLES.fullmatch(file.name):
        return True
    if file.suffix not in (".jsonl", ".json"):
        return False
    try:
        return {"doc_id", "filtered_resps"} <= next(records(file))[1].keys()
    except (StopIteration, RunError):
        return False


def logs_in(folder: Path) -> list[Path]:
    """The last run of each task."""
    newest: dict[str, Path] = {}
    for file in sorted(folder.rglob("samples_*.jsonl"), key=_date):
        newest[_task(file)] = file
    return list(newest.values())


def read(file: Path) -> list[Log]:
    """A log for each metric that is a number for each item; of a task that reads its answers through several filters,
    for each filter, as TASK, FILTER."""
    found: dict[str, list[Log]] = {}
    for where, record in records(file):
        if "doc_id" not in record or "filtered_resps" not in record:
            raise RunError(f"{where}: no sample of lm-eval: it has {', '.join(record)}", "write it with --log_samples")
        name, item = str(record.get("filter", "none")), str(record["doc_id"])
        scores = _scores(record, where)
        logs = found.setdefault(name, [Log(TOOL, "", metric, _direction(file, metric)) for metric in scores])
        for log in logs:
            if log.metric not in scores:
                raise RunError(f"{where}: it has {', '.join(scores)}, those before it have {log.metric}")
            if item in log.answers:
                raise RunError(f"{where}: doc_id '{item}' stands before already", "each item needs an id of its own")
            answer = Prediction(_answer(record["filtered_resps"]), scores[log.metric])
            log.add(item, answer, record.get("target"), _first(_first(record.get("arguments"))))
            for key, hashes in (("doc_hash", log.documents), ("prompt_hash", log.prompts)):
                if key in record:
                    hashes[item] = str(record[key])
    if not found:
        raise RunError(f"{file}: it holds no samples")
    for name, logs in found.items():
        for log in logs:
            log.task = _task(file) if len(found) == 1 else f"{_task(file)}, {name}"
    return [log for logs in found.values() for log in logs]


def _scores(record: Mapping[str, Any], where: str) -> dict[str, float]:
    """The value of every metric that is a number for each item."""
    named = record.get("metrics")
    names = named if isinstance(named, list) else [name for name in record if name not in _ABOUT]
    scores: dict[str, float] = {}
    for name in names:
        value = record.get(name)
        if isinstance(value, bool | int | float) and math.isfinite(value):
            scores[str(name)] = float(value)
        elif name == "bits_per_byte" and isinstance(value, list) and len(value) == 2:  # a log-likelihood and a count
            scores[str(name)] = -float(value[0]) / float(value[1]) / math.log(2)
    if not scores:
        what = f"no metric that is a number for each item, it has {', '.join(map(str, names)) or 'none'}"
        raise RunError(f"{where}: {what}")
    return scores


def _direction(file: Path, metric: str) -> Direction:
    """What the run's results say of a metric, else by its name."""
    for beside in file.parent.glob(f"results_{_date(file)}*.json"):
        try:
            said = read_json(beside)["higher_is_better"][_task(file)][metric]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(said, bool):
            return "higher" if said else "lower"
    return "lower" if metric.endswith(_LOWER) else "higher"


def _date(file: Path) -> str:
    found = _SAMPLES.fullmatch(file.name)
    return (found[2] if found else None) or ""


def _task(file: Path) -> str:
    found = _SAMPLES.fullmatch(file.name)
    return found[1] if found else file.stem


def _answer(responses: Any) -> str:
    """The text, or of likelihoods of several choices the number of the likeliest."""
    if not isinstance(responses, list) or not responses:
        return text_of(responses)
    if len(responses) == 1:
        return text_of(responses[0])
    try:
        chances = [float(one[0] if isinstance(one, list) else one) for one in responses]
    except (ValueError, TypeError, IndexError):
        return text_of(responses)
    return str(chances.index(max(chances)))


def _first(value: Any) -> Any:
    """The first part: lm-eval's arguments are {"gen_args_0": {"arg_0": the context, ...}, ...}, before 0.4.3 lists."""
    parts = list(value.values()) if isinstance(value, dict) else value
    return parts[0] if isinstance(parts, list) and parts else None
