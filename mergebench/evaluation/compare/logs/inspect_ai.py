"""inspect's logs: a JSON document, or a zip archive of them (`.eval`), with the scores of every sample."""

from __future__ import annotations

import copy
import json
import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mergebench.checkpoint.documents import parse_json, read_json
from mergebench.errors import RunError
from mergebench.evaluation.compare.logs.log import Log, text_of
from mergebench.evaluation.task import Prediction

TOOL = "inspect"
_GRADES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0, "yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}  # as inspect's own
_CONVERT = "convert it: inspect log convert --to json --output-dir DIR FILE"


def files(folder: Path) -> Iterable[Path]:
    """The archives, or else the documents."""
    return sorted(folder.rglob("*.eval")) or sorted(folder.rglob("*.json"))


def read(file: Path) -> list[Log] | None:
    """A log for each scorer, as SCORER, KEY if it gives several values."""
    if file.suffix == ".eval":
        head, samples = _archive(file)
    elif (document := _document(file)) is not None:
        head, samples = document, document.get("samples") or []
    else:
        return None
    about = head["eval"] if isinstance(head.get("eval"), dict) else {}
    named = (str(about.get(key, other)) for key, other in (("task", file.stem), ("model", ""), ("created", "")))
    task, model, date = named
    logs: dict[str, Log] = {}
    seen = set()
    for number, sample in enumerate(samples, 1):
        where = f"{file}: sample {number}"
        try:
            item = str(sample["id"])
            if sample.get("error"):
                where += f" (id '{item}') failed: {' '.join(str(sample['error'].get('message')).split())[:120]}"
                raise RunError(where, f"run it again: inspect eval-retry {file}")
            scores = _scores(sample["scores"], f"{where} (id '{item}')")
            asked, target = sample.get("input"), sample.get("target")
            said = asked[-1].get("content") if isinstance(asked, list) and asked else asked
            prompt = _said(sample.get("messages"), asked)
        except (KeyError, TypeError, AttributeError):
            raise RunError(f"{where}: no id, or no score", "compare runs in which every sample was scored") from None
        logs = logs or {metric: Log(TOOL, task, metric, model=model, date=date) for metric in scores}
        if scores.keys() != logs.keys() or (item, sample.get("epoch", 1)) in seen:
            raise RunError(f"{where}: another scorer, or a second sample, of id '{item}'")
        seen.add((item, sample.get("epoch", 1)))
        for metric, log in logs.items():
            log.add(item, scores[metric], target, said)
            if asked is not None:
                log.prompts[item] = prompt
    if not logs:
        raise RunError(f"{file}: it holds no samples", "write the log with its samples")
    return list(logs.values())


def _scores(scores: Mapping[str, Any], where: str) -> dict[str, Prediction]:
    """What each scorer gave."""
    found: dict[str, Prediction] = {}
    for scorer, score in scores.items():
        value = score["value"]
        named = {f"{scorer}, {key}": one for key, one in value.items()} if isinstance(value, dict) else {scorer: value}
        answer = text_of(score.get("answer") or "")
        found |= {name: Prediction(answer, _grade(one, where)) for name, one in named.items()}
    if not found:
        raise KeyError
    return found


def _said(messages: Any, asked: Any) -> str:
    """The words of a prompt: those of the messages before the model's first, whose ids differ from run to run."""
    if not isinstance(messages, list) or not messages:
        messages = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
    answered = (place for place, message in enumerate(messages) if message.get("source") == "generate")
    before = messages[: next(answered, None)]
    return json.dumps([[message.get("role"), message.get("content")] for message in before])


def _grade(value: Any, where: str) -> float:
    if isinstance(value, str):
        if (grade := _GRADES.get(value, _GRADES.get(value.lower()))) is not None:
            return grade
        if re.fullmatch(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?", value, re.IGNORECASE):
            value = float(value)
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
    if not isinstance(found, dict) or not isinstance(found.get("eval"), dict) or "task" not in found["eval"]:
        return None
    return found if isinstance(found.get("samples"), list | None) else None


def _archive(file: Path) -> tuple[dict[str, Any], list[Any]]:
    """The head and the samples of an `.eval` file."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            head = parse_json(_member(archive, "header.json" if "header.json" in names else "_journal/start.json"))
            samples = dict.fromkeys(name for name in names if re.fullmatch(r"samples/.+\.json", name))
            return head, [parse_json(_member(archive, name)) for name in samples]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise RunError(f"{file}: not a readable log of inspect: {error}", _CONVERT) from None
    except NotImplementedError:
        what = f"{file}: it is compressed by Zstandard, which this Python does not read without pyarrow"
        raise RunError(what, f"pip install pyarrow, or {_CONVERT}") from None


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member's bytes. inspect compresses by Zstandard, which Python knows since 3.14; else pyarrow reads it."""
    try:
        return archive.read(name)
    except NotImplementedError:
        info = copy.copy(archive.getinfo(name))
        if info.compress_type != 93:  # Zstandard, APPNOTE 4.4.5
            raise
    try:
        import pyarrow
    except ImportError:
        raise NotImplementedError from None
    info.compress_type, info.file_size = zipfile.ZIP_STORED, info.compress_size
    del info.CRC  # it is that of the content
    with archive.open(info) as packed, pyarrow.CompressedInputStream(packed, "zstd") as stream:
        return bytes(stream.read())
