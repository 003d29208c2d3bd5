"""inspect's logs: a JSON document, or a zip archive of them (`.eval`), with the scores of every sample."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergebench.checkpoint.documents import parse_json, read_json
from mergebench.errors import RunError
from mergebench.evaluation.compare.logs.log import Log, text_of
from mergebench.evaluation.task import Prediction

TOOL = "inspect"
_GRADES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}  # correct, partly, incorrect, no answer


def is_log(file: Path) -> bool:
    return file.suffix == ".eval" or _document(file) is not None


def logs_in(folder: Path) -> list[Path]:
    """The archives, or else the documents."""
    archives = sorted(folder.rglob("*.eval"))
    return archives or [file for file in sorted(folder.rglob("*.json")) if _document(file) is not None]


def read(file: Path) -> list[Log]:
    """A log for each scorer, as SCORER, KEY if it gives several values."""
    document = None if file.suffix == ".eval" else _document(file)
    head, samples = _archive(file) if document is None else (document, document["samples"])
    about = head.get("eval")
    task = str(about["task"]) if isinstance(about, dict) and "task" in about else file.stem
    logs: dict[str, Log] = {}
    try:
        several = len({sample.get("epoch", 1) for sample in samples}) > 1
        for number, sample in enumerate(samples, 1):
            where = f"{file}: sample {number}"
            item = str(sample["id"]) + (f", epoch {sample.get('epoch', 1)}" if several else "")
            scores = _scores(sample["scores"], where)
            logs = logs or {metric: Log(TOOL, task, metric) for metric in scores}
            if scores.keys() != logs.keys() or any(item in log.answers for log in logs.values()):
                raise RunError(f"{where}: another scorer, or a second sample, of id '{item}'")
            asked = sample.get("input")
            said = asked[-1].get("content") if isinstance(asked, list) and asked else asked
            for metric, log in logs.items():
                log.add(item, scores[metric], sample.get("target"), said)
                if asked is not None:
                    log.prompts[item] = _said(asked)
    except (KeyError, TypeError, AttributeError):
        raise RunError(f"{where}: no id, or no score", "compare runs in which every sample was scored") from None
    if not logs:
        raise RunError(f"{file}: it holds no samples", "write the log with its samples")
    return list(logs.values())


def _scores(scores: Mapping[str, Any], where: str) -> dict[str, Prediction]:
    """What each scorer gave."""
    found: dict[str, Prediction] = {}
    for scorer, score in scores.items():
        value = score["value"]
        named = {f"{scorer}, {key}": one for key, one in value.items()} if isinstance(value, dict) else {scorer: value}
        answer = text_of(score.get("answer"))
        found |= {name: Prediction(answer, _grade(one, where)) for name, one in named.items()}
    if not found:
        raise KeyError
    return found


def _said(asked: Any) -> str:
    """A prompt, or the words of its messages, whose ids differ from run to run."""
    messages = asked if isinstance(asked, list) else [{"content": asked}]
    return json.dumps([[message.get("role"), message.get("content")] for message in messages])


def _grade(value: Any, where: str) -> float:
    if isinstance(value, str) and value in _GRADES:
        return _GRADES[value]
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    raise RunError(f"{where}: its score must be C, I, P, N or a number, got {json.dumps(value)[:60]}")


def _document(file: Path) -> dict[str, Any] | None:
    """The log in a JSON file, if it is one."""
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
