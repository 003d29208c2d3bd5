"""AdaMerging's factors (arXiv:2310.02575): learnt by the entropy of the merged model's answers to unlabelled texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from mergebench.checkpoint.files import Files
from mergebench.engine.plan import Plan
from mergebench.errors import ModelError, RunError
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network
from mergebench.systems.on_data.answers import Answers, answers_of
from mergebench.systems.on_data.texts import Data
from mergebench.systems.on_data.weights import Weights, check_memory


class Learnt(NamedTuple):
    """The factors, and the entropies (in nats, the sum over the tasks) at the first step and at the last."""

    coefficients: list[dict[str, float]]  # of each model, by the base's names
    entropy: tuple[float, float]


def learn(plan: Plan, data: Sequence[Data], device: torch.device, tick: Tick) -> Learnt:
    """Learn lambda: `steps` of Adam on batches of all tasks' texts. `tick` gets the number of texts of each step."""
    merge, p = plan.merge, plan.merge.params
    answers = [answers_of(model, one.settings) for model, one in zip(merge.models, data, strict=True)]
    if len({one.auto_class for one in answers}) > 1:
        what = "some models answer by a head of their task, others by their own"
        raise ModelError(f"data: {what}", "give every task a head, or none: data: {file: FILE, head: FILE}")
    network = Network(merge.reference, answers[0].auto_class, device, packed=False)
    tokens = [network.tokenize(one.texts, asked.max_length) for one, asked in zip(data, answers, strict=True)]
    with Files() as files:
        weights = Weights(plan, files, network)
        differ = [name for name in weights.names if any(one.stored or one.added for one in plan.operands[name])]
        sizes = [merge.reference.tensors[name].numel for name in differ]
        check_memory(merge.reference, 4 * (len(data) + 1) * sum(sizes))
        changed = {name: weights.rows(name) - weights.base(name) for name in weights.names}
        changed = {name: rows.to(device) for name, rows in changed.items() if rows.any()}
        base = {name: weights.base(name).to(device) for name in changed}
        numbers = {name: number if p.coefficients == "layer" else 0 for number, name in enumerate(changed)}
        raw = torch.full((len(data), max(numbers.values(), default=0) + 1), p.init, device=device, requires_grad=True)
        adam = torch.optim.Adam([raw], lr=p.lr)
        batches = [_batches(one, p.batch, merge.seed + number) for number, one in enumerate(tokens)]
        entropy = [math.nan]
        for _ in range(p.steps):
            factors = raw.detach().clamp(0, 1)
            for name, number in numbers.items():
                weights.put(name, base[name] + factors[:, number] @ changed[name])
                weights.place(name).requires_grad_().grad = None
            found = [_step(network, one, next(texts)) for one, texts in zip(answers, batches, strict=True)]
            entropy.append(sum(found))
            if not math.isfinite(entropy[-1]):
                raise RunError("adamerging: the entropy is not finite", "look for NaN or Inf in the models")
            raw.grad = torch.zeros_like(raw)
            for name, number in numbers.items():
                slope = weights.place(name).grad
                if slope is not None:
                    raw.grad[:, number] += changed[name] @ slope.reshape(-1)
            raw.grad *= ((raw >= 0) & (raw <= 1)).detach()  # of clamp
            adam.step()
            tick(p.batch * len(data))
    factors = raw.detach().clamp(0, 1).cpu()
    learnt = [
        {name: float(row[numbers[name]]) if name in numbers else p.init for name in plan.alignment.merged}
        for row in factors
    ]
    return Learnt(learnt, (entropy[min(1, p.steps)], entropy[-1]))


def _step(network: Network, answers: Answers, tokens: Sequence[Sequence[int]]) -> float:
    """Add the gradients of a batch's mean entropy to the parameters'; returns the entropy."""
    logs = answers.logits(network, tokens).log_softmax(-1)
    loss = -(logs.exp() * logs).sum(-1).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def _batches(tokens: Sequence[Sequence[int]], size: int, seed: int) -> Iterator[list[Sequence[int]]]:
    """Batches of texts without end, each epoch in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(tokens), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield [tokens[position] for position in order[start : start + size]]
