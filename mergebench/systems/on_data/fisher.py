"""The diagonal of a model's Fisher information on texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergebench.errors import RunError
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network
from mergebench.systems.on_data.answers import Answers
from mergebench.systems.on_data.texts import Data


def fisher_of(
    network: Network, answers: Answers, data: Data, tokens: Sequence[Sequence[int]], tick: Tick
) -> dict[str, Tensor]:
    """E_x E_(y ~ p(y | x)) (d log p(y | x) / d theta)^2 by the names in the files, float32 on the CPU.

    Of a classifier the inner expectation is the sum over all classes, a mean over texts. Of a language model, whose y
    are the next tokens of a text, one answer is drawn for each token: the answers are independent, so the square of
    the sum of their gradients has the sum of the squares as its mean. It is a mean over tokens. With true labels, those
    stand in for the answers.
    """
    true, seed = data.settings.labels == "true", data.settings.seed or 0
    values = trainable(network)
    sums = {name: torch.zeros_like(value) for name, value in values.items()}
    count = 0
    for position, one in enumerate(tokens):
        logs = answers.logits(network, [one]).log_softmax(-1)  # [1, classes], or [tokens - 1, vocabulary]
        if len(logs) and (true or answers.next_tokens):
            if true:
                given = answers.true(network, data, [one], [position])
            else:
                generator = torch.Generator().manual_seed(seed + position)
                given = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator)[:, 0].to(logs.device)
            _add(sums, logs.gather(1, given[:, None]).sum(), values, 1.0)
        elif len(logs):
            for log in logs[0]:
                _add(sums, log, values, float(log.detach().exp()))
        count += len(logs)
        tick(1)
    if not count:
        raise RunError(f"{data.file}: no text has a second token", "a language model answers with the next token")
    return {name: (one / count).cpu() for name, one in sums.items()}


def trainable(network: Network) -> dict[str, Tensor]:
    """The float parameters by their names in the files, which gradients are taken of from now on."""
    values = {}
    for name, places in network.places.items():
        if places and getattr(*places[0]).is_floating_point():
            values[name] = getattr(*places[0]).requires_grad_()
    return values


def _add(sums: dict[str, Tensor], log: Tensor, values: dict[str, Tensor], share: float) -> None:
    """Add share * (gradient of log)^2; what the answer does not depend on adds nothing."""
    slopes = torch.autograd.grad(log, list(values.values()), retain_graph=True, allow_unused=True)
    for name, slope in zip(sums, slopes, strict=True):
        if slope is not None:
            sums[name].addcmul_(slope, slope, value=share)
