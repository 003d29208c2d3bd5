"""A base with something on it is the model that it folds to, wherever a base goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mergebench
from mergebench.deltas.open import open_model
from tests.conftest import Cli
from tests.deltas.kinds import CHANGES, SQUARE, assert_equal, base_tensors, fold, merge, merge_slices, write_adapter
from tests.evaluation.search.conftest import write_search
from tests.models import read_model, write_model

pytestmark = pytest.mark.usefixtures("world")
BASE = "base+lora"
ADAPTED, WHOLE = f"{SQUARE[1]}.weight", "model.norm.weight"


@pytest.mark.parametrize("change", CHANGES)
def test_it_folds_to_another_model(change: str) -> None:
    """The oracle is not the base itself, and is what the model is in memory."""
    folded = read_model(Path(fold(f"base+{CHANGES[change]}")))
    assert_equal(open_model(f"base+{CHANGES[change]}").state_dict(), folded)
    assert not torch.equal(folded[ADAPTED], read_model(Path("base"))[ADAPTED])


# -- as a base -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("method", "parameters"),
    [("task_arithmetic", {"weight": 0.5}), ("ties", {"density": 0.4}), ("dare_linear", {"density": 0.5})],
)
def test_fine_tunes_on_it(change: str, method: str, parameters: dict[str, float]) -> None:
    reference = f"base+{CHANGES[change]}"
    wanted = merge("wanted", method, ["ft1", "ft2"], fold(reference), parameters=parameters)
    assert_equal(merge("found", method, ["ft1", "ft2"], reference, parameters=parameters), wanted)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_task_vectors_on_it(change: str, method: str) -> None:
    reference = f"base+{CHANGES[change]}"
    vectors = []
    for name in ("ft1", "ft2"):
        mergebench.task_vector(name, "base", f"{name}-vector")
        vectors.append({"task_vector": f"{name}-vector", "parameters": {"weight": 0.3}})
    wanted = merge("wanted", method, vectors, fold(reference))
    assert_equal(merge("found", method, vectors, reference), wanted)


@pytest.mark.parametrize("change", CHANGES)
def test_weights_of_zero_give_it(change: str) -> None:
    reference = f"base+{CHANGES[change]}"
    wanted = read_model(Path(fold(reference)))
    assert_equal(merge("found", "task_arithmetic", ["ft1"], reference, parameters={"weight": 0.0}), wanted)


def test_a_base_in_half_precision_is_folded_in_float32() -> None:
    base = {name: value.bfloat16() if value.is_floating_point() else value for name, value in base_tensors().items()}
    write_model(Path("half"), base, shards=2)
    models = [{"model": "ft1", "parameters": {"weight": 0.7}}]
    wanted = merge("wanted", "task_arithmetic", models, fold("half+lora"), dtype="float32")
    assert_equal(merge("found", "task_arithmetic", models, "half+lora", dtype="float32"), wanted)
    rounded = merge("rounded", "task_arithmetic", models, "half+lora")
    assert_equal(rounded, {name: value.to(base[name].dtype) for name, value in wanted.items()})


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_other_changes_to_the_same_checkpoint(method: str) -> None:
    """BASE+OTHER is the base plus OTHER minus the base's own delta."""
    models = ["base+other", "base+dora", "ft1"]
    wanted = merge("wanted", method, models, fold(BASE))
    # the shared checkpoint may cancel in either order, which rounds otherwise
    assert_equal(merge("found", method, models, BASE), wanted, close=1e-6)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_the_plain_base_is_another_model(method: str) -> None:
    """Its task vector is minus the delta: alone, at weight 1, the plain base comes back."""
    wanted = merge("wanted", method, ["base", "ft1"], fold(BASE))
    # the shared checkpoint may cancel before or after the delta is added
    assert_equal(merge("found", method, ["base", "ft1"], BASE), wanted, close=1e-6)
    assert_equal(merge("back", "task_arithmetic", ["base"], BASE), read_model(Path("base")), close=1e-6)


