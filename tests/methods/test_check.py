"""Every built-in method streams to the bits it has in memory, and the check itself has teeth.

python -m pytest tests/methods
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest

from mergebench import (
    Context,
    Passes,
    TaskVectors,
    Weights,
    gram,
    merge_method,
    methods,
    order_statistics,
    param,
    total,
)
from mergebench.errors import RecipeError
from mergebench.testing import check_method

VALUES = {
    "slerp": {"t": 0.3},
    "ties": {"density": 0.2},
    "dare_linear": {"density": 0.4},
    "dare_ties": {"density": (0.4, 0.7, 1.0)},
    "pcb": {"density": 0.1},
    "nearswap": {"t": 0.005},
    "nuslerp": {"weight": (0.3, 0.9)},
    "multislerp": {"weight": (0.5, 0.3, 0.4)},
    "passthrough": {"scale": 0.7},
    "breadcrumbs": {"density": (0.4, 0.3, 1.0), "gamma": 0.05},
    "breadcrumbs_ties": {"density": 0.3, "normalize": True},
    "della": {"density": (0.4, 0.7, 1.0), "epsilon": 0.2},
    "della_linear": {"density": 0.3},
    "sce": {"select_topk": 0.3},
    "ram": {"epsilon": 0.005},
    "ramplus_tl": {"epsilon": 0.005, "alpha": 0.8},
    "consensus_ta": {"k": 1},
    "tall_mask": {"task": 2},
    "localize_stitch": {"density": (0.05, 0.3, 0.1)},
}


@pytest.mark.parametrize("name", methods.names())
def test_streamed_equals_in_memory(name: str) -> None:
    check_method(methods.get(name), **VALUES.get(name, {}))


@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties", "sce", "ramplus_tl"])
def test_streamed_equals_in_memory_at_model_scope(name: str) -> None:
    check_method(dataclasses.replace(methods.get(name), scope="model"), **VALUES[name])


def test_sce_of_all_elements_streams() -> None:
    check_method(methods.get("sce"))


@pytest.mark.parametrize("variant", ["nlp", "vision-es", "vision"])
def test_pcb_variants_stream(variant: str) -> None:
    check_method(methods.get("pcb"), variant=variant, density=0.2)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("nuslerp", {"nuslerp_flatten": False}),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
        ("model_stock", {"filter_wise": True}),
    ],
)
def test_row_wise_variants_stream(name: str, more: dict[str, Any]) -> None:
    check_method(methods.get(name), **VALUES.get(name, {}), **more)


@pytest.mark.parametrize("name", ["nuslerp", "multislerp", "karcher", "model_stock"])
def test_directions_may_be_those_of_whole_models(name: str) -> None:
    check_method(dataclasses.replace(methods.get(name), scope="model"), **VALUES.get(name, {}))


@dataclass(frozen=True)
class Params:
    scale: float = param(1.0, "factor")


def test_a_method_that_sees_its_chunk_is_caught() -> None:
    @merge_method(takes="task_vectors", paper="none")
    def by_chunk(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
        """Divides by the largest value of the chunk, as if that were the tensor's."""
        return total(tvs) / (1 + tvs.abs().max())

    with pytest.raises(AssertionError, match="must not depend on where a chunk ends"):
        check_method(by_chunk)


def test_a_method_that_writes_into_its_input_is_caught() -> None:
    @merge_method(takes="task_vectors", paper="none")
    def careless(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
        """Scales in place."""
        return tvs.mul_(2)[0].clone()

    with pytest.raises(AssertionError, match="writes into its input"):
        check_method(careless)


@pytest.mark.parametrize("cut", ["element", "row", "tensor"])
def test_a_method_that_does_not_keep_the_base_as_it_says_is_caught(cut: Any) -> None:
    @merge_method(takes="task_vectors", paper="none", cut=cut, keeps_base=True)
    def restless(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
        """Adds a little to every element."""
        return total(tvs) + 0.01

    with pytest.raises(AssertionError, match="restless: keeps_base: it changes elements of matrix that no model"):
        check_method(restless)
    check_method(dataclasses.replace(restless, keeps_base=False))


def test_a_method_without_a_source_is_caught() -> None:
    @merge_method(takes="task_vectors", paper="")
    def nameless(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
        """Sums."""
        return total(tvs)

    with pytest.raises(AssertionError, match="names no source"):
        check_method(nameless)


@merge_method(takes="weights", paper="none", cut="row")
def unit_rows(weights: Weights, p: Params, ctx: Context) -> Passes:
    """The mean of the models' rows, each scaled to a largest value of one."""
    rows = weights.reshape(len(weights), -1, ctx.shape[-1] if ctx.shape else 1)
    largest = rows.abs().amax(dim=2, keepdim=True)
    return total((rows / (largest + 1e-6)).reshape(weights.shape)) / len(weights)


@merge_method(takes="weights", paper="none", cut="tensor")
def running_sum(weights: Weights, p: Params, ctx: Context) -> Passes:
    """Each element added to all before it."""
    return total(weights).cumsum(0) / 1000 * p.scale


@merge_method(takes="weights", paper="none", cut="row")
def rows_and_ranks(weights: Weights, p: Params, ctx: Context) -> Passes:
    """The mean of what lies above the median of the rows scaled to a largest value of one."""
    rows = weights.reshape(len(weights), -1, ctx.shape[-1] if ctx.shape else 1)
    scaled = (rows / (rows.abs().amax(dim=2, keepdim=True) + 1e-6)).reshape(weights.shape)
    (median,) = yield order_statistics(scaled, [ctx.numel // 2])
    return total((scaled - median).relu()) / len(weights)


@pytest.mark.parametrize("method", [unit_rows, running_sum, rows_and_ranks])
def test_methods_that_need_rows_or_tensors_get_them(method: Any) -> None:
    check_method(method)


@pytest.mark.parametrize("method", [unit_rows, running_sum])
def test_a_method_that_says_it_needs_less_is_caught(method: Any) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check_method(dataclasses.replace(method, cut="element"))


def test_questions_that_cannot_be_asked_of_such_pieces_are_refused() -> None:
    """Sums are taken over whole tiles, which rows do not respect; ranks are sampled at single elements."""

    @merge_method(takes="task_vectors", paper="none", cut="row")
    def rows_and_sums(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
        """Weights each model by its length."""
        dots = yield gram(tvs)
        return total(tvs, dots.diagonal().tolist())

    @merge_method(takes="task_vectors", paper="none", cut="tensor")
    def tensors_and_ranks(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
        """Takes off the median."""
        (median,) = yield order_statistics(tvs, [ctx.numel // 2])
        return total(tvs - median)

    with pytest.raises(RecipeError, match=r"TypeError: .*Gram cannot be asked with cut='row', scope 'tensor'"):
        check_method(rows_and_sums)
    with pytest.raises(RecipeError, match=r"TypeError: .*OrderStatistics cannot be asked with cut='tensor'"):
        check_method(tensors_and_ranks)
    with pytest.raises(RecipeError, match=r"TypeError: .*OrderStatistics cannot be asked with cut='row', scope 'mod"):
        check_method(dataclasses.replace(tensors_and_ranks, cut="row", scope="model"))
