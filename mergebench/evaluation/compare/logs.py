"""Answers in other evaluators' logs: what lm-evaluation-harness writes with `--log_samples`, and inspect's logs.

lm-eval writes `samples_TASK_DATE.jsonl`, a document and a filter a line, with every metric's value; inspect writes a
JSON document, or a zip archive of them (`.eval`), with the scores of every sample. A folder holds a log for each task.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mergebench.checkpoint.documents import parse_json, read_json
from mergebench.errors import RunError
from mergebench.evaluation.task import Direction, Prediction, cut
from mergebench.networks.items import records

_SAMPLES = re.compile(r"samples_(.+?)(?:_(\d{4}-\d\d-\d\dT[\d.:-]+))?\.jsonl")
_LOWER = ("perplexity", "bits_per_byte", "ter", "brier_score", "loss", "wer", "cer")  # ends of names
_GRADES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}  # inspect's: correct, partly, incorrect, no answer
_ABOUT = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"}


class Log(NamedTuple):
    """A model's answers to one task."""

    metric: str
    direction: Direction
    answers: dict[str, Prediction]
    gold: dict[str, str]
    documents: dict[str, str]  # a hash of each item, if the log has them
    texts: dict[str, str]  # what was asked, cut, if the log has it


def read_logs(place: Path) -> dict[str, Log] | None:
    """The logs in a file or folder by task; None if it holds none. `RunError` with file and line for a broken one."""
    if not place.is_dir():
        return _read(place)
    newest: dict[str, Path] = {}
    for file in sorted(place.rglob("samples_*.jsonl"), key=_date):
        newest[_task(file)] = file
    files = [*newest.values(), *sorted(place.rglob("*.eval"))]
    if not files:
        files = [file for file in sorted(place.rglob("*.json")) if _document(file) is not None]
    found: dict[str, Log] = {}
    for file in files:
        for task, log in (_read(file) or {}).items():
            if task in found:
                raise RunError(f"{place}: two logs of task '{task}', one is {file.name}", "name the logs to compare")
            found[task] = log
    return found or None


def _read(file: Path) -> dict[str, Log] | None:
    if file.suffix == ".eval":
        return _inspect(file, *_archive(file))
    if _SAMPLES.fullmatch(file.name) or _looks_sampled(file):
        return _lm_eval(file)
    document = _document(file)
    return None if document is None else _inspect(file, document, document["samples"])


def _looks_sampled(file: Path) -> bool:
    """Whether a file under another name has lm-eval's columns."""
    if file.suffix not in (".jsonl", ".json"):
        return False
    try:
        return {"doc_id", "filtered_resps"} <= next(records(file))[1].keys()
    except (StopIteration, RunError):
        return False


def _date(file: Path) -> str:
    found = _SAMPLES.fullmatch(file.name)
    return (found[2] if found else None) or ""


def _task(file: Path) -> str:
    found = _SAMPLES.fullmatch(file.name)
    return found[1] if found else file.stem


def _lm_eval(file: Path) -> dict[str, Log]:
    """A log for each filter, as a task reads its answers in several ways; named TASK, FILTER if there are several."""
    found: dict[str, Log] = {}
    for where, record in records(file):
        if "doc_id" not in record or "filtered_resps" not in record:
            raise RunError(f"{where}: no sample of lm-eval: it has {', '.join(record)}", "write it with --log_samples")
        name, item = str(record.get("filter", "none")), str(record["doc_id"])
        metric, score = _metric(record, where)
        if name not in found:
            found[name] = Log(metric, _direction(file, metric), {}, {}, {}, {})
        log = found[name]
        if metric != log.metric:
            raise RunError(f"{where}: it has metric {metric}, those before it {log.metric}")
        if item in log.answers:
            raise RunError(f"{where}: doc_id '{item}' stands before already", "each item needs an id of its own")
        log.answers[item] = Prediction(_answer(record["filtered_resps"]), score)
        log.gold[item] = _text(record.get("target"))
        _add_text(log, item, _first(_first(record.get("arguments"))))
        if "doc_hash" in record:
            log.documents[item] = str(record["doc_hash"])
    if not found:
        raise RunError(f"{file}: it holds no samples")
    task = _task(file)
    return {task if len(found) == 1 else f"{task}, {name}": log for name, log in found.items()}


