"""Training configs, read strictly from YAML or a mapping.

    model: cache/base
    delta: {kind: hut, rank: 8}         # or peft: {peft_type: LORA, r: 8}
    task:
      kind: text-classification
      train: tweets-train.jsonl
      validation: tweets-validation.jsonl
      test: tweets.jsonl
    objective: task
    epochs: 4
    lr: [2.0e-4, 5.0e-4]
    seeds: [0, 1, 2]

Several things are compared under `rows`, a mapping from a name to keys that go before those above. `load_config` reads
and checks everything that needs no model, the task's data too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergebench.errors import RecipeError, did_you_mean
from mergebench.parameters import Parameter, parameters_of
from mergebench.recipe.declared import Reader
from mergebench.recipe.positions import Loc, Places, show
from mergebench.recipe.yaml import parse, plain, text_of
from mergebench.training import tasks
from mergebench.training.declared import Kind, Objective, kinds, objectives
from mergebench.training.settings import Settings
from mergebench.training.task import TrainingTask


@dataclass(frozen=True)
class Row:
    """One thing to train: a model, what is put on it, on what, and how."""

    name: str
    model: str
    kind: Kind | None  # None: PEFT's
    params: Any  # the kind's own dataclass
    peft: Mapping[str, Any] | None
    task: TrainingTask
    objective: Objective
    objective_params: Any
    lrs: tuple[float, ...]
    settings: Settings
    written: Mapping[str, Any]  # its keys as the config has them
    start: Path | None = None  # the directory of a run that it continues

    @property
    def label(self) -> str:
        """What is trained, in a word."""
        return self.kind.name if self.kind is not None else str((self.peft or {}).get("peft_type")).lower()


@dataclass(frozen=True)
class Config:
    """Rows in the order of the config; made by `load_config`."""

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    path: Path | None
    data: Mapping[str, Any]  # the config as plain data

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where relative paths are looked up after the working directory."""
        return () if self.path is None else (self.path.parent,)


SPECIAL = {
    "model": "a path, org/name, or BASE+DELTA",
    "delta": "what is trained: {kind: hut, rank: 8}",
    "peft": "instead, an adapter of PEFT's: {peft_type: LORA, r: 8}",
    "task": "what it is trained on: {kind: text-classification, train: FILE}",
    "from": "the directory of a run whose adapter and head this starts as",
    "objective": "task, or another with its parameters: {distil: {teacher: MODEL}}",
    "lr": "learning rate of AdamW; of several, the first seed's best on validation",
    "seeds": "a run each: [0, 1, 2]",
    "rows": "things to compare: {NAME: {delta: …}}",
}
PARAMETERS: Mapping[str, Parameter] = parameters_of(Settings)
_LR = Parameter("lr", float, None, SPECIAL["lr"], above=0)
_SEED = Parameter("seeds", int, None, SPECIAL["seeds"], low=0)
_FROM = Parameter("from", Path, None, SPECIAL["from"], folder=True)


def load_config(source: str | os.PathLike[str] | Mapping[str, Any]) -> Config:
    """Read and check a training config: the path of a YAML file, or a mapping.

    Relative paths are looked up in the working directory, then in the file's folder. Raises `RecipeError` with the
    place of a mistake, `RunError` if the task's data are damaged.
    """
    path: Path | None = None
    if isinstance(source, Mapping):
        places = Places({(): "config"})
        data = plain(source, (), places)
    else:
        path = Path(source)
        places = Places({(): str(path)})
        data = parse(text_of(path), str(path), places)
    if not isinstance(data, dict):
        raise places.error((), f"a training config is a mapping, got {show(data)}", "begin with model: and delta:")
    reader = _Reader(places, () if path is None else (path.parent,))
    data = {key: value for key, value in data.items() if value is not None}
    seeds = reader.numbers(_SEED, data.pop("seeds", 0), ("seeds",))
    rows = data.pop("rows", None)
    if rows is None:
        row = reader.row("", data, dict.fromkeys(data, ()))
        return Config((replace(row, name=row.label),), seeds, path, dict(data))
    if not (isinstance(rows, dict) and rows):
        raise places.error(("rows",), f"must be a mapping of names, got {show(rows)}", SPECIAL["rows"])
    found = []
    for name, own in rows.items():
        if not isinstance(own, dict):
            raise places.error(("rows", name), f"must be a mapping, got {show(own)}", SPECIAL["rows"])
        if not name.isprintable() or set(name) & set("/+@") or name.startswith("."):
            raise places.error(("rows", name), "a row's name becomes a directory's", "letters, digits, - and _")
        if "seeds" in own:
            raise places.error(("rows", name, "seeds"), "all rows have the same seeds", "write seeds: beside rows:")
        own = {key: value for key, value in own.items() if value is not None}
        above = {
            key: value
            for key, value in data.items()
            if not ({"delta", "peft"} & own.keys() and key in ("delta", "peft"))
        }
        where = {**dict.fromkeys(above, ()), **dict.fromkeys(own, ("rows", name))}
        found.append(reader.row(name, {**above, **own}, where))
    return Config(tuple(found), seeds, path, {**data, "rows": rows})


