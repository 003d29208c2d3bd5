"""Retrieval and inference with a bank against the loop of the published code, which goes item by item.

    python benchmarks/retrieval.py
    python benchmarks/retrieval.py --bank banks/digits/seed-0/merged --data recipes/images/cache/digits/test.jsonl

Without a bank: one of ten tasks of ten classes, features of width 768, all made up. Both ways take turns, given the
features of all items under all adapters and the first guesses (retrieval), or the features alone (answers), and must
give the same adapters and answers; in seconds of one core, which other work on the machine hardly changes. The
published way is written here from what its code does (Sun et al., arXiv:2412.09441): for each evaluation of each item
the head as a module, the largest logit to NumPy, its task by a dictionary, and back into a tensor.

With a bank of real items the same, then the whole inference from the items on, in seconds of the clock on all cores:
the published way makes features under every adapter and, once more, the first; ours under those on an item's path.
The encoder and its batches are ours in both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from speed import commit
from torch import Tensor
from torch.nn.functional import linear

from mergebench.networks.device import device_of
from mergebench.systems.mos.bank import Bank, BankWriter, read_bank
from mergebench.systems.mos.feature_cache import Seen
from mergebench.systems.mos.inference import open_encoder, read_items
from mergebench.systems.mos.manifest import About, AdapterKind, Backbone
from mergebench.systems.mos.manifest import Features as FeaturesKind
from mergebench.systems.mos.retrieval import retrieve
from mergebench.systems.mos.variants import Features, cosine, mos

TASKS, CLASSES, WIDTH, ITEMS = 10, 10, 768, 5000

Found = tuple[Tensor, ...]  # class and adapter of each item, or the adapter alone


def published(bank: Bank, features: Tensor, cosines: Tensor) -> Found:
    """Item by item; features [items, tasks, width], cosines [items, classes]."""
    task_of, stage = dict(enumerate(bank.task_of.tolist())), len(bank.tasks) - 1
    head = torch.nn.Linear(bank.width, len(bank.classes))
    head.weight.copy_(bank.head(stage).weight)
    head.bias.copy_(bank.head(stage).bias)

    def tasks(scores: Tensor) -> Tensor:
        return torch.tensor([task_of[number] for number in scores.max(1)[1].cpu().numpy()])

    first, used, final = tasks(cosines), [], []
    for item in range(len(features)):
        now = first[item]
        for count in range(1, 5):
            logits = head(features[item, now].unsqueeze(0))[:, : len(bank.classes)]
            (after,) = tasks(logits)
            if count == 4 or after == now:
                break
            now = after
        used.append(now)
        final.append(logits)
    scores = torch.cat(final).softmax(1) + (cosines / (1 / (stage + 1))).softmax(1)
    return scores.argmax(1), torch.stack(used)


def all_at_once(bank: Bank, features: Features, items: int) -> Found:
    """The answers of the package."""
    found = mos(bank, len(bank.tasks) - 1, features, torch.arange(items))
    return found.classes, found.adapter


def retrieved(bank: Bank, features: Features, cosines: Tensor) -> Found:
    """The retrieval of the package."""
    head, tasks = bank.head(len(bank.tasks) - 1), bank.task_of

    def ask(adapter: int, items: Tensor) -> Tensor:
        return tasks[linear(features(adapter, items), head.weight, head.bias).argmax(1)]

    return (retrieve(tasks[cosines.argmax(1)], ask).adapter,)


def made_up(place: Path) -> tuple[Bank, Tensor]:
    """A bank and features [tasks, items, width] that its head mostly tells apart, its prototypes less so."""
    source = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    features = FeaturesKind(kind="image", pooling="cls", max_length=None)
    about = About(
        mergebench="0",
        backbone=Backbone(model="none", sha256="none"),
        features=features,
        adapter=AdapterKind(kind="bottleneck", scale=0.1, bottleneck=1),
        statistics="variance",
        semantics="paper",
        alpha=0.1,
        seed=0,
    )
    writer, means = BankWriter(place, about), random(TASKS * CLASSES, WIDTH) / 4
    shapes = {"down.weight": (1, WIDTH), "down.bias": (1,), "up.weight": (WIDTH, 1), "up.bias": (WIDTH,)}
    for task in range(TASKS):
        so_far, own = means[: (task + 1) * CLASSES], means[task * CLASSES : (task + 1) * CLASSES]
        writer.add(
            [f"{task}.{number}" for number in range(CLASSES)],
            adapter={f"block.{part}": random(*shape) for part, shape in shapes.items()},
            head=(so_far, -so_far.square().sum(1) / 2),
            trained=(own, own.sum(1)),
            statistics={"mean": own, "count": torch.full((CLASSES,), 10), "variance": torch.ones_like(own)},
            prototype=own + random(CLASSES, WIDTH) / 2,
            frozen=own,
        )
    truth = torch.randint(TASKS * CLASSES, (ITEMS,), generator=source)
    return read_bank(place), means[truth] + random(TASKS, ITEMS, WIDTH) * 1.3


def taking_turns(
    title: str, clock: Callable[[], float], runs: int, items: int, ways: Mapping[str, Callable[[], Found]]
) -> None:
    """Print items/s of two ways that must agree, medians; the second is the published one."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs + 1):
        answers = []
        for name, way in ways.items():
            start = clock()
            answers.append(way())
            if run:  # the first warms up
                seconds[name].append(clock() - start)
        assert all(torch.equal(one, other) for one, other in zip(*answers, strict=True)), "they differ"
    first, second = (statistics.median(times) for times in seconds.values())
    speeds = [
        f"{items / statistics.median(t):,.0f} ({items / max(t):,.0f} to {items / min(t):,.0f})"
        for t in seconds.values()
    ]
    print(f"| {title} | {' | '.join(speeds)} | **{second / first:.1f}** |", flush=True)


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=Path, help="a bank that cil run wrote")
    parser.add_argument("--data", type=Path, help="items for it, JSON lines")
    parser.add_argument("--backbone", help="where its backbone is now")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    if (options.bank is None) != (options.data is None):
        parser.error("--bank and --data go together")
    torch.set_grad_enabled(False)
    encode: Callable[[int], Tensor] | None = None
    if options.bank is None:
        with tempfile.TemporaryDirectory() as place:
            bank, features = made_up(Path(place))
    else:
        bank = read_bank(options.bank)
        encoder, inputs = open_encoder(bank, device_of("cpu"), options.backbone), read_items(bank, options.data).inputs
        positions = list(range(len(inputs)))

        def encode(adapter: int) -> Tensor:
            return encoder.features(inputs, positions, bank.adapter(adapter), nothing)

        features = torch.stack([encode(task) for task in range(len(bank.tasks))])
    tasks, items = features.shape[:2]
    across = features.transpose(0, 1).contiguous()  # as the published code keeps them

    def given(adapter: int, chosen: Tensor) -> Tensor:
        return features[adapter].index_select(0, chosen)

    def first_branch(rows: Tensor) -> Tensor:
        return cosine(rows, bank.prototypes(tasks - 1))

    found = mos(bank, tasks - 1, given, torch.arange(items)).retrieval
    assert found is not None
    about, cosines = found.summary(None), first_branch(features[0])
    print(f"commit {commit()}; items/s, medians of {options.runs} (least to most)\n")
    print(
        f"{items} items, {tasks} tasks, {len(bank.classes)} classes, width {bank.width}: {about['evaluations']:.2f} "
        f"evaluations an item, {about['agreement']:.1%} settled, {about['cycles']:.1%} in cycles\n"
    )
    print("| | all at once | item by item | ratio |\n|---|---|---|---|")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for title, ways in {
        "retrieval": {
            "ours": lambda: retrieved(bank, given, cosines),
            "theirs": lambda: published(bank, across, cosines)[1:],
        },
        "answers": {
            "ours": lambda: all_at_once(bank, given, items),
            "theirs": lambda: published(bank, across, first_branch(across[:, 0])),
        },
    }.items():
        taking_turns(title, time.process_time, options.runs, items, ways)
    if encode is None:
        return
    torch.set_num_threads(threads)

    def lazily() -> Found:
        return all_at_once(bank, Seen(bank, encoder, inputs, nothing), items)

    def beforehand() -> Found:
        first = encode(0)  # once more than needed, as published
        every = torch.stack([encode(task) for task in range(tasks)], 1)
        return published(bank, every, first_branch(first))

    taking_turns("inference", time.perf_counter, options.runs, items, {"ours": lazily, "theirs": beforehand})
    seen = Seen(bank, encoder, inputs, nothing)
    all_at_once(bank, seen, items)
    print(f"\n{seen.asked / items:.2f} runs of the encoder an item against {tasks + 1}")


def nothing(items: int) -> None:
    pass


if __name__ == "__main__":
    main()