def _metric(record: Mapping[str, Any], where: str) -> tuple[str, float]:
    """The task's first metric that is a number for each item."""
    named = record.get("metrics")
    names = named if isinstance(named, list) else [name for name in record if name not in _ABOUT]
    for name in names:
        value = record.get(name)
        if isinstance(value, bool | int | float) and math.isfinite(value):
            return str(name), float(value)
        if name == "bits_per_byte" and isinstance(value, list) and len(value) == 2:  # a log-likelihood and a count
            return str(name), -float(value[0]) / float(value[1]) / math.log(2)
    raise RunError(f"{where}: no metric that is a number for each item, it has {', '.join(map(str, names)) or 'none'}")


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


def _answer(responses: Any) -> str:
    """The text, or of likelihoods of several choices the number of the likeliest."""
    if not isinstance(responses, list) or not responses:
        return _text(responses)
    if len(responses) == 1:
        return _text(responses[0])
    try:
        chances = [float(one[0] if isinstance(one, list) else one) for one in responses]
    except (ValueError, TypeError, IndexError):
        return _text(responses)
    return str(chances.index(max(chances)))


def _first(value: Any) -> Any:
    """The first part: lm-eval's arguments are {"gen_args_0": {"arg_0": the context, ...}, ...}, before 0.4.3 lists."""
    parts = list(value.values()) if isinstance(value, dict) else value
    return parts[0] if isinstance(parts, list) and parts else None


def _add_text(log: Log, item: str, text: Any) -> None:
    if isinstance(text, str) and text.strip():
        log.texts[item] = cut(text)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _document(file: Path) -> dict[str, Any] | None:
    """inspect's log in a JSON file, if it is one."""
    if file.suffix != ".json":
        return None
    try:
        found = read_json(file, Any)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("samples"), list) and "eval" in found else None


def _archive(file: Path) -> tuple[dict[str, Any], list[Any]]:
    """The head and the samples of an `.eval` file."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            head = parse_json(archive.read("header.json" if "header.json" in names else "_journal/start.json"))
            return head, [parse_json(archive.read(name)) for name in names if re.fullmatch(r"samples/.+\.json", name)]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        hint = "convert it: inspect log convert --to json --output-dir DIR FILE"
        raise RunError(f"{file}: not a readable log of inspect: {error}", hint) from None


def _inspect(file: Path, head: Mapping[str, Any], samples: list[Any]) -> dict[str, Log]:
    about = head.get("eval")
    task = str(about["task"]) if isinstance(about, dict) and "task" in about else file.stem
    log: Log | None = None
    try:
        several = len({sample.get("epoch", 1) for sample in samples}) > 1
        for number, sample in enumerate(samples, 1):
            where = f"{file}: sample {number}"
            item = str(sample["id"]) + (f", epoch {sample.get('epoch', 1)}" if several else "")
            scorer, score = next(iter(sample["scores"].items()))
            log = log or Log(scorer, "higher", {}, {}, {}, {})
            if scorer != log.metric or item in log.answers:
                raise RunError(f"{where}: another scorer, or a second sample, of id '{item}'")
            log.answers[item] = Prediction(_text(score.get("answer")), _grade(score["value"], where))
            log.gold[item] = _text(sample.get("target"))
            asked = sample.get("input")
            _add_text(log, item, asked[-1].get("content") if isinstance(asked, list) and asked else asked)
    except (KeyError, TypeError, AttributeError, StopIteration):
        raise RunError(f"{where}: no id, or no score", "compare runs in which every sample was scored") from None
    if log is None:
        raise RunError(f"{file}: it holds no samples", "write the log with its samples")
    return {task: log}


def _grade(value: Any, where: str) -> float:
    if isinstance(value, str) and value in _GRADES:
        return _GRADES[value]
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    raise RunError(f"{where}: its score must be C, I, P, N or a number, got {json.dumps(value)[:60]}")
