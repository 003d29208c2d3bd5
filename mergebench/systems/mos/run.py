"""The work of `mergebench cil run`: three banks per seed, then the tables of their scores.

    OUT/seed-0/merged/      a bank                   OUT/results.json    config, records, versions
    OUT/seed-0/unmerged/    the same with alpha 0    OUT/results.md      the tables
    OUT/seed-0/frozen/      adapters not trained     OUT/results.png     their plot

The output is built in a staging directory, and resumed after the last complete task.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mergebench
from mergebench.checkpoint import drawing
from mergebench.checkpoint.content import Contents, sha256_of
from mergebench.checkpoint.documents import document
from mergebench.checkpoint.files import write_atomically
from mergebench.checkpoint.staging import Staging
from mergebench.checkpoint.target import check_target, finished
from mergebench.deltas.open import open_model
from mergebench.errors import RunError, out_of_memory
from mergebench.networks.device import device_of, versions
from mergebench.networks.features import Pooling
from mergebench.networks.network import Network
from mergebench.systems.mos import plot, report
from mergebench.systems.mos.bank import Bank, BankWriter, read_bank
from mergebench.systems.mos.config import Config
from mergebench.systems.mos.encoder import Encoder
from mergebench.systems.mos.learner import Learner, Left
from mergebench.systems.mos.manifest import MERGED, About, AdapterKind, Backbone, Items, name_of
from mergebench.systems.mos.manifest import Features as FeaturesKind
from mergebench.systems.mos.scoring import score
from mergebench.systems.mos.split import Data, read_data, split

RESULTS = "results"  # .json, .md, .png
UNMERGED, FROZEN = "unmerged", "frozen"  # beside MERGED
MOST = 6  # classes of a task that are named
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    out: Path
    results: dict[str, Any]
    already_done: bool = False


def run_sequence(
    config: Config,
    out: Path,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Learn the tasks of every seed, score every bank at every stage, and write `out`, which appears when complete.

    progress: called with the current work, items done, and total; say: called with a line for each task. Raises
    `RecipeError` if the config is impossible, `ModelError` if the backbone does not fit, `RunError` if the data are bad
    or the work fails.
    """
    started = time.perf_counter()
    model = open_model(config.backbone)
    data, place = read_data(config), device_of(device)
    sequences = {seed: split(config, data, seed) for seed in config.seeds}
    content = Contents(None).of_model(model)
    made_of: list[Any] = [asdict(config), [sha256_of(Path(file)) for file in (config.train, config.test)]]
    made_of += [data.train.inputs.key, data.test.inputs.key, content, place.type, versions()]
    fingerprint = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    known = finished(out)
    if resume and known is not None and known.get("fingerprint") == fingerprint:
        return Outcome(out, document(out / f"{RESULTS}.json"), already_done=True)
    check_target(out, [Path(config.train), Path(config.test), model.side_directory], overwrite)
    with Staging(out, fingerprint, resume) as staging:
        work = _Work(config, data, Network(model, "AutoModel", place), content, staging, progress, say)
        work.expect(sequences)
        try:
            records = [record for seed, tasks in sequences.items() for record in work.sequence(seed, tasks)]
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            what = f"model '{model.reference}': out of memory at {work.what}"
            raise RunError(what, "a smaller batch takes less; what is learnt is kept for --resume") from None
        for remark in work.encoder.network.remarks:
            say(f"note: {remark}")
        found = {
            "mergebench": mergebench.__version__,
            "config": asdict(config),
            "backbone_sha256": content,
            "versions": versions(),
            "records": records,
        }
        write_atomically(staging.directory / f"{RESULTS}.json", json.dumps(found, indent=1) + "\n")
        write_atomically(staging.directory / f"{RESULTS}.md", report.markdown(records))
        for figure in plot.figures(records):
            drawing.write(figure.draw(drawing.WIDTH), staging.directory / f"{figure.name}.png")
        provenance: dict[str, Any] = {key: value for key, value in found.items() if key != "records"}
        provenance |= {"command": "cil run", "fingerprint": fingerprint}
        staging.finish(provenance, started, overwrite)
    return Outcome(out, found)


