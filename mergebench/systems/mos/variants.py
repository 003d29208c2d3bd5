"""A bank's answers at a stage: by MOS (arXiv:2412.09441), by MOS without one of its parts, and by rival methods.

Every variant is a function of the bank, the stage (the newest task it may know of), the features of the items under any
adapter, and which items to answer:

    simplecil     cosine to the class means of the frozen backbone (SimpleCIL, arXiv:2303.07338)
    first-task    the same under the first task's adapter
    sequential    the newest adapter and the rows as training left them; on a bank without merging: plain fine-tuning
    mos           all of it; on a bank without merging: MOS without merging
    no-retrieval  the newest adapter for every item
    first-guess   the adapter that the prototypes name, not refined
    no-alignment  the head's rows as training left them
    no-ensemble   the head alone
    frozen-head   the head alone, under the newest adapter; of a bank whose adapters add nothing: no adapters at all
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from mergebench.evaluation.head import Head
from mergebench.systems.mos.bank import Bank
from mergebench.systems.mos.retrieval import Ask, Retrieval, retrieve

TINY = 1e-12
NONE = -1  # the adapter of the backbone alone
Features = Callable[[int, Tensor], Tensor]  # an adapter, positions [m] -> features [m, d]; as `Seen`


@dataclass(frozen=True)
class Answers:
    """What was answered to n items."""

    classes: Tensor  # [n] int64, positions in the bank's classes
    adapter: Tensor  # [n] int64: the one whose features were classified
    retrieval: Retrieval | None = None


Variant = Callable[[Bank, int, Features, Tensor], Answers]
Choose = Callable[[Tensor, Ask, int], Tensor | Retrieval]  # guesses [n], ask, stage -> adapters [n]


def refined(guess: Tensor, ask: Ask, stage: int) -> Retrieval:
    """Self-refined retrieval."""
    return retrieve(guess, ask)


def guessed(guess: Tensor, ask: Ask, stage: int) -> Tensor:
    """The first guess."""
    return guess


def newest(guess: Tensor, ask: Ask, stage: int) -> Tensor:
    """The stage's own adapter."""
    return torch.full_like(guess, stage)


def mos(
    bank: Bank,
    stage: int,
    features: Features,
    positions: Tensor,
    *,
    choose: Choose = refined,
    head: Callable[[Bank, int], Head] = Bank.head,
    ensemble: bool = True,
) -> Answers:
    """softmax(head under the retrieved adapter) + softmax(b cosine to the prototypes), b: tasks so far.

    The prototypes' own answer is the first guess. That their branch gets sharper with b is the authors' code.
    """
    classifier, tasks = head(bank, stage), bank.task_of
    cosines = cosine(features(0, positions), bank.prototypes(stage))
    scores, scored = torch.empty_like(cosines), torch.full_like(positions, NONE)  # logits, and under which adapter

    def logits(adapter: int, items: Tensor) -> Tensor:
        found = linear(features(adapter, positions[items]), classifier.weight, classifier.bias)
        scores[items], scored[items] = found, adapter
        return found

    def ask(adapter: int, items: Tensor) -> Tensor:
        return tasks[logits(adapter, items).argmax(1)]

    chosen = choose(tasks[cosines.argmax(1)], ask, stage)
    retrieval = chosen if isinstance(chosen, Retrieval) else None
    adapter = chosen.adapter if isinstance(chosen, Retrieval) else chosen
    for one in torch.unique(adapter[scored != adapter]).tolist():  # never asked, or another one asked since
        logits(one, ((adapter == one) & (scored != one)).nonzero()[:, 0])
    if ensemble:
        scores = scores.softmax(1) + ((stage + 1) * cosines).softmax(1)
    return Answers(scores.argmax(1), adapter, retrieval)


def nearest(
    adapter: int,
    prototypes: Callable[[Bank, int], Tensor],
    bank: Bank,
    stage: int,
    features: Features,
    positions: Tensor,
) -> Answers:
    """The class whose mean is nearest in angle."""
    found = cosine(features(adapter, positions), prototypes(bank, stage)).argmax(1)
    return Answers(found, torch.full_like(found, adapter))


def sequential(bank: Bank, stage: int, features: Features, positions: Tensor) -> Answers:
    """The newest adapter and head, as training left them."""
    found = bank.trained(stage).logits(features(stage, positions)).argmax(1)
    return Answers(found, torch.full_like(found, stage))


VARIANTS: Mapping[str, Variant] = {
    "simplecil": partial(nearest, NONE, Bank.frozen),
    "first-task": partial(nearest, 0, Bank.prototypes),
    "sequential": sequential,
    "mos": mos,
    "no-retrieval": partial(mos, choose=newest),
    "first-guess": partial(mos, choose=guessed),
    "no-alignment": partial(mos, head=Bank.trained),
    "no-ensemble": partial(mos, ensemble=False),
    "frozen-head": partial(mos, choose=newest, ensemble=False),
}


def cosine(rows: Tensor, others: Tensor) -> Tensor:
    """[n, C]: the cosine of rows [n, d] and others [C, d]; zero with a row of zeros."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=TINY)
    return rows @ normalize(others, dim=1).T / lengths