def test_the_base_listed_again_has_no_vote() -> None:
    parameters = {"normalize": True}
    folded = fold(BASE)
    wanted = merge("wanted", "task_arithmetic", [folded, "ft1"], folded, parameters=parameters)
    assert_equal(merge("found", "task_arithmetic", [BASE, "ft1"], BASE, parameters=parameters), wanted)


def test_one_of_a_fixed_number_of_models() -> None:
    folded = fold(BASE)
    wanted = merge("wanted", "slerp", ["ft1", folded], folded, parameters={"t": 0.3})
    assert_equal(merge("found", "slerp", ["ft1", BASE], BASE, parameters={"t": 0.3}), wanted)


def test_one_of_a_fixed_number_of_models_unlisted() -> None:
    """It comes first."""
    wanted = merge("wanted", "slerp", ["ft1"], fold(BASE), parameters={"t": 0.3})
    assert_equal(merge("found", "slerp", ["ft1"], BASE, parameters={"t": 0.3}), wanted)


def test_over_the_whole_model() -> None:
    """Statistics over all tensors see the base's own deltas, whatever the chunk and the workers."""
    more = {"scope": "model", "parameters": {"density": 0.3}}
    wanted = merge("wanted", "ties", ["ft1", "ft2"], fold(BASE), **more)
    recipe = {"merge_method": "ties", "base_model": BASE, "models": [{"model": "ft1"}, {"model": "ft2"}], **more}
    plan = mergebench.plan(mergebench.load(recipe), chunk=40, workers=2, device="cpu")
    assert_equal(read_model(mergebench.run(plan, "found").out), wanted)


# -- what is not merged is copied from it ----------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("globs", [{"exclude": [ADAPTED]}, {"include": ["model.embed_tokens.weight"]}])
def test_a_passthrough_copies_what_it_folds_to(change: str, globs: dict[str, Any]) -> None:
    wanted = read_model(Path(fold(f"base+{CHANGES[change]}")))
    assert_equal(merge("found", "passthrough", [f"base+{CHANGES[change]}"], **globs), wanted)


def test_a_copy_is_rounded_once() -> None:
    base = {name: value.bfloat16() if value.is_floating_point() else value for name, value in base_tensors().items()}
    write_model(Path("half"), base)
    wanted = merge("wanted", "passthrough", ["half+lora"])
    assert_equal(merge("found", "passthrough", ["half+lora"], exclude=["*.weight"]), wanted)


def test_what_a_merge_leaves_out_is_the_bases_fold() -> None:
    folded = read_model(Path(fold(BASE)))
    found = merge("found", "linear", ["ft1", "ft2"], BASE, exclude=[ADAPTED])
    assert torch.equal(found[ADAPTED], folded[ADAPTED])


def test_what_a_merge_leaves_out_is_not_the_models() -> None:
    """The plain base is the reference, whatever the models have on it."""
    base = read_model(Path("base"))
    found = merge("found", "task_arithmetic", ["base+lora", "base+whole"], "base", exclude=[ADAPTED, WHOLE])
    assert torch.equal(found[ADAPTED], base[ADAPTED]) and torch.equal(found[WHOLE], base[WHOLE])


def test_a_tensor_saved_whole_is_copied() -> None:
    folded = read_model(Path(fold("base+whole")))
    found = merge("found", "passthrough", ["base+whole"], exclude=[WHOLE])
    assert torch.equal(found[WHOLE], folded[WHOLE])


# -- other commands --------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES)
def test_a_task_vector_from_it(change: str, cli: Cli) -> None:
    reference = f"base+{CHANGES[change]}"
    for base, out in ((fold(reference), "wanted"), (reference, "found")):
        assert cli("task-vector", "ft1", "--base", base, "--out", out, "-q").code == 0
    assert_equal(read_model(Path("found")), read_model(Path("wanted")))


def test_a_difference_to_it(cli: Cli) -> None:
    rows = []
    for base in (fold(BASE), BASE):
        ran = cli("diff", "ft1", "base+other", "--base", base, "--json")
        assert ran.code == 0
        rows.append(json.loads(ran.out)["tensors"])
    assert [row["tensor"] for row in rows[0]] == [row["tensor"] for row in rows[1]]
    for wanted, found in zip(*rows, strict=True):
        del wanted["tensor"], found["tensor"]
        assert found == pytest.approx(wanted, rel=1e-6)


