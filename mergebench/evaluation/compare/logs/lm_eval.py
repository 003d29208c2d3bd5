"""lm-evaluation-harness with `--log_samples`: `samples_TASK_DATE.jsonl`, a document and a filter a line, with every
metric's value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mergebench.checkpoint.documents import read_json
from mergebench.errors import RunError
from mergebench.evaluation.compare.logs.log import Log, text_of
from mergebench.evaluation.task import Direction, Prediction
from mergebench.networks.items import records

TOOL = "lm-eval"
_SAMPLES = re.compile(r"samples_(.+?)(?:_(\d{4}-\d\d-\d\dT[\d.:-]+))?\.jsonl")
_LOWER = re.compile(r"(.*_)?(perplexity|bits_per_byte|ter|brier_score|loss|wer|cer)")
BITS = "bits_per_byte"  # of an item, from its log-likelihood and its bytes
_BY_LENGTH: dict[str, Callable[[str], int]] = {"acc_norm": len, "acc_bytes": lambda text: len(text.encode())}
_ABOUT = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"}


def files(folder: Path) -> Iterable[Path]:
    """The last run of each task by each model, which names the folder."""
    newest: dict[tuple[str, str], Path] = {}
    for file in sorted(folder.rglob("samples_*.jsonl"), key=_date):
        newest[file.parent.name, _task(file)] = file
    return sorted(newest.values())


def read(file: Path) -> list[Log] | None:
    """A log for each metric that is a number for each item; of a task that reads its answers through several filters,
    for each filter, as METRIC,FILTER: lm-eval's own name for it."""
    if not _is_log(file):
        return None
    found: dict[str, list[Log]] = {}
    task, model, date = _task(file), file.parent.name, _date(file)
    for where, record in records(file):
        if "doc_id" not in record or "filtered_resps" not in record:
            raise RunError(f"{where}: no sample of lm-eval: it has {', '.join(record)}", "write it with --log_samples")
        name, item = str(record.get("filter", "none")), str(record["doc_id"])
        scores = _scores(record, where)
        logs = found.setdefault(name, [Log(TOOL, task, one, _direction(file, one), model, date) for one in scores])
        for log in logs:
            if log.metric not in scores:
                raise RunError(f"{where}: it has {', '.join(scores)}, those before it have {log.metric}")
            if item in log.answers:
                raise RunError(f"{where}: doc_id '{item}' stands before already", "each item needs an id of its own")
            answer, gold = ("", None) if log.metric == BITS else _answer(record, log.metric)
            asked = _parts(next(iter(_parts(record.get("arguments"))), None))
            log.add(item, Prediction(answer, scores[log.metric]), gold, asked[0] if asked else None)
            for key, hashes in (("doc_hash", log.documents), ("prompt_hash", log.prompts)):
                if key in record:
                    hashes[item] = str(record[key])
    if not found:
        raise RunError(f"{file}: it holds no samples")
    for name, logs in found.items() if len(found) > 1 else ():
        for log in logs:
            log.metric = f"{log.metric},{name}"
    return [log for logs in found.values() for log in logs]


def _is_log(file: Path) -> bool:
    """Whether a file is called as samples are, or has their columns under another name."""
    if _SAMPLES.fullmatch(file.name):
        return True
    if file.suffix not in (".jsonl", ".json"):
        return False
    try:
        return {"doc_id", "filtered_resps"} <= next(records(file))[1].keys()
    except (StopIteration, RunError):
        return False


def _scores(record: Mapping[str, Any], where: str) -> dict[str, float]:
    """The value of every metric that is a number for each item."""
    named = record.get("metrics")
    names = named if isinstance(named, list) else [name for name in record if name not in _ABOUT]
    scores: dict[str, float] = {}
    for name in names:
        value = record.get(name)
        if isinstance(value, bool | int | float) and math.isfinite(value):
            scores[str(name)] = float(value)
        elif name == BITS and isinstance(value, list) and len(value) == 2:  # a log-likelihood and a count
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
    return "lower" if _LOWER.fullmatch(metric) else "higher"


def _date(file: Path) -> str:
    found = _SAMPLES.fullmatch(file.name)
    return (found[2] if found else None) or ""


def _task(file: Path) -> str:
    found = _SAMPLES.fullmatch(file.name)
    return found[1] if found else file.stem


def _answer(record: Mapping[str, Any], metric: str) -> tuple[str, Any]:
    """The text, and the right one. Where choices have likelihoods: the choice that the metric takes, as a text if the
    choices differ in theirs, else as its number."""
    responses, gold = record["filtered_resps"], record.get("target")
    if not isinstance(responses, list) or len(responses) < 2:
        return text_of(responses[0] if isinstance(responses, list) and responses else responses), gold
    try:
        chances = [float(one[0] if isinstance(one, list) else one) for one in responses]
    except (ValueError, TypeError, IndexError):
        return text_of(responses), gold
    asked = [_parts(one) for one in _parts(record.get("arguments"))][: len(chances)]
    texts = [one[1].removeprefix(" ") for one in asked if len(one) > 1 and isinstance(one[1], str)]
    if len(set(texts)) < len(chances) or not all(texts):
        return str(chances.index(max(chances))), gold
    if metric in _BY_LENGTH:
        chances = [chance / _BY_LENGTH[metric](text) for chance, text in zip(chances, texts, strict=True)]
    place = str(gold)
    gold = texts[int(place)] if place.isdecimal() and place not in texts and int(place) < len(texts) else gold
    return texts[chances.index(max(chances))], gold


def _parts(value: Any) -> list[Any]:
    """lm-eval's arguments are {"gen_args_0": {"arg_0": the context, "arg_1": a choice}, ...}, before 0.4.3 lists."""
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
