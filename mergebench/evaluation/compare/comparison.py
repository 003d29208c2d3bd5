"""Compare two models on the same tasks, from an evaluation's records, two files of predictions or logs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mergebench.errors import RecipeError, RunError, did_you_mean
from mergebench.evaluation.compare.flips import Answers, Flips, flips
from mergebench.evaluation.compare.logs import read_logs
from mergebench.evaluation.compare.logs.log import Log
from mergebench.evaluation.compare.predictions import read_predictions
from mergebench.evaluation.results import FILE, Record, Results
from mergebench.evaluation.tables.layout import short_names
from mergebench.evaluation.task import Direction


@dataclass(frozen=True)
class Flip:
    """An item that the new model answers worse or better than the old one."""

    item: str  # its id
    what: str  # lost or won
    old: str
    old_score: float
    new: str
    new_score: float
    gold: str | None  # the right answer
    text: str | None  # what was asked, cut


@dataclass(frozen=True)
class Pair:
    """Two models' answers to one task's items."""

    task: str
    split: str
    metric: str
    direction: Direction
    old: Answers = field(repr=False)
    new: Answers = field(repr=False)
    gold: Mapping[str, str] = field(default_factory=dict, repr=False)  # the right answers, where they are known
    texts: Mapping[str, str] = field(default_factory=dict, repr=False)  # what the items ask, cut, where it is known
    share: bool = False  # whether scores are shares of right answers, as `flips` has it

    @cached_property
    def flips(self) -> Flips:
        return flips(self.old, self.new, self.direction, share=self.share)

    @property
    def flipped(self) -> list[Flip]:
        """Every item that flipped, the largest loss first, then the largest gain."""
        sides = [("lost", item) for item in self.flips.lost] + [("won", item) for item in self.flips.won]
        return [
            Flip(item, what, *self.old[item], *self.new[item], self.gold.get(item), self.texts.get(item))
            for what, item in sides
        ]

    def to_dict(self, items: bool) -> dict[str, Any]:
        about = {"task": self.task, "split": self.split, "metric": self.metric, "direction": self.direction}
        listed = {"lost_items": list(self.flips.lost), "won_items": list(self.flips.won)} if items else {}
        flipped = {"flipped": [vars(flip) for flip in self.flipped]} if items else {}
        return about | self.flips.to_dict() | listed | flipped


@dataclass(frozen=True)
class Comparison:
    """A new model against an old one, task by task."""

    old: str
    new: str
    pairs: tuple[Pair, ...]

    @property
    def named(self) -> list[tuple[str, Pair]]:
        """Each task under its name, with its split where both splits are there, and its metric where it has several."""
        splits = Counter(task for task, _ in {(pair.task, pair.split) for pair in self.pairs})
        metrics = Counter((pair.task, pair.split) for pair in self.pairs)
        named = []
        for pair in self.pairs:
            more = [pair.split] * (splits[pair.task] > 1) + [pair.metric] * (metrics[pair.task, pair.split] > 1)
            named.append((f"{pair.task} ({', '.join(more)})" if more else pair.task, pair))
        return named

    @cached_property
    def pooled_pairs(self) -> tuple[Pair, ...]:
        """The tasks with comparable items: all if they share a metric, else those of right answers. Of a task with
        several metrics the first counts, so that no item counts twice."""
        pairs = self.pairs
        if len({(pair.metric, pair.direction) for pair in pairs}) > 1:
            pairs = tuple(pair for pair in pairs if pair.flips.share)
        return tuple({(pair.task, pair.split): pair for pair in reversed(pairs)}.values())[::-1]

    @cached_property
    def pooled(self) -> Flips | None:
        """The items of `pooled_pairs` as one task, with ids (task, split, id); None if scores are not comparable."""
        if not self.pooled_pairs:
            return None
        old = {(p.task, p.split, item): answer for p in self.pooled_pairs for item, answer in p.old.items()}
        new = {(p.task, p.split, item): answer for p in self.pooled_pairs for item, answer in p.new.items()}
        share = all(pair.flips.share for pair in self.pooled_pairs)
        return flips(old, new, self.pooled_pairs[0].direction, share=share)

    def to_dict(self, items: bool = True) -> dict[str, Any]:
        """Every number by task and pooled, ready for JSON; the ids of flipped items where `items`."""
        return {
            "old": self.old,
            "new": self.new,
            "tasks": [pair.to_dict(items) for pair in self.pairs],
            "pooled": None if self.pooled is None else self.pooled.to_dict(),
        }


def compare(old: str | Path, new: str | Path, evaluation: Results | str | Path | None = None) -> Comparison:
    """Compare a new model with an old one, item by item.

    With an evaluation, or the directory or file it was saved in, `old` and `new` are names of its models, as in it or
    as in its table. Without, they are files of predictions, JSON lines or a list of {"id", "pred", "gold"}, or with a
    "score" (higher is better) in place of gold or beside it; or logs of lm-eval or inspect, or folders of them.

    `RecipeError` for an unknown name or a missing file. `RunError` if the two did not answer the same items of the same
    tasks under the same metric, and, with file and line, for a broken or missing column or a repeated id.
    """
    if evaluation is not None:
        found = evaluation if isinstance(evaluation, Results) else Results.load(Path(evaluation))
        return _compare_rows(found, str(old), str(new))
    before, after = (read_logs(Path(place)) if Path(place).name != FILE else None for place in (old, new))
    if before is not None and after is not None:
        return _compare_logs(str(old), str(new), before, after)
    for file, logs in ((old, before), (new, after)):
        if logs is not None:
            other = new if file is old else old
            what = f"{file} is a log of {logs[0].tool}, {other} is not"
            raise RunError(what, "compare runs of one evaluator, or two files of predictions")
        if not Path(file).is_file() or Path(file).name == FILE:
            hint = "rows of an evaluation go with --in DIR, models to be measured with --suite SUITE"
            raise RecipeError(f"{file}: no file of predictions", hint)
    return _compare_files(Path(old), Path(new))


def against(results: Results) -> list[Comparison]:
    """Every other model against `made["baseline"]`, else the base, else the first one, on what both answered."""
    models = results.models
    bases = [record.model for record in results.records if record.role == "base"]
    named = [name for name in [results.made.get("baseline")] if name in models]
    return compared(results, [*named, *bases, *models][0], models) if models else []


def compared(results: Results, old: str, models: Sequence[str]) -> list[Comparison]:
    """Models against an old one, each on the tasks that both answered."""
    before, found = _by_task(results, old), []
    for new in models:
        after = _by_task(results, new)
        both = [(record, after[key]) for key, record in before.items() if _alike(record, after.get(key))]
        if new != old and both:
            found.append(Comparison(old, new, tuple(_pair(results, *one) for one in both)))
    return found


def _compare_rows(results: Results, old: str, new: str) -> Comparison:
    old, new = (_row(results, name) for name in (old, new))
    before, after = (_by_task(results, name) for name in (old, new))
    for here, there, lacking, other in ((before, after, new, old), (after, before, old, new)):
        missing = ", ".join(f"'{task}'" for task, split in here if (task, split) not in there)
        if missing:
            what, failed = f"'{lacking}' has no result on {missing}, '{other}' has", _failed(results, lacking)
            if failed is not None:
                raise RunError(f"{what}: {failed['error']}", failed["hint"])
            raise RunError(what, "compare models that were measured on the same tasks")
    pairs = []
    for key, record in before.items():
        later = after[key]
        if (record.metric, record.direction) != (later.metric, later.direction):
            raise RunError(f"task '{record.task}': '{old}' has {record.metric}, '{new}' has {later.metric}")
        pairs.append(_checked(_pair(results, record, later), f"task '{record.task}'"))
    return Comparison(old, new, tuple(pairs))


def _compare_files(old: Path, new: Path) -> Comparison:
    before, after = read_predictions(old), read_predictions(new)
    if before.scored != after.scored:
        has, lacks = (old, new) if before.scored else (new, old)
        raise RunError(f"{has} has scores, {lacks} has none", "give both a column 'score', or neither")
    gold = before.gold | after.gold
    for item, right in before.gold.items():
        if gold[item] != right:
            what = f"item '{item}': gold is '{right}' in {old} and '{gold[item]}' in {new}"
            raise RunError(what, "compare answers to the same items")
    metric = "score" if before.scored else "accuracy"
    pair = Pair("items", "", metric, "higher", before.answers, after.answers, gold, before.texts | after.texts)
    return Comparison(str(old), str(new), (_checked(pair, f"{old}, {new}"),))


def _compare_logs(old: str, new: str, before: Sequence[Log], after: Sequence[Log]) -> Comparison:
    """Task by task, on the metrics that both have; a single task on each side is one, whatever it is called."""
    if before[0].tool != after[0].tool:
        what = f"{old} was written by {before[0].tool}, {new} by {after[0].tool}"
        raise RunError(what, "compare runs of one evaluator: each asks and scores in its own way")
    tasks = [list(dict.fromkeys(log.task for log in logs)) for logs in (before, after)]
    called = dict(zip(*tasks, strict=True)) if len(tasks[0]) == len(tasks[1]) == 1 else {}
    later = {(log.task, log.metric): log for log in after}
    pairs = []
    for task in dict.fromkeys([*tasks[0], *tasks[1]]):
        there = called.get(task, task)
        if task not in tasks[0] and task not in called.values():
            raise RunError(f"{old}: no log of task '{task}', the other has one", "compare runs of the same tasks")
        if there not in tasks[1]:
            raise RunError(f"{new}: no log of task '{task}', the other has one", "compare runs of the same tasks")
        here = [log for log in before if log.task == task]
        both = [(log, later[there, log.metric]) for log in here if (there, log.metric) in later]
        if here and not both:
            names = [", ".join(log.metric for log in logs if log.task in (task, there)) for logs in (before, after)]
            raise RunError(f"task '{task}': {old} has {names[0]}, {new} has {names[1]}")
        for log, other in both:
            pairs.append(_pair_of_logs(log, other, old, new))
    return Comparison(old, new, tuple(pairs))


def _pair_of_logs(one: Log, other: Log, old: str, new: str) -> Pair:
    where = f"task '{one.task}'"
    if one.direction != other.direction:
        what = f"{where}: {one.metric}: {one.direction} is better in {old}, {other.direction} in {new}"
        raise RunError(what)
    checks = [
        (one.documents, other.documents, "is another one", "compare answers to the same items"),
        (one.gold, other.gold, "is another one", "compare answers to the same items"),
        (one.prompts, other.prompts, "is asked in another way", "compare runs with the same examples and template"),
    ]
    for here, there, changed, hint in checks:
        item = next((item for item, value in here.items() if there.get(item, value) != value), None)
        if item is not None:
            raise RunError(f"{where}: item '{item}' {changed} in {new} than in {old}", hint)
    share = one.share and other.share
    pair = Pair(one.task, "", one.metric, one.direction, one.answers, other.answers, one.gold, one.texts, share)
    return _checked(pair, where)


def _row(results: Results, name: str) -> str:
    """A model's name in the results; raises the error of a model that failed."""
    failed = _failed(results, name)
    if failed is not None and name not in results.models:
        raise RunError(failed["error"], failed["hint"])
    short = {shown: model for model, shown in short_names(results.models).items()}
    if name in results.models:
        return name
    if name in short:
        return short[name]
    begin = [shown for shown in short if shown.startswith(name)]
    if len(begin) == 1:
        return short[begin[0]]
    if begin:
        raise RecipeError(f"several models in the evaluation begin with '{name}'", f"name one: {', '.join(begin)}")
    raise RecipeError(f"no model in the evaluation is called '{name}'", did_you_mean(name, [*short]))


def _failed(results: Results, model: str) -> dict[str, Any] | None:
    return next((one for one in results.made.get("failed", ()) if one["model"] == model), None)


def _by_task(results: Results, model: str) -> dict[tuple[str, str], Record]:
    return {(record.task, record.split): record for record in results.records if record.model == model}


def _pair(results: Results, old: Record, new: Record) -> Pair:
    items = results.items.get(old.task, {})
    gold = {one: item.gold for one, item in items.items() if item.gold is not None}
    texts = {one: item.text for one, item in items.items()}
    return Pair(old.task, old.split, old.metric, old.direction, old.predictions, new.predictions, gold, texts)


def _alike(old: Record, new: Record | None) -> bool:
    return (
        new is not None
        and (old.metric, old.direction) == (new.metric, new.direction)
        and bool(old.predictions)
        and old.predictions.keys() == new.predictions.keys()
    )


def _checked(pair: Pair, where: str) -> Pair:
    """The pair, after its flips were counted once."""
    try:
        _ = pair.flips
    except RunError as error:
        raise RunError(f"{where}: {error.message}", error.hint) from None
    return pair
