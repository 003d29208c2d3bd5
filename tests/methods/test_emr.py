"""EMR-Merging on disk: the vector, the masks and the factors against float64, and the models they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import fine_tuned, hashes, read_model, write_model, write_recipe
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergebench import evaluate, load, plan, run
from mergebench.deltas.open import open_model
from mergebench.engine.noise import TILE
from mergebench.errors import MergebenchError, ModelError, RecipeError, RunError
from tests.conftest import Cli
from tests.evaluation.conftest import write_data, write_encoder, write_head

SHAPES = {"emb": (11, 7), "layers.0.w": (2, TILE + 3), "layers.1.w": (TILE + 1,), "norm": (13,), "one": ()}
TUNED = ("ft1", "ft2", "ft3")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base in two files and three fine-tunes, each with a share of elements left as they were."""
    monkeypatch.chdir(tmp_path)
    random = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()} | {"steps": torch.arange(4)}
    write_model(tmp_path / "base", base, shards=2)
    for seed, name in enumerate(TUNED):
        tuned = fine_tuned(base, seed)
        for key in SHAPES:
            tuned[key] = torch.where(torch.rand(tuned[key].shape, generator=random) < 0.3, base[key], tuned[key])
        write_model(tmp_path / name, tuned, shards=seed + 1)
    return tmp_path


def merge(out: str = "out", models: Any = TUNED, limits: Any = None, **more: Any) -> Path:
    path = write_recipe(Path(f"{out}.yaml"), "emr", models, "base", **more)
    return run(plan(load(path), **(limits or {})), out).out


def applied(reference: str, out: str = "applied") -> dict[str, Tensor]:
    """The model that a reference stands for, written as a checkpoint."""
    run(plan(load(write_recipe(Path("apply.yaml"), "passthrough", [reference]))), out, overwrite=True)
    return read_model(Path(out))


def by_hand(names: list[str]) -> tuple[dict[str, np.ndarray[Any, Any]], list[dict[str, Any]], list[float]]:
    """The paper's vector, masks and factors over the tensors named, in float64."""
    base, tuned = read_model(Path("base")), [read_model(Path(name)) for name in TUNED]
    tau = [{name: (one[name] - base[name]).double().numpy() for name in names} for one in tuned]
    sign = {name: np.sign(sum(one[name] for one in tau)) for name in names}
    agreeing = {name: [np.where(np.sign(one[name]) == sign[name], abs(one[name]), 0) for one in tau] for name in names}
    vector = {name: sign[name] * np.max(agreeing[name], axis=0) for name in names}
    masks = [{name: one[name] * vector[name] > 0 for name in names} for one in tau]
    scales = [
        sum(abs(one[name]).sum() for name in names) / sum(abs(mask[name] * vector[name]).sum() for name in names)
        for one, mask in zip(tau, masks, strict=True)
    ]
    return vector, masks, scales


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_vector_masks_and_factors(folder: Path, scope: str) -> None:
    out = merge(scope=scope, limits={"workers": 2})
    vector, masks, scales = by_hand(list(SHAPES))

    found = read_model(out)
    assert torch.equal(found["steps"], torch.arange(4))
    for name in SHAPES:
        assert np.array_equal(found[name].numpy(), vector[name].astype(np.float32)), name
    for task, mask, scale in zip(TUNED, masks, scales, strict=True):
        assert json.loads((out / "tasks" / task / "task.json").read_text())["scale"] == pytest.approx(scale, rel=1e-12)
        files = [load_file(file) for file in sorted((out / "tasks" / task).glob("*.safetensors"))]
        bits = {name: value for file in files for name, value in file.items()}
        assert bits.keys() == SHAPES.keys()
        for name in SHAPES:
            packed = np.packbits(mask[name].reshape(-1), bitorder="little")
            assert np.array_equal(bits[name].numpy(), packed), (task, name)