class _Work:
    """The banks of one run, learnt task by task in a staging directory."""

    def __init__(
        self,
        config: Config,
        data: Data,
        network: Network,
        content: str | None,
        staging: Staging,
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.data, self.content = config, data, content
        self.staging, self.progress, self.say = staging, progress, say
        self.encoder = Encoder(network, Pooling(config.pools), config.scale)
        train, self.test = (one.inputs.held(network) for one in (data.train, data.test))
        self.learners = {
            name: Learner(self.encoder, train, data.train.labels, config, alpha, epochs)
            for name, alpha, epochs in (
                (MERGED, config.alpha, config.epochs),
                (UNMERGED, 0.0, config.epochs),
                (FROZEN, 0.0, 0),
            )
        }
        self.what, self.done, self.total = "", 0, 0

    def expect(self, sequences: Mapping[int, Sequence[Sequence[str]]]) -> None:
        """What there is to do, for the progress display."""
        for tasks in sequences.values():
            self.total += sum(learner.work(task) for learner in self.learners.values() for task in tasks)
            self.total -= self.learners[UNMERGED].work(tasks[0])  # the first task is the same
            self.total += len(self.learners) * len(self.data.test.rows) * (len(tasks) + 1)

    def tick(self, items: int) -> None:
        self.done += items
        self.progress(self.what, min(self.done, self.total), self.total)

    def sequence(self, seed: int, tasks: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """The banks of a seed, then what they are worth."""
        folders = {name: self.staging.directory / f"seed-{seed}" / name for name in self.learners}
        writers = {name: BankWriter(folder, self._about(name, seed)) for name, folder in folders.items()}
        for writer in writers.values():
            if writer.about.tasks:  # the manifest may be ahead of what the journal has
                writer.about.write(writer.directory)
        for number, classes in enumerate(tasks):
            left: dict[bool, Left] = {}
            for name, writer in writers.items():
                if number < len(writer.about.tasks):
                    self.tick(self.learners[name].work(classes))
                    continue
                trains = self.learners[name].epochs > 0
                if number > 0 or trains not in left:  # before the first task there is nothing to merge with
                    left[trains] = self._learn(name, seed, number, classes, folders[name])
                self._keep(writer, writer.add(classes, **left[trains].files))
        return [record for folder in folders.values() for record in self._score(read_bank(folder), seed)]

    def _learn(self, name: str, seed: int, number: int, classes: Sequence[str], folder: Path) -> Left:
        where = f"seed {seed}, {name}, task {name_of(number)}"
        self.what, began = where, time.perf_counter()
        left = self.learners[name].learn(classes, read_bank(folder) if number else None, seed, self.tick)
        took, trained = time.perf_counter() - began, left.trained
        named = ", ".join(classes[:MOST]) + ", ..." * (len(classes) > MOST)
        worth = f"{trained.accuracy:.1%} of its training items right, loss {trained.loss:.3g}"
        worth = worth if self.learners[name].epochs else "not trained"
        self.say(f"{where} ({named}): {worth}, {took:.0f} s")
        return left

    def _keep(self, writer: BankWriter, files: Sequence[str]) -> None:
        """What is written now is complete."""
        here = writer.directory.relative_to(self.staging.directory)
        self.staging.complete(*(str(here / file) for file in files))

    def _about(self, name: str, seed: int) -> About:
        config = self.config
        return About(
            mergebench=mergebench.__version__,
            backbone=Backbone(model=config.backbone, sha256=self.content or "unknown"),
            features=FeaturesKind(
                kind=config.kind, pooling=config.pools, max_length=config.max_length if config.kind == "text" else None
            ),
            adapter=AdapterKind(kind="bottleneck", scale=config.scale, bottleneck=config.bottleneck),
            statistics=config.statistics,
            semantics=config.semantics,
            alpha=self.learners[name].alpha,
            seed=seed,
            epochs=self.learners[name].epochs,
            batch=config.batch,
            items=Items(test=config.test, id=config.id, content=config.text or config.image, label=config.label),
        )

    def _score(self, bank: Bank, seed: int) -> list[dict[str, Any]]:
        self.what = f"seed {seed}, {bank.directory.name}: scoring"
        return score(bank, self.encoder, self.test, self.data.test.labels, self.tick)
