"""Any valid recipe, of any method, to a dict, to JSON and back: an equal recipe."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mergebench import methods
from mergebench.parameters import Parameter
from mergebench.recipe import load


def values(parameter: Parameter) -> st.SearchStrategy[Any]:
    if parameter.choices:
        return st.sampled_from(parameter.choices)
    if parameter.type in (str, bool):
        return st.text() if parameter.type is str else st.booleans()
    if parameter.type is int:
        return st.integers(int(parameter.low or 0), int(parameter.high or 2**31))
    low = parameter.above if parameter.low is None else parameter.low
    numbers = st.floats(low, parameter.high, exclude_min=parameter.above is not None, allow_nan=False)
    return numbers.filter(lambda x: abs(x) < 3.4e38)


words = st.text(min_size=1).filter(str.strip)
references = words.filter(lambda text: not set("*?") & set(text))  # those of a glob are read from the disk


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """Any valid recipe, for any method."""
    method = methods.get(draw(st.sampled_from([name for name in methods.names() if name != "picky"])))
    parameters = method.parameters.values()
    each = st.fixed_dictionaries({}, optional={p.name: values(p) for p in parameters if p.per_model})
    required = {p.name: values(p) for p in parameters if p.required}
    optional = {p.name: values(p) for p in parameters if not p.required}
    read = {"statistics": words} if method.statistics is not None else {}
    entry = st.fixed_dictionaries({"model": references, **read}, optional={"parameters": each})
    vector = st.fixed_dictionaries({"task_vector": words}, optional={"parameters": each})
    dtypes = st.sampled_from(["float32", "float16", "bfloat16", "torch.float32"])
    suite = st.dictionaries(st.text(), st.lists(st.text() | st.booleans() | st.integers(-9, 9)), min_size=1)
    measured = {"baselines": st.lists(st.sampled_from(["linear", "ties", "pcb"]), unique=True)}
    evaluate = st.fixed_dictionaries({"suite": words | suite}, optional=measured)
    number = st.floats(-9, 9)
    lines = st.fixed_dictionaries({"alpha": st.just("auto") | number, "beta": number})
    return draw(
        st.fixed_dictionaries(
            {
                "merge_method": st.just(method.name),
                "base_model": words,
                "models": st.lists(entry if read else entry | vector, min_size=1, max_size=4),
                "parameters": st.fixed_dictionaries(required, optional=optional),
            },
            optional={
                "scope": st.sampled_from(["tensor", "model"]),
                "include": st.lists(words),
                "exclude": st.lists(words),
                "seed": st.integers(0, 2**63 - 1),
                "dtype": dtypes,
                "out_dtype": dtypes,
                "evaluate": evaluate,
                **({"lines": lines} if method.takes == "task_vectors" and method.gives == "model" else {}),
            },
        )
    )


@given(recipes())
@settings(max_examples=200, deadline=None)
def test_round_trip(data: dict[str, Any]) -> None:
    recipe = load(data)
    again = load(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert again.to_dict() == recipe.to_dict()
    assert again.params(again.models) == recipe.params(recipe.models)
    recipe.method.make_params(recipe.params(recipe.models))