def test_an_adapter_taken_out_of_what_was_trained_on_it() -> None:
    for base, out in ((fold(BASE), "wanted"), (BASE, "found")):
        mergebench.extract_adapter(base, "ft1", out, rank=2)
    names = [Path(out) / "adapter_model.safetensors" for out in ("found", "wanted")]
    assert_equal(load_file(names[0]), load_file(names[1]))


@pytest.mark.parametrize("change", ["LoRA", "DoRA", "biases saved whole", "patch", "task of EMR"])
def test_tasks_merged_on_it(change: str) -> None:
    """The vector and the masks are differences to what it folds to; a task goes on top of both."""
    reference, names = f"base+{CHANGES[change]}", ("ft1", "ft2")
    folded = fold(reference)
    wanted = merge("wanted", "emr", names, folded)
    assert_equal(merge("found", "emr", names, reference), wanted)
    for name in names:
        assert_equal(
            open_model(f"{reference}+found/tasks/{name}").state_dict(),
            open_model(f"{folded}+wanted/tasks/{name}").state_dict(),
        )


@pytest.mark.parametrize("change", CHANGES)
def test_layers_of_it(change: str) -> None:
    wanted, found = (
        merge_slices(out, "passthrough", [(model, 2, 4)], [("ft1", 0, 1)], [(model, 1, 3)])
        for out, model in (("wanted", fold(f"base+{CHANGES[change]}")), ("found", f"base+{CHANGES[change]}"))
    )
    assert_equal(found, wanted)


@pytest.mark.parametrize(("method", "parameters"), [("task_arithmetic", {"weight": 0.5}), ("slerp", {"t": 0.3})])
def test_layers_of_it_as_the_base(method: str, parameters: dict[str, float]) -> None:
    wanted, found = (
        merge_slices(
            out, method, [(model, 2, 4), ("ft1", 1, 3)], [("ft2", 0, 2), (model, 0, 2)],
            base_model=model, parameters=parameters,
        )
        for out, model in (("wanted", fold(BASE)), ("found", BASE))
    )  # fmt: skip
    assert_equal(found, wanted)


@pytest.fixture
def encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The recipe of a search on a base with an adapter, and on what that folds to."""
    file = write_search(tmp_path / "search")
    monkeypatch.chdir(file.parent)
    base = read_model(Path("base"))
    modules = [f"encoder.layer.{n}.attention.self.value" for n in range(2)]
    write_adapter(Path("lora"), base, modules, lora_alpha=40)
    fold(BASE)
    recipe = json.loads(file.read_text())
    recipe["evaluate"]["baselines"] = ["task_arithmetic"]
    for name, reference in (("found", BASE), ("wanted", "folded")):
        Path(f"{name}.yaml").write_text(json.dumps(recipe | {"base_model": reference}))
    return ["wanted", "found"]


def test_a_search_on_it(encoders: list[str]) -> None:
    points = []
    for name in encoders:
        mergebench.search(f"{name}.yaml", over=["lambda"], budget=3, out=f"{name}-search", device="cpu", results=None)
        points.append(json.loads(Path(f"{name}-search/search.json").read_text())["points"])
    measured = [[(point["values"], point["tasks"]) for point in one] for one in points]
    assert measured[0] == measured[1]


def test_measured_beside_it(encoders: list[str]) -> None:
    """The rows of the base, of the inputs, of the baselines and of what was merged."""
    scores = []
    for name in encoders:
        recipe = mergebench.load(f"{name}.yaml")
        mergebench.run(mergebench.plan(recipe, device="cpu"), name)
        results = mergebench.evaluate(recipe, name, device="cpu", results=None)
        scores.append([(r.role, r.task, r.value, [p.output for p in r.predictions.values()]) for r in results.records])
    assert scores[0] == scores[1]
