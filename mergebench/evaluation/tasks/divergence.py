"""Divergence: how far a language model's next tokens are from those of the model that it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from mergebench.evaluation.task import Common, Prediction, Ready, Score, asked, mean, task
from mergebench.networks.features import Texts, gather
from mergebench.networks.items import contents, read_rows, texts
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network
from mergebench.parameters import param

CLASS = "AutoModelForCausalLM"


@dataclass(frozen=True, kw_only=True)
class Params(Common):
    reference: Path = param(help="the directory of the model to compare with", folder=True)
    data: Path = param(help="JSON: an id and a text each, of what should stay as it is")
    id: str = param("id", "the column with the item's id")
    text: str = param("text", "the column with the text")
    positions: int = param(8, "the next tokens after so many of each text's last ones are compared", low=1)
    max_length: int = param(128, "tokens a text is cut to", low=2)


@task(network=CLASS)
def divergence(p: Params) -> Ready:
    """KL divergence of the next token's distribution from a reference model's, in nats: what an edit did elsewhere.

    Of each text, the mean of KL(reference, model) over its last positions. The reference runs once, and its
    distributions stay in memory: texts x positions x vocabulary x 4 bytes.
    """
    rows = read_rows(p.data, p.id, (p.text,), p.limit, p.seed)
    written = texts(rows, p.text)
    inputs = Texts(written, p.max_length)
    origin = open_model(str(p.reference))
    expected: list[Tensor] = []  # [positions, vocabulary] of each text, once it is known

    def logs(network: Network, place: int) -> Tensor:
        """Log-probabilities [positions, vocabulary] after the last tokens of a text, float32."""
        ids, mask = network.padded([inputs.tokens(network)[place]])
        found: Tensor = network.module(input_ids=ids, attention_mask=mask).logits[0, -p.positions :]
        return found.float().log_softmax(-1)

    def measure(network: Network, tick: Tick) -> Score:
        if not expected:
            beside = Network(origin, CLASS, network.device)
            with torch.inference_mode():
                expected.extend(logs(beside, place).cpu() for place in range(len(rows)))
            _check(beside, network, p)

        def apart(group: list[int]) -> Tensor:
            rows = []
            for place in group:
                own, found = expected[place].to(network.device), logs(network, place)
                if own.shape != found.shape:
                    raise _other(network, p)
                rows.append((own.exp() * (own - found)).double().sum(-1).mean().clamp(min=0))
            return torch.stack(rows)

        found = gather(network, apart, inputs.lengths(network), tick).tolist()
        predictions = {row.id: Prediction("", value) for row, value in zip(rows, found, strict=True)}
        return mean(predictions, "kl", "lower")

    files = (p.data, *(header.file for header in origin.headers))
    return Ready(len(rows), measure, files=files, items=contents(rows), asked=asked(rows, written))


def _check(reference: Network, network: Network, p: Params) -> None:
    if reference.tokenizer_key != network.tokenizer_key:
        raise _other(network, p)


def _other(network: Network, p: Params) -> ModelError:
    what = f"model '{network.name}': its tokens are others than those of {p.reference}"
    return ModelError(what, "reference: the model that it was made from")
