"""Every variant's answers equal the formulas, worked out one item at a time in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergebench.evaluation.head import Head
from mergebench.networks.features import Pooling, Texts
from mergebench.networks.network import Network
from mergebench.systems.mos.bank import Bank, read_bank
from mergebench.systems.mos.encoder import Encoder
from mergebench.systems.mos.feature_cache import Seen
from mergebench.systems.mos.variants import VARIANTS, Answers, cosine
from tests.evaluation.conftest import WORDS, Files, write_encoder
from tests.models import hashes
from tests.systems.mos.conftest import TASKS, WIDTH, write_bank

pytestmark = pytest.mark.usefixtures("one_thread")

ITEMS, Row = 60, Sequence[float]


@pytest.fixture
def made() -> Tensor:
    """[adapters, items, width]: features under each adapter, the last under none."""
    return torch.randn(len(TASKS) + 1, ITEMS, WIDTH, generator=torch.Generator().manual_seed(5))


def dot(one: Row, other: Row) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def angles(row: Row, others: Sequence[Row]) -> list[float]:
    return [dot(row, other) / math.sqrt(dot(row, row) * dot(other, other)) for other in others]


def linear(row: Row, head: Head) -> list[float]:
    return [dot(row, weight) + bias for weight, bias in zip(head.weight.tolist(), head.bias.tolist(), strict=True)]


def softmax(values: Row) -> list[float]:
    whole = math.fsum(math.exp(value) for value in values)
    return [math.exp(value) / whole for value in values]


def largest(values: Row) -> int:
    return max(range(len(values)), key=lambda i: values[i])


def one_by_one(name: str, bank: Bank, stage: int, made: list[list[list[float]]], item: int) -> tuple[int, int]:
    """The class and the adapter of one item, as the paper and its code say (Sun et al., 2412.09441)."""
    task_of = [task for task, classes in enumerate(TASKS) for _ in classes]
    rows = [made[adapter][item] for adapter in range(len(TASKS))]
    if name == "simplecil":
        return largest(angles(made[-1][item], bank.frozen(stage).tolist())), -1
    if name == "first-task":
        return largest(angles(rows[0], bank.prototypes(stage).tolist())), 0
    if name == "sequential":
        return largest(linear(rows[stage], bank.trained(stage))), stage
    if name == "frozen-head":
        return largest(linear(rows[stage], bank.head(stage))), stage
    head = bank.trained(stage) if name == "no-alignment" else bank.head(stage)
    prototypes = angles(rows[0], bank.prototypes(stage).tolist())
    adapter = task_of[largest(prototypes)]
    if name == "no-retrieval":
        adapter = stage
    elif name != "first-guess":
        for _ in range(3):  # after the first evaluation, at most three more
            after = task_of[largest(linear(rows[adapter], head))]
            if after == adapter:
                break
            adapter = after
    logits = linear(rows[adapter], head)
    if name == "no-ensemble":
        return largest(logits), adapter
    sharper = [(stage + 1) * one for one in prototypes]
    return largest([a + b for a, b in zip(softmax(logits), softmax(sharper), strict=True)]), adapter


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(bank: Bank, made: Tensor, name: str, stage: int) -> None:
    listed = made.tolist()
    found = VARIANTS[name](bank, stage, lambda adapter, items: made[adapter][items], torch.arange(ITEMS))

    wanted = [one_by_one(name, bank, stage, listed, item) for item in range(ITEMS)]
    assert list(zip(found.classes.tolist(), found.adapter.tolist(), strict=True)) == wanted
    refined = name in ("mos", "no-alignment", "no-ensemble")
    assert (found.retrieval is not None) == refined
    if found.retrieval is not None:
        assert torch.equal(found.retrieval.adapter, found.adapter)


def test_the_parts_matter(bank: Bank, made: Tensor) -> None:
    """On random features each variant answers otherwise: none of the tests above is about the same thing."""
    answers = [
        tuple(VARIANTS[name](bank, 2, lambda adapter, items: made[adapter][items], torch.arange(ITEMS)).classes)
        for name in VARIANTS
    ]

    assert len(set(answers)) == len(VARIANTS)


def test_positions_are_answered_in_their_order(bank: Bank, made: Tensor) -> None:
    def features(adapter: int, items: Tensor) -> Tensor:
        return made[adapter][items]

    some = torch.tensor([40, 3, 17])
    for variant in VARIANTS.values():
        whole, part = variant(bank, 2, features, torch.arange(ITEMS)), variant(bank, 2, features, some)
        assert torch.equal(part.classes, whole.classes[some]) and torch.equal(part.adapter, whole.adapter[some])


def test_cosine_of_a_zero_row() -> None:
    assert cosine(torch.zeros(1, 2), torch.eye(2)).tolist() == [[0, 0]]


# --- with a real encoder ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    network = Network(Files(write_encoder(tmp_path_factory.mktemp("model"))), "AutoModel", torch.device("cpu"))
    return Encoder(network, Pooling("cls"), 0.5)


@pytest.fixture
def real(tmp_path: Path, encoder: Encoder) -> Bank:
    return read_bank(write_bank(tmp_path / "bank", blocks=encoder.blocks, width=encoder.width))


def texts(count: int) -> Texts:
    return Texts([" ".join(WORDS[i % 7 : 8 + i % 11]) + f" {WORDS[i % 60]}" for i in range(count)], 24)


def nothing(items: int) -> None:
    pass


def test_features_are_those_of_the_encoder(real: Bank, encoder: Encoder) -> None:
    inputs, asked = texts(9), []

    class Counting(Encoder):
        def __init__(self) -> None:
            pass

        width, blocks = encoder.width, encoder.blocks

        def features(self, inputs: Any, positions: Any, adapter: Any, tick: Any, drop: Any = None) -> Tensor:
            asked.append((adapter is None, list(positions)))
            return encoder.features(inputs, positions, adapter, tick)

    seen = Seen(real, Counting(), inputs, nothing)
    for adapter, weights in ((-1, None), (0, real.adapter(0)), (2, real.adapter(2))):
        for positions in ([5, 2], [2, 8, 0], [0, 2]):
            wanted = encoder.features(inputs, positions, weights, nothing)
            assert torch.allclose(seen(adapter, torch.tensor(positions)), wanted, rtol=0, atol=1e-5)
    assert asked == [(none, some) for none in (True, False, False) for some in ([5, 2], [8, 0])]
    assert seen.asked == 12


def answer(bank: Bank, encoder: Encoder, inputs: Texts, split: int = 1000) -> tuple[list[Answers], int]:
    seen = Seen(bank, encoder, inputs, nothing)
    parts = torch.arange(len(inputs)).split(split)
    return [VARIANTS["mos"](bank, 2, seen, part) for part in parts], seen.asked


def test_answers_do_not_depend_on_batches_or_on_what_was_asked_before(real: Bank, encoder: Encoder) -> None:
    inputs, before = texts(40), hashes(real.directory)
    adapters = [real.adapter(task) for task in range(3)]
    (whole,), made = answer(real, encoder, inputs)

    for split in (1, 7, 40):
        parts, _ = answer(real, encoder, inputs, split)
        assert torch.equal(torch.cat([part.classes for part in parts]), whole.classes)
        assert torch.equal(torch.cat([part.adapter for part in parts]), whole.adapter)
    assert hashes(real.directory) == before
    for task, adapter in enumerate(adapters):
        assert all(torch.equal(tensor, real.adapter(task)[name]) for name, tensor in adapter.items())
    assert whole.retrieval is not None
    paths = [set(path) | {0} for path in whole.retrieval.visited.tolist()]  # the prototypes need the first
    assert made == sum(len(path - {-1}) for path in paths) < 3 * len(inputs)
