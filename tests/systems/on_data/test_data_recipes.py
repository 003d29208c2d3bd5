"""Merges by what models do on texts: named in a recipe as statistics, or made of its data before the merge."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import write_encoder
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergebench
from mergebench.checkpoint.measured import read_measured
from mergebench.errors import MergebenchError, ModelError, RecipeError, RunError
from mergebench.systems.on_data import make_statistics
from tests.evaluation.conftest import write_data, write_head

NAMES = ("a", "b")
COUNT = 6  # texts of each task


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two fine-tunes with heads, and texts of each."""
    place = tmp_path_factory.mktemp("files")
    base = load_file(write_encoder(place / "base") / "model.safetensors")
    for number, name in enumerate(NAMES):
        write_encoder(place / name)
        noise = torch.Generator().manual_seed(number)
        tuned = {key: one + 0.05 * torch.randn(one.shape, generator=noise) for key, one in base.items()}
        save_file(tuned, place / name / "model.safetensors", {"format": "pt"})
        write_head(place / name, seed=number)
        write_data(place / f"{name}.jsonl", COUNT, seed=number, longest=8)
        for kind in ("gram", "fisher"):
            how = {"kind": kind, "device": "cpu"}
            make_statistics(str(place / name), place / f"{name}.jsonl", place / f"{name}-{kind}", **how)
    return place


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe(files: Path, method: str, key: str = "data", **more: Any) -> dict[str, Any]:
    """The two fine-tunes; key: data, or the kind of their statistics."""
    models: list[dict[str, Any]] = []
    for name in NAMES:
        given = (
            {"data": str(files / f"{name}.jsonl")} if key == "data" else {"statistics": str(files / f"{name}-{key}")}
        )
        models.append({"model": str(files / name), **given})
    return {"merge_method": method, "base_model": str(files / "base"), "models": models, **more}


def merged(source: dict[str, Any], out: str = "out", **how: Any) -> dict[str, Tensor]:
    mergebench.merge(source, out, device="cpu", **how)
    return load_file(Path(out) / "model.safetensors")


