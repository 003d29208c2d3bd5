"""RegMean++'s Gram matrices (arXiv:2508.03121): each block's inputs come from the merged blocks below it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.files import Files
from mergebench.engine.context import Context, OnData
from mergebench.engine.plan import Plan
from mergebench.engine.span import Span
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network
from mergebench.systems.on_data.answers import LONGEST
from mergebench.systems.on_data.gram import Linears, grams
from mergebench.systems.on_data.texts import Data
from mergebench.systems.on_data.weights import Weights, check_memory


def grams_of_merged(
    plan: Plan, data: Sequence[Data], device: torch.device, tick: Tick
) -> tuple[list[dict[str, Tensor]], list[str]]:
    """Each model's Gram matrices by the base's names, and the weights that are stored as [inputs, outputs].

    Blocks from the first to the last: with model i's own block on top of the merged ones, its texts run up to there;
    then the block is merged. `tick` gets the number of texts each time they ran, once a block.
    """
    merge = plan.merge
    network = Network(merge.reference, "AutoModel", device, packed=False)
    linears, blocks = Linears(network), network.blocks
    check_memory(merge.reference, 4 * len(data) * sum(linears.width(name) ** 2 for name in linears.modules))
    tokens = [network.tokenize(one.texts, one.settings.max_length or LONGEST) for one in data]
    found: list[dict[str, Tensor]] = [{} for _ in data]
    with Files() as files:
        weights = Weights(plan, files, network)
        for name in weights.names:
            weights.put(name, merged(plan, name, weights.rows(name), None))
        for block in blocks.values():
            own = weights.inside(block)
            linear = [name for name in own if name in linears.modules]
            run = _up_to(network, block)
            for number, texts in enumerate(tokens):
                for name in own:
                    weights.put(name, weights.rows(name)[number])
                found[number] |= grams(network, linears, linear, texts, tick, run)
            for name in own:
                measured = None
                if name in linear:
                    values = torch.stack([one[name] for one in found])
                    measured = OnData(values, (1.0,) * len(found), name in linears.inputs_first)
                weights.put(name, merged(plan, name, weights.rows(name), measured))
    return found, linears.inputs_first


def merged(plan: Plan, name: str, rows: Tensor, on_data: OnData | None) -> Tensor:
    """The method's result on a whole tensor [models, elements], in memory."""
    merge, numel = plan.merge, rows.shape[1]
    shape = merge.reference.tensors[name].shape
    cpu = torch.device("cpu")
    context = Context(numel, merge.names, (Span(name, 0, numel),), shape, "tensor", merge.seed, cpu, on_data)
    result: Tensor = merge.method(rows, merge.params_for(name), context)
    return result


class _Reached(Exception):
    """The block that was wanted has run."""


def _up_to(network: Network, block: torch.nn.Module) -> Callable[[Tensor, Tensor], None]:
    """Run a batch through the network as far as a block, that included."""

    def stop(*_: Any) -> None:
        raise _Reached

    def run(ids: Tensor, mask: Tensor) -> None:
        handle = block.register_forward_hook(stop)
        try:
            network.last_states(ids, mask)
        except _Reached:
            pass
        finally:
            handle.remove()

    return run
