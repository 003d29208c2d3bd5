"""A plan goes to another process, or another machine, as a pickle: what it merges there is the same."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mergebench
from mergebench import methods
from tests.deltas.kinds import CHANGES, WIDTH, write_world
from tests.editing.conftest import write_probe
from tests.models import hashes, write_model, write_statistics

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
import mergekit_tokens

TIMES = ("seconds", "stages", "peak_memory")  # of mergebench.json: what no two runs share
REQUIRED = {"t": 0.3, "task": 1, "steps": 3}  # what has no default, and fewer steps
Recipe = dict[str, Any]


def smallest(name: str) -> Recipe:
    """The least recipe with a method."""
    method = methods.get(name)
    tuned = ["ft1", "ft2"]
    if method.takes == "task_vectors":
        base, models = "base", tuned[: method.models]
    else:
        base, models = ("base", tuned[:1]) if method.models == 2 else (None, tuned[: method.models])
    if method.statistics is not None:
        read = [str(write_statistics(Path(f"{one}-read"), name, Path(one))) for one in tuned]
        return recipe(name, [{"model": one, "statistics": at} for one, at in zip(tuned, read, strict=True)], "base")
    parameters = {key: REQUIRED[key] for key in method.parameters if key in REQUIRED}
    return recipe(name, models, base, **({"parameters": parameters} if parameters else {}))


def recipe(method: str, models: list[Any], base: str | None = "base", **more: Any) -> Recipe:
    entries = [one if isinstance(one, dict) else {"model": one} for one in models]
    return {"merge_method": method, "models": entries} | ({"base_model": base} if base else {}) | more


def layers(model: str, first: int, end: int, **more: Any) -> Recipe:
    return {"model": model, "layer_range": [first, end], **more}


BY_DEPTH = [{"filter": "square", "value": [0.0, 0.5, 1.0]}, {"value": 0.4}]
SURGERY = {"edit": "surgery", "probe": "probe.safetensors", "target": "*.square.weight", "rows": "30%", "alpha": 2.0}
KINDS: dict[str, Recipe] = {
    "gradients and filters": recipe("task_arithmetic", ["ft1", "ft2"], parameters={"weight": BY_DEPTH}),
    "a gradient of one model": recipe(
        "ties", ["ft1", {"model": "ft2", "parameters": {"density": [0.2, 0.8]}}], parameters={"density": 0.5}
    ),
    "slices": {
        "merge_method": "linear",
        "slices": [{"sources": [layers("ft1", 0, 3), layers("ft2", 1, 4)]}, {"sources": [layers("base", 2, 4)] * 2}],
    },
    "slices on a base": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "slices": [{"sources": [layers("base", 0, 2), layers("ft1", 1, 3, parameters={"weight": [0.2, 0.9]})]}],
    },
    "tokens of a union": recipe("linear", ["left", "right"], None, tokenizer={"source": "union"}),
    "tokens of a model": recipe("task_arithmetic", ["left"], "base2", tokenizer={"source": "left"}),
    "a chat template": recipe("linear", ["left", "left"], None, chat_template="chatml"),
    "lines": recipe("task_arithmetic", ["ft1", "ft2"], lines={"alpha": 0.3, "beta": 0.7}),
    "lines, auto": recipe("ties", ["ft1", "ft2"], parameters={"density": 0.4}, lines={"alpha": "auto", "beta": 0.5}),
    "edits": recipe("linear", ["ft1", "ft2"], None, edits=[SURGERY, SURGERY | {"alpha": -1.0, "rows": "20%"}]),
    "scope model": recipe("ties", ["ft1", "ft2"], scope="model", parameters={"density": 0.4}),
    "scope model, random": recipe("dare_ties", ["ft1", "ft2"], scope="model", seed=3, parameters={"density": 0.4}),
    "some tensors, another type": recipe("linear", ["ft1", "ft2"], "base", include=["*.weight"], dtype="bfloat16"),
    "a task vector": recipe("task_arithmetic", [{"task_vector": "vector"}, "ft2"]),
    "the base listed again": recipe("linear", ["base", "ft1"]),
    **{f"{kind} on a model": recipe("ties", [f"base+{place}", "ft1"]) for kind, place in CHANGES.items()},
    **{f"{kind} alone": recipe("passthrough", [f"base+{place}"], None) for kind, place in CHANGES.items()},
    "experts apart, scaled, into fused ones": recipe("linear", ["fused", "apart"], None, dtype="float32"),
    "LoRA on a base": recipe("task_arithmetic", ["ft1"], "base+lora"),
    "DoRA and slices": {"merge_method": "passthrough", "slices": [{"sources": [layers("base+dora", 1, 3)]}]},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only, but for what is merged."""
    folder = write_world(tmp_path_factory.mktemp("made") / "world")
    mergebench.task_vector(str(folder / "ft1"), str(folder / "base"), folder / "vector")
    write_probe(folder / "probe.safetensors", torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(7)))
    write_experts(folder)
    mergekit_tokens.write_models(folder / "tokens")
    for name, place in (("left", "left"), ("right", "right"), ("base", "base2")):
        shutil.move(folder / "tokens" / name, folder / place)
    return folder