def test_a_task_goes_wherever_a_model_goes(folder: Path) -> None:
    out = merge()
    base = read_model(Path("base"))
    vector, masks, scales = by_hand(list(SHAPES))
    want = [
        {name: base[name].double().numpy() + scale * mask[name] * vector[name] for name in SHAPES}
        for mask, scale in zip(masks, scales, strict=True)
    ]
    for task, model in zip(TUNED, want, strict=True):
        got = applied(f"base+{out}/tasks/{task}")
        in_memory = open_model(f"base+{out}/tasks/{task}").state_dict()
        assert torch.equal(got["steps"], base["steps"])
        for name in SHAPES:
            assert np.abs(got[name].numpy() - model[name]).max() < 1e-6
            assert torch.equal(got[name], in_memory[name])
    path = write_recipe(Path("mean.yaml"), "linear", [f"base+{out}/tasks/{task}" for task in TUNED])
    run(plan(load(path), workers=2), "mean")
    path = write_recipe(Path("ta.yaml"), "task_arithmetic", [f"base+{out}/tasks/{task}" for task in TUNED], "base")
    run(plan(load(path, ["parameters.normalize=true"]), workers=2), "ta")
    for name in SHAPES:
        mean = sum(one[name] for one in want) / 3
        for made in ("mean", "ta"):
            assert np.abs(read_model(Path(made))[name].numpy() - mean).max() < 1e-6


@pytest.mark.parametrize("count", [1, 2])
def test_alone_or_equal_a_model_comes_back(folder: Path, count: int) -> None:
    write_model(folder / "twin", read_model(folder / "ft1"))
    out = merge(models=["ft1", "twin"][:count])

    got, want = applied(f"base+{out}/tasks/ft1"), read_model(folder / "ft1")
    for name in SHAPES:
        assert torch.allclose(got[name], want[name], rtol=1e-6, atol=1e-6)


def test_the_vector_reads_as_a_task_vector(folder: Path) -> None:
    out = merge()
    vector, _, _ = by_hand(list(SHAPES))
    base = read_model(Path("base"))
    for key in ("task_vector", "model"):  # its files say what they hold
        path = write_recipe(Path("tv.yaml"), "task_arithmetic", [{key: str(out)}], "base")
        run(plan(load(path)), "tv", overwrite=True)
        for name in SHAPES:
            assert np.abs(read_model(Path("tv"))[name].numpy() - (base[name].numpy() + vector[name])).max() < 1e-6


def test_what_is_excluded_is_no_difference(folder: Path) -> None:
    out = merge(exclude=["emb", "one"])
    kept = [name for name in SHAPES if name not in ("emb", "one")]
    _, _, scales = by_hand(kept)
    base = read_model(Path("base"))

    assert not read_model(out)["emb"].any()
    assert json.loads((out / "mergebench.json").read_text())["tasks"]["ft2"] == pytest.approx(scales[1], rel=1e-12)
    got = applied(f"base+{out}/tasks/ft2")
    assert torch.equal(got["emb"], base["emb"]) and torch.equal(got["one"], base["one"])
    assert not torch.equal(got["norm"], base["norm"])