def texts(files: Path, name: str) -> list[Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(files / name)
    rows = [json.loads(line) for line in (files / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [tokenizer(row["text"], truncation=True, max_length=24, return_tensors="pt").input_ids for row in rows]


@pytest.mark.parametrize(("method", "kind"), [("regmean", "gram"), ("fisher", "fisher")])
def test_data_are_the_statistics_made_before(files: Path, method: str, kind: str) -> None:
    made = merged(recipe(files, method, kind), "made")
    told = merged(recipe(files, method), "told", workers=1)
    cut = mergebench.run(mergebench.plan(recipe(files, method, kind), chunk=64, workers=2, device="cpu"), "cut")
    again = load_file(cut.out / "model.safetensors")
    for name, value in made.items():
        assert torch.equal(value, told[name]) and torch.equal(value, again[name]), name
    provenance = json.loads(Path("told/mergebench.json").read_text(encoding="utf-8"))
    assert [one["items"] for one in provenance["statistics"]] == [COUNT, COUNT]
    assert {Path(one["file"]).name for one in provenance["inputs"]} >= {"statistics.safetensors"}
    card = Path("told/README.md").read_text(encoding="utf-8")
    assert f"{kind} of model 1: {COUNT} texts of a.jsonl" in card


def test_regmean_is_nearer_to_the_tasks_own_answers_than_the_average(files: Path) -> None:
    """Of the first layer, whose inputs are the embeddings': what its formula minimises."""
    grams = [load_file(files / f"{name}-gram" / "statistics.safetensors") for name in NAMES]
    own = [load_file(files / name / "model.safetensors") for name in NAMES]
    found = merged(recipe(files, "regmean", "gram", parameters={"alpha": 1.0}))
    for name in grams[0]:
        if "pooler" in name:
            continue

        def loss(weight: Tensor, name: str = name) -> float:
            changes = [(weight - one[name]).double() for one in own]
            return sum(
                float(torch.trace(change @ gram[name].double() @ change.T))
                for change, gram in zip(changes, grams, strict=True)
            )

        assert loss(found[name]) < loss((own[0][name] + own[1][name]) / 2)


def test_regmean_plusplus_by_hand(files: Path) -> None:
    """Whole models with the merged blocks below and their own block, run by transformers with hooks."""
    from transformers import AutoModel

    merge = merged(recipe(files, "regmean_plusplus", parameters={"alpha": 0.8}))
    own = [load_file(files / name / "model.safetensors") for name in NAMES]
    mean = {name: (own[0][name] + own[1][name]) / 2 for name in own[0]}
    module = AutoModel.from_pretrained(files / "base").eval()
    state = dict(mean)
    for layer in range(2):
        prefix = f"encoder.layer.{layer}."
        block = [name for name in state if name.startswith(prefix)]
        linear = {name.removesuffix(".weight") for name in block if name.endswith("weight") and "Norm" not in name}
        found: list[dict[str, Tensor]] = []
        for number, task in enumerate(NAMES):
            module.load_state_dict({**state, **{name: own[number][name] for name in block}})
            inputs: dict[str, list[Tensor]] = {name: [] for name in linear}
            hooks = [
                module.get_submodule(name).register_forward_hook(
                    lambda _, x, __, name=name, inputs=inputs: inputs[name].append(x[0][0].double())
                )
                for name in linear
            ]
            with torch.no_grad():
                for ids in texts(files, task):
                    module(input_ids=ids)
            for hook in hooks:
                hook.remove()
            joined = {name: torch.cat(several) for name, several in inputs.items()}
            found.append({name: x.T @ x / len(x) for name, x in joined.items()})
        for name in block:
            state[name] = mean[name]
        for name in linear:
            grams = [one[name] * 0.8 + torch.diag(one[name].diagonal()) * 0.2 for one in found]
            weights = [one[f"{name}.weight"].double() for one in own]
            pull = sum(gram @ weight.T for gram, weight in zip(grams, weights, strict=True))
            state[f"{name}.weight"] = (torch.linalg.inv(grams[0] + grams[1]) @ pull).T.float()
    for name, value in state.items():
        torch.testing.assert_close(merge[name], value, rtol=1e-3, atol=5e-4)
    plain = merged(recipe(files, "regmean", parameters={"alpha": 0.8}), "plain")
    name = "encoder.layer.1.intermediate.dense.weight"
    assert (merge[name] - plain[name]).abs().max() > 0.01  # so that the test can tell them apart


@pytest.mark.parametrize("coefficients", ["layer", "task"])
def test_adamerging_by_autograd(files: Path, coefficients: str) -> None:
    """Factors as leaves of a graph through the whole model, all texts in each step."""
    from transformers import AutoModel

    settings = {"steps": 3, "lr": 0.02, "batch": COUNT, "coefficients": coefficients}
    found = merged(recipe(files, "adamerging", parameters=settings))
    origin = load_file(files / "base" / "model.safetensors")
    own = [load_file(files / name / "model.safetensors") for name in NAMES]
    heads = [load_file(files / name / "head.safetensors") for name in NAMES]
    module = AutoModel.from_pretrained(files / "base").eval()
    numbers = {name: number if coefficients == "layer" else 0 for number, name in enumerate(origin)}
    factors = torch.full((2, max(numbers.values()) + 1), 0.3, requires_grad=True)
    adam = torch.optim.Adam([factors], lr=0.02)

    def values() -> dict[str, Tensor]:
        return {
            name: one + sum(factors[i, numbers[name]] * (own[i][name] - one) for i in range(2))
            for name, one in origin.items()
        }

    for _ in range(3):
        adam.zero_grad()
        loss = torch.zeros(())
        for task, head in zip(NAMES, heads, strict=True):
            for ids in texts(files, task):
                states = torch.func.functional_call(module, values(), (), {"input_ids": ids}).last_hidden_state
                logs = (states.mean(1) @ head["weight"].T + head["bias"]).log_softmax(-1)
                loss = loss - (logs.exp() * logs).sum() / COUNT
        loss.backward()
        adam.step()
    wanted = factors.detach()
    learnt = [load_file(Path(f"out.statistics/{name}/statistics.safetensors")) for name in NAMES]
    for name in origin:
        if "pooler" in name or "key.bias" in name:  # no answer depends on it, and Adam makes steps of rounding errors
            continue
        for number in range(2):
            assert float(learnt[number][name]) == pytest.approx(float(wanted[number, numbers[name]]), abs=2e-4)
        torch.testing.assert_close(found[name], values()[name].detach(), rtol=1e-4, atol=1e-4)
    before, after = read_measured(Path("out.statistics/a")).about["made"]["entropy"]
    assert after < before


def test_statistics_are_made_once(files: Path) -> None:
    source = recipe(files, "adamerging", parameters={"steps": 2})
    first = merged(source)
    made = Path("out.statistics/a/statistics.safetensors")
    before = made.stat().st_mtime_ns
    assert mergebench.merge(source, "out", resume=True, device="cpu").already_done
    merged(source, overwrite=True)
    assert made.stat().st_mtime_ns == before
    other = merged({**source, "parameters": {"steps": 3}}, overwrite=True)
    assert made.stat().st_mtime_ns != before
    assert any(not torch.equal(first[name], other[name]) for name in first)
    as_given = recipe(files, "adamerging")
    for entry, name in zip(as_given["models"], NAMES, strict=True):
        del entry["data"]
        entry["statistics"] = f"out.statistics/{name}"
    named = merged(as_given, "named")
    assert all(torch.equal(named[name], other[name]) for name in named)


def test_texts_of_the_suite_are_noticed(files: Path) -> None:
    from mergebench.evaluation.measure import measure

    merged(recipe(files, "regmean", "gram"))
    rows = (files / "a.jsonl").read_text(encoding="utf-8").splitlines()
    renamed = [json.dumps({**json.loads(row), "id": f"other-{n}"}) + "\n" for n, row in enumerate(rows)]
    Path("copied.jsonl").write_text("".join(renamed[:4]), encoding="utf-8")
    task = {"kind": "text-classification", "head": str(files / "a" / "head.safetensors")}
    write_data(Path("new.jsonl"), 5, seed=77)
    for data, count in (("copied.jsonl", 4), ("new.jsonl", 0)):
        suite = {"tasks": [{"name": "a", "data": data, **task}]}
        Path("suite.yaml").write_text(json.dumps(suite), encoding="utf-8")
        found = measure("suite.yaml", ["out", str(files / "a")], results=None, device="cpu")
        said = found.made.get("seen", [])
        assert len(said) == bool(count)
        assert not count or f"{count} of these 4 items" in said[0]


def change(source: dict[str, Any], number: int, **entry: Any) -> dict[str, Any]:
    changed = copy.deepcopy(source)
    changed["models"][number] = {k: v for k, v in (changed["models"][number] | entry).items() if v is not None}
    return changed


def test_what_is_wrong_is_said_in_one_line(files: Path, tmp_path: Path) -> None:
    regmean, fisher = recipe(files, "regmean", "gram"), recipe(files, "fisher", "fisher")
    told = recipe(files, "regmean")
    lacking, damaged, negative = (tmp_path / name for name in ("lacking", "damaged", "negative"))
    file = files / "a-fisher" / "statistics.safetensors"
    metadata, values = read_measured(file).header.metadata, load_file(file)
    name = "encoder.layer.1.output.dense.weight"
    for place, changed in (
        (lacking, {key: one for key, one in values.items() if key != name}),
        (damaged, {**values, name: values[name] * float("nan")}),
        (negative, {**values, name: values[name] - 1}),
    ):
        place.mkdir()
        save_file(changed, place / "statistics.safetensors", metadata)
    cases: list[tuple[type[MergebenchError], str, dict[str, Any]]] = [
        (RecipeError, "has neither statistics nor data", change(regmean, 1, statistics=None)),
        (RecipeError, "cannot be given with statistics", change(regmean, 1, data="x.jsonl")),
        (RecipeError, "models with data and with statistics", change(told, 1, data=None, statistics="x")),
        (RecipeError, "'ties' reads no statistics", {**regmean, "merge_method": "ties"}),
        (RecipeError, "'linear' reads no data", {**told, "merge_method": "linear"}),
        (RecipeError, "no such file or folder: nowhere", change(regmean, 0, statistics="nowhere")),
        (RecipeError, "no such file: nowhere", change(told, 0, data="nowhere")),
        (RecipeError, "'data' has no such key", change(told, 0, data={"file": str(files / "a.jsonl"), "txt": "a"})),
        (RunError, "no column 'body'", change(told, 0, data={"file": str(files / "a.jsonl"), "text": "body"})),
        (RecipeError, "reads what whole models do", {**regmean, "tokenizer_source": "union"}),
        (ModelError, "its kind is fisher, 'regmean' needs gram", recipe(files, "regmean", "fisher")),
        (ModelError, "which is another model than", change(regmean, 0, statistics=str(files / "b-gram"))),
        (ModelError, f"it has no '{name}', which is merged", change(fisher, 0, statistics=str(lacking))),
        (ModelError, "it holds no statistics.safetensors", change(fisher, 0, statistics=str(files / "base"))),
        (RunError, "holds a value that is not finite", change(fisher, 0, statistics=str(damaged))),
        (RunError, "below zero", change(fisher, 0, statistics=str(negative))),
        (RecipeError, "the weights add up to zero", {**fisher, "parameters": {"weight": 0.0}}),
        (RecipeError, "'fisher' needs statistics: of each model",
         {**told, "evaluate": {"suite": "s.yaml", "baselines": ["fisher"]}}),
        (RecipeError, "of each model, of kind fisher",
         {**regmean, "evaluate": {"suite": "s.yaml", "baselines": ["regmean_plusplus", "fisher"]}}),
    ]  # fmt: skip
    for error, words, source in cases:
        with pytest.raises(error) as caught:
            mergebench.merge(source, "out", device="cpu")
        assert words in caught.value.message, caught.value.message
        assert "\n" not in caught.value.message
        assert not Path("out").exists()
