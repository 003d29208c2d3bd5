"""Declared parameters: what a dataclass says of them, what they refuse, and how a command line's text is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from mergebench.parameters import PerModel, make_params, param, parameters_of, params_of

if TYPE_CHECKING:
    from nowhere import Late


@dataclass(frozen=True)
class Params:
    share: float = param(help="share kept", above=0, high=1)
    dropout: float = param(0.1, low=0, below=1)
    count: int | None = param(None, low=1, high=2**20)
    layer: int | Literal["all"] = param(-1, "its number, or all")
    mode: Literal["fast", "slow"] = param("fast", "how")
    weight: PerModel = param(1.0, per_model=True)
    lambda_: float = param(1.0)
    data: Path | str = param("here")
    seeds: list[int] = param([0, 1], low=0)
    until: list[str] = param([])
    flag: bool = False
    inner: object = None


PARAMETERS = parameters_of(Params)


def test_what_a_declaration_says() -> None:
    assert list(PARAMETERS) == [f.rstrip("_") for f in Params.__dataclass_fields__]
    assert [name for name, p in PARAMETERS.items() if p.required] == ["share"]
    assert {name: p.type for name, p in PARAMETERS.items() if name != "inner"} == {
        "share": float, "dropout": float, "count": int, "layer": int, "mode": str, "weight": float, "lambda": float,
        "data": Path | str, "seeds": list[int], "until": list[str], "flag": bool,
    }  # fmt: skip
    assert PARAMETERS["mode"].choices == ("fast", "slow") and PARAMETERS["layer"].choices == ("all",)
    assert PARAMETERS["seeds"].default == [0, 1] and PARAMETERS["flag"].default is False
    assert PARAMETERS["share"].about() == "share kept, above 0, at most 1"
    assert PARAMETERS["mode"].about() == "how, fast | slow"
    assert PARAMETERS["count"].range_text() == "at least 1, at most 1,048,576"


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("share", 1, None),
        ("share", 0, "must be above 0, at most 1"),
        ("share", "1", "must be a number, above 0, at most 1"),
        ("share", True, "must be a number, above 0, at most 1"),
        ("share", None, "must be a number, above 0, at most 1"),
        ("share", float("nan"), "must be finite"),
        ("lambda", 10**400, "must be finite"),
        ("lambda", -1e39, "must be within ±3.4e38, float32's range"),
        ("dropout", 0, None),
        ("dropout", 1, "must be at least 0, below 1"),
        ("count", 3.0, None),
        ("count", 3.5, "must be a whole number, at least 1, at most 1,048,576"),
        ("layer", "all", None),
        ("layer", -2, None),
        ("layer", "some", "must be a whole number or all"),
        ("mode", "slow", None),
        ("mode", "slower", "must be one of fast, slow"),
        ("mode", ["slow"], "must be one of fast, slow"),
        ("data", " ", "must be a name or a path"),
        ("seeds", [], None),
        ("seeds", [0, 2], None),
        ("seeds", [0, -2], "each must be at least 0"),
        ("seeds", [0, True], "each must be a whole number, at least 0"),
        ("seeds", 3, "must be a list of whole numbers, at least 0"),
        ("until", ["a", ""], "must be a list of texts"),
        ("flag", 1, "must be true or false"),
        ("inner", 5, None),
    ],
)
def test_what_is_refused(name: str, value: object, complaint: str | None) -> None:
    assert PARAMETERS[name].complaint(value) == complaint


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("share", "0.5", 0.5),
        ("share", "1e-3", 1e-3),
        ("share", "half", "half"),
        ("count", "3", 3),
        ("count", "3.5", 3.5),
        ("layer", "all", "all"),
        ("layer", "-1", -1),
        ("flag", "True", True),
        ("flag", "1", "1"),
        ("mode", "3", "3"),
    ],
)
def test_text_of_a_command_line(name: str, text: str, value: object) -> None:
    read = PARAMETERS[name].read(text)
    assert read == value and type(read) is type(value)


def test_values_become_the_declared_type() -> None:
    for name, value, kind in (("share", 1, float), ("count", 3.0, int), ("layer", "all", str), ("flag", True, bool)):
        assert type(PARAMETERS[name].plain(value)) is kind
    made = make_params(Params, {"share": 0.5, "lambda": 2.0})
    assert (made.share, made.lambda_, made.mode, made.seeds) == (0.5, 2.0, "fast", [0, 1])


def test_only_the_parameters_of_a_function_are_looked_at() -> None:
    """Other annotations may name what is imported later, such as a tensor."""

    def edit(rows: Late, p: Params) -> Late:
        raise NotImplementedError

    def task(p: Params) -> Late:
        raise NotImplementedError

    def bare(rows: Late, p: int) -> Late:
        raise NotImplementedError

    assert params_of(edit, 2, "an edit takes …") is params_of(task, 1, "a task takes …") is Params
    for function, count in ((edit, 3), (bare, 2)):
        with pytest.raises(TypeError, match="two arguments"):
            params_of(function, count, "two arguments, please")