def test_bits_depend_on_no_chunk_worker_memory_or_shard(folder: Path) -> None:
    def files(out: Path) -> dict[str, str]:
        return {name: value for name, value in hashes(out).items() if name.endswith((".safetensors", "task.json"))}

    first = files(merge("a", limits={"workers": 1}))
    assert len(first) == 2 * 4 + 3
    assert files(merge("b", limits={"workers": 3, "chunk": TILE})) == first
    assert files(merge("c", limits={"workers": 2, "memory": 60 << 20}, scope="tensor")) == first
    small = merge("d", limits={"shard_size": 300_000})
    assert len(files(small)) > len(first)
    for task in TUNED:
        one, other = (applied(f"base+{out}/tasks/{task}", f"applied-{out}") for out in ("a", "d"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_task_is_cut_anywhere(folder: Path) -> None:
    merge()
    path = write_recipe(Path("apply.yaml"), "passthrough", ["base+out/tasks/ft1"])
    whole = applied("base+out/tasks/ft1", "whole")
    for chunk in (1_001, 7_777):
        run(plan(load(path), chunk=chunk, workers=2), "cut", overwrite=True)
        assert all(torch.equal(value, read_model(Path("cut"))[name]) for name, value in whole.items())


def test_names_of_tasks_are_plain_and_different(folder: Path) -> None:
    places = ["x/ft", "y/ft", "z/../x/../ft1", "c+b", "c-b-2", "c!b"]
    (folder / "z").mkdir()
    for place in places:
        if not Path(place).exists():
            write_model(folder / place, read_model(folder / "ft2"))
    out = merge(models=places)

    names = sorted(path.name for path in (out / "tasks").iterdir())
    assert len(names) == 6 and all(not set(name) & set("/+") and name.strip(".") for name in names)
    for name in names:
        applied(f"base+{out}/tasks/{name}")


def test_what_is_said(folder: Path, cli: Cli) -> None:
    path = write_recipe(Path("emr.yaml"), "emr", TUNED, "base")
    shown = cli("plan", path).out
    size = sum(torch.tensor(shape).prod().item() if shape else 1 for shape in SHAPES.values())
    masks = sum(-(-(int(np.prod(shape))) // 8) for shape in SHAPES.values())
    planned = json.loads(cli("plan", path, "--json").out)
    assert planned["bytes_written"] == 4 * size + 4 * 8 + 3 * masks
    assert (len(planned["files"]), planned["tasks"]) == (8, list(TUNED))
    assert "  tasks     ft1, ft2, ft3: a one-bit mask per element each, and one vector for all\n" in shown
    ran = cli("merge", path, "--out", "out")
    assert (ran.code, ran.out) == (0, "out\n")
    assert "a model is base+out/tasks/ft1" in ran.err
    assert "- `base+out/tasks/ft3`" in Path("out/README.md").read_text()
    assert not Path("out/config.json").exists()  # or it would load as a model
    assert "+ sparse mask x " in cli("inspect", "base+out/tasks/ft1").out
    assert cli("merge", path, "--out", "out", "--resume").err.endswith("already finished, nothing to resume\n")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lines": {"alpha": 1, "beta": 0}}, "lines: 'emr' gives a model for each task, no merged one"),
        ({"tokenizer": {"source": "union"}}, "tokenizer: 'emr' writes differences to the base, which must be the one"),
        ({"chat_template": "chatml"}, "chat_template: 'emr' writes differences to the base"),
        ({"parameters": {"density": 0.2}}, "parameters.density: 'emr' has no such parameter"),
    ],
)
def test_recipes_that_cannot_be(folder: Path, more: dict[str, Any], message: str) -> None:
    Path("lora").mkdir()
    factors = {"norm.lora_A.weight": torch.ones(1, 3), "norm.lora_B.weight": torch.ones(1, 1)}
    save_file({f"base_model.model.{name}": value for name, value in factors.items()}, "lora/adapter_model.safetensors")
    Path("lora/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    base = read_model(folder / "base") | {"norm.weight": torch.ones(1, 3)}
    for name in ("base", *TUNED):
        write_model(folder / name, base)
        for index in (folder / name).glob("model*.json"):
            index.unlink()
    data = {"merge_method": "emr", "base_model": "base", "models": [{"model": name} for name in TUNED]} | more
    Path("r.yaml").write_text(json.dumps(data, indent=1))

    with pytest.raises(RecipeError) as caught:
        plan(load("r.yaml"))
    assert caught.value.message.startswith("r.yaml:") and message in caught.value.message


def shorten(task: Path) -> None:
    file = next(task.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


def other_shape(task: Path) -> None:
    tensors = read_model(Path("base")) | {"norm": torch.zeros(14)}
    write_model(Path("base"), tensors, shards=2)


def moved(task: Path) -> None:
    shutil.move(task.parent, "tasks")
    task.parent.symlink_to(Path("tasks").absolute())


def without_number(task: Path) -> None:
    (task / "task.json").write_text('{"scale": "x"}')


DAMAGE: dict[str, tuple[Callable[[Path], object], type[MergebenchError], str]] = {
    "no number": (without_number, RunError, 'task.json: scale: must be a finite number, got "x"'),
    "no json": (lambda task: (task / "task.json").write_text("{"), RunError, "task.json: not readable as JSON"),
    "short": (shorten, RunError, "the file has 8459"),
    "a mask gone": (lambda task: next(task.glob("*.safetensors")).unlink(), ModelError, "no such file"),
    "another base": (other_shape, ModelError, "norm: the task changes [13], base has F32 [14]"),
    "moved": (moved, ModelError, "does not hold the vector of this mask"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_tasks_that_do_not_read(folder: Path, damage: str) -> None:
    change, kind, message = DAMAGE[damage]
    task = merge() / "tasks" / "ft1"
    change(task)

    with pytest.raises(kind) as caught:
        open_model(f"base+{task}")
    assert message in caught.value.message


def test_a_task_alone_and_a_vector_alone_are_no_models(folder: Path) -> None:
    out = merge()
    with pytest.raises(ModelError, match="it is a task's mask, not a model") as caught:
        open_model(f"{out}/tasks/ft1")
    assert caught.value.hint == f"name its base: BASE+{out}/tasks/ft1"
    with pytest.raises(ModelError, match="it holds ft1, ft2, ft3, not one task") as caught:
        open_model(f"base+{out}")
    assert caught.value.hint == f"name one of its tasks: {out}/tasks/ft1"
    with pytest.raises(ModelError, match="it holds differences to a base, no model"):
        open_model(str(out)).state_dict()
    for kind, more in {"missing, 'out' is a difference to it": {}, "'out' is a difference to a": {"base": out}}.items():
        with pytest.raises(RecipeError, match=f"base_model: {kind}"):
            plan(load(write_recipe(Path("r.yaml"), "linear", [str(out)], **more)))
    with pytest.raises(RecipeError, match="--verify: 'emr' writes no model"):
        run(plan(load(write_recipe(Path("r.yaml"), "emr", TUNED, "base"))), "again", verify=True)


# -- measured ------------------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two encoders with a head each, their base, and a recipe with a suite."""
    monkeypatch.chdir(tmp_path)
    tasks = []
    for seed, name in enumerate(["base", "a", "b"]):
        write_encoder(tmp_path / name, seed=seed)
        if name != "base":
            write_head(tmp_path / name, seed=seed)
            write_data(tmp_path / f"{name}.jsonl", seed=seed)
            data, head = f"{name}.jsonl", f"{name}/head.safetensors"
            tasks.append({"name": f"task-{name}", "kind": "text-classification", "data": data, "head": head})
    models = [{"model": "b"}, {"model": "a"}]
    return {"merge_method": "emr", "base_model": "base", "models": models, "evaluate": {"suite": {"tasks": tasks}}}


def values(results: Any, model: str) -> list[Any]:
    return [[(p.output, p.score) for p in record.predictions.values()] for record in results.of(model).values()]


@pytest.mark.parametrize("role", ["merged", "baseline"])
def test_each_task_is_measured_on_its_own_model(measured: dict[str, Any], role: str) -> None:
    recipe = load(measured)
    run(plan(recipe), "out")
    if role == "baseline":
        recipe = load(measured | {"merge_method": "linear", "evaluate": measured["evaluate"] | {"baselines": ["emr"]}})
        run(plan(recipe), "mean")
    results = evaluate(recipe, "out" if role == "merged" else "mean")

    assert results.of("emr")["task-a"].role == role and results.made["by_task"] == ["emr"]
    assert (
        "emr: each task on the model made for it"
        in (Path("out" if role == "merged" else "mean") / "evaluation.md").read_text()
    )
    for number, name in enumerate(["a", "b"]):
        applied(f"base+out/tasks/{name}", name + "-applied")
        one = load(
            {"merge_method": "linear", "models": [{"model": f"{name}-applied"}], "evaluate": measured["evaluate"]}
        )
        alone = evaluate(one, f"{name}-applied")
        assert values(results, "emr")[number] == values(alone, "linear")[number]


def test_a_task_that_belongs_to_no_input_is_refused_before_the_merge(measured: dict[str, Any], cli: Cli) -> None:
    write_head(Path("elsewhere"))
    measured["evaluate"]["suite"]["tasks"][1]["head"] = "elsewhere/head.safetensors"
    Path("r.yaml").write_text(json.dumps(measured))
    ran = cli("merge", "r.yaml", "--out", "out")

    assert ran.code == 2 and not Path("out").exists()
    assert "evaluate: 'emr' makes a model for each input, task 'task-b' is none of theirs" in ran.err
    assert cli("merge", "r.yaml", "--out", "out", "--no-eval").code == 0
