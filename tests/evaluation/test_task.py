"""Kinds of tasks: declared by a function, found by name, added by other packages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from mergebench import plugins as registry
from mergebench.errors import RecipeError
from mergebench.evaluation import Candidate, evaluate_models, load_suite, tasks
from mergebench.evaluation.task import Common, Ready, Score, task
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network
from mergebench.parameters import Parameter, param
from tests.evaluation.conftest import Files


@dataclass(frozen=True, kw_only=True)
class Params(Common):
    floor: float = param(help="least norm that counts", low=0)
    verbose: bool = param(False, "say more")


@task(network="AutoModelForMaskedLM")
def weight_norm(p: Params) -> Ready:
    """The norm of the word embeddings, as another package would measure it."""

    def measure(network: Network, tick: Tick) -> Score:
        tick(1)
        norm = network.module.get_input_embeddings().weight.norm().item()
        return Score(max(norm, p.floor), None, 1, {}, metric="norm", direction="lower")

    return Ready(1, measure)


not_a_task = weight_norm.function


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    """Entry points of the group, as installed packages would declare them."""
    points: list[EntryPoint] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "mergebench.tasks" else [])
    forget()
    yield points
    forget()


def forget() -> None:
    """Have the entry points looked up again."""
    tasks._registry.__dict__.pop("_plugins", None)


def point(name: str, attribute: str = "weight_norm") -> EntryPoint:
    return EntryPoint(name, f"{__name__}:{attribute}", "mergebench.tasks")


def test_what_a_kind_says_of_itself() -> None:
    assert weight_norm.name == "weight-norm"
    assert weight_norm.summary.startswith("The norm of the word embeddings")
    assert list(weight_norm.parameters) == ["split", "limit", "seed", "floor", "verbose"]
    assert weight_norm.parameters["floor"].required
    assert weight_norm.parameters["limit"] == Parameter(
        "limit", int, None, "how many items are used: the first ones, or drawn with `seed`", low=1
    )
    built_in = tasks.get("text-classification")
    assert {name for name, key in built_in.parameters.items() if key.required} == {"data", "head"}
    assert built_in.parameters["max_length"].type is int
    assert built_in.parameters["data"].type is Path
    assert all(key.help for key in built_in.parameters.values())
    assert built_in.summary


def test_a_kind_of_another_package_beside_a_built_in_one(plugins: list[EntryPoint], encoder: Path, place: Path) -> None:
    """Each with a transformers class of its own, in the suite's order."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig.from_pretrained(encoder))
    model.save_pretrained(place / "lm")
    for file in encoder.glob("token*"):
        (place / "lm" / file.name).write_bytes(file.read_bytes())
    plugins.append(point("weight-norm"))
    assert {"text-classification", "weight-norm"} <= set(tasks.names())
    text = {"kind": "text-classification", "data": "data.jsonl", "head": "a/head.safetensors"}
    norm = {"kind": "weight-norm", "floor": 1}
    suite = load_suite({"tasks": [{"name": "n", **norm}, {"name": "t", **text}, {"name": "n2", **norm}]})
    results = evaluate_models([Candidate("lm", "base", Files(place / "lm"))], suite)
    assert [(record.task, record.metric, record.direction) for record in results.records] == [
        ("n", "norm", "lower"), ("t", "accuracy", "higher"), ("n2", "norm", "lower"),
    ]  # fmt: skip
    expected = model.get_input_embeddings().weight.norm().item()
    assert results.records[0].value == results.records[2].value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (0, None),
        (0.5, None),
        (-1, "must be at least 0"),
        ("1", "must be a number, at least 0"),
        (True, "must be a number"),
    ],
)
def test_numbers(value: object, complaint: str | None) -> None:
    found = weight_norm.parameters["floor"].complaint(value)
    assert found is None if complaint is None else complaint in (found or "")
    assert weight_norm.parameters["verbose"].complaint(value) == (None if value is True else "must be true or false")


def test_names_that_clash_or_lead_nowhere(plugins: list[EntryPoint], monkeypatch: pytest.MonkeyPatch) -> None:
    plugins.append(point("other", "not_a_task"))
    with pytest.raises(RecipeError, match=r"'other' of .* is not made with @task"):
        tasks.get("other")
    with pytest.raises(RecipeError, match="no kind of task is called 'othr'") as caught:
        tasks.get("othr")
    assert caught.value.hint == "did you mean 'other'?"
    plugins.append(point("text-classification"))
    forget()
    with pytest.raises(RecipeError, match=r"both mergebench and .* provide it"):
        tasks.names()
    monkeypatch.setenv("MERGEBENCH_PLUGINS", "")
    forget()
    assert "weight-norm" not in tasks.names()


def test_a_function_that_is_no_task() -> None:
    def two(p: Params, more: int) -> Ready:
        raise NotImplementedError

    def bare(p: int) -> Ready:
        raise NotImplementedError

    for function in (two, bare):
        with pytest.raises(TypeError, match="a dataclass made from Common"):
            task(network="AutoModel")(function)
