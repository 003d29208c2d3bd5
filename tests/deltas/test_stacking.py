"""Several things on one base, BASE+A+B: what folding A, then B, gives, wherever a model goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mergebench
from mergebench.deltas.open import open_model
from tests.conftest import Cli
from tests.deltas.kinds import CHANGES, SQUARE, UP, assert_equal, fold, merge, merge_slices, write_adapter
from tests.models import fine_tuned, read_model

pytestmark = pytest.mark.usefixtures("world")
BASE, PATCH = "base+lora", CHANGES["patch"]
ADAPTED = f"{SQUARE[1]}.weight"

PAIRS = [
    ("lora", "other"),
    ("other", "lora"),
    ("lora", "dora"),
    ("dora", "lora"),  # DoRA's norms are those of what it stands on
    ("lora", PATCH),
    (PATCH, "dora"),
    ("biases", "bias_of_b"),  # the bias saved whole, then added to
    ("bias_of_b", "biases"),  # added to, then replaced
    ("lora", "emr/tasks/ft1"),
    ("whole", "conv"),
    ("lora", "vector"),
    ("vector", "dora"),
]


@pytest.fixture
def vector(world: Path) -> None:
    """`vector`, what `mergebench task-vector` writes."""
    mergebench.task_vector("ft1", "base", "vector")


def two_steps(first: str, second: str) -> str:
    """What folding one, then the other, gives; a task vector by task arithmetic."""
    reference = "base"
    for number, change in enumerate((first, second)):
        out = f"step{number}"
        if change == "vector":
            merge(out, "task_arithmetic", [{"task_vector": change}], reference, dtype="float32")
            reference = out
        else:
            reference = fold(f"{reference}+{change}", out)
    return reference


@pytest.mark.usefixtures("vector")
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=[f"{first}+{second}" for first, second in PAIRS])
def test_one_on_top_of_another(first: str, second: str) -> None:
    wanted, stacked = read_model(Path(two_steps(first, second))), f"base+{first}+{second}"
    assert_equal(open_model(stacked).state_dict(), wanted)
    assert_equal(merge("found", "passthrough", [stacked]), wanted)


def test_the_order_counts() -> None:
    """Or the test above would not tell."""
    found = [read_model(Path(fold(f"{fold(f'base+{first}', f'{first}1')}+{second}", f"{second}2")))[ADAPTED]
             for first, second in (("lora", "dora"), ("dora", "lora"))]  # fmt: skip
    assert not torch.equal(*found)


@pytest.mark.usefixtures("vector")
def test_a_task_vector_on_a_base() -> None:
    wanted = merge("wanted", "task_arithmetic", [{"task_vector": "vector"}], "base")
    assert_equal(open_model("base+vector").state_dict(), wanted)
    assert_equal(merge("found", "passthrough", ["base+vector"]), wanted)
    assert_equal(
        merge("onto", "task_arithmetic", ["ft2"], "base+vector"), merge("too", "task_arithmetic", ["ft2"], "wanted")
    )


def test_three_on_top_of_one_another() -> None:
    wanted = read_model(Path(fold(f"{two_steps('lora', 'dora')}+other", "step2")))
    assert_equal(open_model("base+lora+dora+other").state_dict(), wanted)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear"])
def test_two_on_a_base_among_the_models(method: str) -> None:
    folded = two_steps("lora", "dora")
    wanted = merge("wanted", method, [folded, "ft1"], "base")
    # as a difference to the same checkpoint, the sum of the deltas; the fold rounds base plus deltas, then subtracts
    assert_equal(merge("found", method, ["base+lora+dora", "ft1"], "base"), wanted, close=1e-6)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_two_on_the_base_of_a_merge(method: str) -> None:
    wanted = merge("wanted", method, ["ft1", "ft2"], two_steps("lora", "dora"))
    assert_equal(merge("found", method, ["ft1", "ft2"], "base+lora+dora"), wanted)


def test_layers_of_two_on_a_base() -> None:
    wanted, found = (
        merge_slices(out, "passthrough", [(model, 2, 4)], [("ft1", 0, 1)])
        for out, model in (("wanted", two_steps("lora", "dora")), ("found", "base+lora+dora"))
    )
    assert_equal(found, wanted)


def test_two_on_a_base_on_the_command_line(cli: Cli) -> None:
    folded = two_steps("lora", PATCH)
    for reference, out in ((folded, "wanted-vector"), (f"base+lora+{PATCH}", "found-vector")):
        assert cli("task-vector", reference, "--base", "base", "--out", out, "-q").code == 0
    assert_equal(read_model(Path("found-vector")), read_model(Path("wanted-vector")), close=1e-6)  # see above
    for base in ("base", folded):
        ran = cli("diff", folded, f"base+lora+{PATCH}", "--base", base, "--json")
        assert ran.code == 0 and all(row["changed"] == 0 for row in json.loads(ran.out)["tensors"])
    shown = cli("inspect", f"base+lora+{PATCH}")
    assert shown.code == 0 and "lora" in shown.out and PATCH in shown.out


def test_an_adapter_folded_into_a_base_with_another() -> None:
    wanted = read_model(Path(two_steps("lora", "dora")))
    assert_equal(read_model(mergebench.run(mergebench.plan_fold(BASE, "dora"), "found").out), wanted)


def test_each_change_of_a_stack_must_fit() -> None:
    """The one that does not is named, not the whole reference's last."""
    write_adapter(Path("stranger"), fine_tuned({"elsewhere.weight": torch.zeros(4, 4)}, 0), ["elsewhere"])
    with pytest.raises(mergebench.MergebenchError, match=r"stranger: the base has no tensor 'elsewhere\.weight'"):
        open_model("base+stranger+lora")


def test_a_path_with_a_plus_in_it_is_a_path() -> None:
    """An existing path goes first, also where each part of it is one."""
    Path("base").rename("b+lora")
    assert open_model("b+lora").state_dict().keys() == open_model("b+lora+other").state_dict().keys()
    assert not torch.equal(open_model("b+lora+other").state_dict()[ADAPTED], open_model("b+lora").state_dict()[ADAPTED])
    assert {f"{module}.weight" for module in UP} < read_model(Path("b+lora")).keys()