class _Reader(Reader):
    """Reads rows; a task's data once."""

    def __init__(self, places: Places, folders: Sequence[Path]) -> None:
        super().__init__(places, folders)
        self._tasks: dict[str, TrainingTask] = {}

    def row(self, name: str, data: Mapping[str, Any], where: Mapping[str, Loc]) -> Row:
        """One row; where: at which level each key stands."""

        def at(key: str) -> Loc:
            return (*where.get(key, ()), key)

        for key in data:
            if key not in SPECIAL and key not in PARAMETERS:
                raise self.places.error(at(key), "no such key", did_you_mean(key, [*SPECIAL, *PARAMETERS]))
        values = {k: self.of(PARAMETERS[k], v, at(k)) for k, v in data.items() if k in PARAMETERS}
        for key in ("model", "task", "lr"):
            if key not in data:
                raise self.places.error(at(key), "missing", SPECIAL[key])
        if not (isinstance(data["model"], str) and data["model"].strip()):
            raise self.places.error(at("model"), f"must be a model, got {show(data['model'])}", SPECIAL["model"])
        if ("delta" in data) == ("peft" in data):
            what = "delta and peft: one of them says what is trained" if "delta" in data else "missing"
            raise self.places.error(
                at("delta"), what, f"delta: {{kind: {' | '.join(kinds.names())}}}, or peft: {{peft_type: LORA}}"
            )
        kind, params = self._delta(data["delta"], at("delta")) if "delta" in data else (None, None)
        peft = self._peft(data["peft"], at("peft")) if "peft" in data else None
        objective, objective_params = self._objective(data.get("objective", "task"), at("objective"))
        task = self._task(data["task"], at("task"))
        lrs = self.numbers(_LR, data["lr"], at("lr"))
        start = self.of(_FROM, data["from"], at("from")) if "from" in data else None
        if len(lrs) > 1 and "validation" not in task.parts:
            raise self.places.error(
                at("lr"), "several, and no validation items to choose on", "task: {validation: FILE}"
            )
        settings = Settings(**values)
        return Row(
            name, data["model"], kind, params, peft, task, objective, objective_params, lrs, settings, dict(data), start
        )

    def numbers(self, parameter: Parameter, value: Any, loc: Loc) -> tuple[Any, ...]:
        """One number, or a list of different ones."""
        listed = value if isinstance(value, list) else [value]
        wrong = next((one for one in map(parameter.complaint, listed) if one), None if listed else "must name one")
        if wrong is None and len(set(listed)) < len(listed):
            wrong = "the same twice"
        if wrong is not None:
            raise self.places.error(loc, f"{wrong}, got {value}", parameter.help)
        return tuple(map(parameter.plain, listed))

    def _delta(self, given: Any, loc: Loc) -> tuple[Kind, Any]:
        if not isinstance(given, dict):
            given = {"kind": given}
        own = {key: value for key, value in given.items() if key != "kind" and value is not None}
        kind = self.at((*loc, "kind"), lambda: kinds.get(self._name(given, "kind", loc, kinds.names())))
        return kind, self.params(kind, own, loc, ("kind",))

    def _peft(self, given: Any, loc: Loc) -> Mapping[str, Any]:
        if not isinstance(given, dict) or not isinstance(given.get("peft_type"), str):
            raise self.places.error(loc, "names no peft_type", "such as {peft_type: LORA, r: 8, lora_alpha: 16}")
        return dict(given)

    def _objective(self, given: Any, loc: Loc) -> tuple[Objective, Any]:
        if isinstance(given, dict) and len(given) == 1:
            ((name, own),) = given.items()
            own = {} if own is None else own
        else:
            name, own = given, {}
        if not isinstance(name, str) or not isinstance(own, dict):
            raise self.places.error(loc, f"must be an objective's name, got {show(given)}", SPECIAL["objective"])
        found = self.at(loc, lambda: objectives.get(name))
        return found, self.params(found, own, (*loc, name) if isinstance(given, dict) else loc)

    def _task(self, given: Any, loc: Loc) -> TrainingTask:
        if not isinstance(given, dict):
            raise self.places.error(loc, f"must be a mapping, got {show(given)}", SPECIAL["task"])
        key = repr(sorted(given.items(), key=str))
        if key not in self._tasks:
            kind = self.at((*loc, "kind"), lambda: tasks.get(self._name(given, "kind", loc, tasks.names())))
            own = {name: value for name, value in given.items() if name != "kind" and value is not None}
            params = self.params(kind, own, loc, ("kind",))
            self._tasks[key] = self.at(loc, lambda: kind(params))
        return self._tasks[key]

    def _name(self, given: Mapping[str, Any], key: str, loc: Loc, known: Sequence[str]) -> str:
        if not isinstance(given.get(key), str):
            raise RecipeError(
                "missing" if key not in given else f"must be a word, got {show(given[key])}", ", ".join(known)
            )
        return str(given[key])