def write_experts(folder: Path) -> None:
    """Two experts in one tensor in bfloat16, and each apart in FP8 with a scale a row."""
    apart, fused = {}, {"gate_up_proj": torch.ones(2, 8, 6), "down_proj": torch.ones(2, 6, 4)}
    for number in range(2):
        for word, shape in (("gate_proj", (4, 6)), ("up_proj", (4, 6)), ("down_proj", (6, 4))):
            name = f"mlp.experts.{number}.{word}.weight"
            apart[name] = torch.randn(shape).to(torch.float8_e4m3fn)
            apart[f"{name}_scale"] = torch.rand(shape[0], 1) + 0.5
    write_model(folder / "apart", apart)
    write_model(folder / "fused", {f"mlp.experts.{name}": value.bfloat16() for name, value in fused.items()})


@pytest.fixture(autouse=True)
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)


def planned(data: Recipe) -> Any:
    return mergebench.plan(mergebench.load(data), workers=1, device="cpu")


def contents(out: Path) -> dict[str, Any]:
    """Every file of a result but its card; mergebench.json without its times."""
    found: dict[str, Any] = hashes(out)
    provenance = json.loads((out / "mergebench.json").read_text())
    found["mergebench.json"] = {key: value for key, value in provenance.items() if key not in TIMES}
    return {name: value for name, value in found.items() if name != "README.md"}


def check_the_same(plan: Any, copy: Any, place: Path) -> None:
    for name, one in (("plan", plan), ("copy", copy)):
        mergebench.run(one, place / name)
    assert contents(place / "copy") == contents(place / "plan")


@pytest.mark.parametrize("name", methods.names())
def test_every_method(name: str, tmp_path: Path) -> None:
    plan = planned(smallest(name))
    check_the_same(plan, pickle.loads(pickle.dumps(plan)), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_recipe(kind: str, tmp_path: Path) -> None:
    plan = planned(KINDS[kind])
    check_the_same(plan, pickle.loads(pickle.dumps(plan)), tmp_path)


PLANS: dict[str, Callable[[], Any]] = {
    "an adapter folded": lambda: mergebench.plan_fold("base", "lora"),
    "an edit": lambda: mergebench.plan_edit("base", "probe.safetensors", target="*.square.weight", rows="30%"),
    "a patch applied": lambda: mergebench.plan_patch("base", CHANGES["patch"]),
}


@pytest.mark.parametrize("kind", PLANS)
def test_other_plans(kind: str, tmp_path: Path) -> None:
    plan = PLANS[kind]()
    check_the_same(plan, pickle.loads(pickle.dumps(plan)), tmp_path)


@pytest.mark.parametrize("kind", ["lines, auto", "slices", "tokens of a union"])
def test_a_plan_that_was_carried_out(kind: str, tmp_path: Path) -> None:
    """What it remembers of that goes along, or stays; in either case it is the same plan."""
    plan = planned(KINDS[kind])
    mergebench.run(plan, tmp_path / "first")
    check_the_same(plan, pickle.loads(pickle.dumps(plan)), tmp_path)


def test_in_a_fresh_interpreter(tmp_path: Path) -> None:
    """Which has imported nothing: a pickle brings what it needs."""
    plans = {name: planned(KINDS[name]) for name in ("lines, auto", "edits", "DoRA on a model", "tokens of a model")}
    (tmp_path / "plans.pickle").write_bytes(pickle.dumps(plans))
    program = (
        "import pickle, sys\n"
        "from pathlib import Path\n"
        "folder = Path(sys.argv[1])\n"
        "plans = pickle.loads((folder / 'plans.pickle').read_bytes())\n"
        "import mergebench\n"
        "for name, plan in plans.items():\n"
        "    mergebench.run(plan, folder / 'there' / name)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for name, plan in plans.items():
        mergebench.run(plan, tmp_path / "here" / name)
        assert contents(tmp_path / "there" / name) == contents(tmp_path / "here" / name)
