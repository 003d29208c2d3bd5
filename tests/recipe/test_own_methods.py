"""Methods of one's own: named by their file in a recipe, or given as a function."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import fine_tuned, read_model, tiny_tensors, write_model

import mergebench
from mergebench import Context, Passes, TaskVectors, merge_method, methods, param, total
from mergebench.adapters.combine import is_known
from mergebench.engine.provenance import fingerprint_of
from mergebench.errors import RecipeError
from mergebench.evaluation.search.best import write_recipe
from mergebench.recipe.stages import default_out
from tests.conftest import Cli

OWN = '''from dataclasses import dataclass
from mergebench import Context, Passes, TaskVectors, merge_method, param, total


@dataclass(frozen=True)
class Params:
    share: float = param(0.5, "of the first", low=0, high=1)


@merge_method(takes="task_vectors", paper="here", models=2)
def mixed(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """A share of the first, the rest of the second."""
    return total(tvs, (p.share, 1 - p.share))


def plain(x):
    return x
'''
RECIPE = "merge_method: {}\nbase_model: base\nmodels: [{{model: a}}, {{model: b}}]\nparameters: {{share: 0.25}}\n"


PAIR = [{"model": "a"}, {"model": "b"}]
RECIPE_DICT: dict[str, Any] = {"base_model": "base", "models": PAIR, "parameters": {"share": 0.25}}


@dataclass(frozen=True)
class Share:
    share: float = param(0.5, "of the first")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """base, a and b, a recipe below `mine/` and the method's file beside it."""
    monkeypatch.chdir(tmp_path)
    tensors = {"base": tiny_tensors()} | {name: fine_tuned(tiny_tensors(), n) for n, name in enumerate("ab")}
    for name, one in tensors.items():
        write_model(Path(name), one)
    Path("mine").mkdir()
    Path("mine/own.py").write_text(OWN)
    Path("mine/own.yaml").write_text(RECIPE.format("own.py:mixed"))
    return tensors


def check(out: str, models: dict[str, Any]) -> None:
    for name, value in read_model(Path(out)).items():
        if value.is_floating_point():
            base, a, b = (models[key][name].double() for key in ("base", "a", "b"))
            assert torch.allclose(value.double(), base + 0.25 * (a - base) + 0.75 * (b - base), atol=1e-6)


def test_a_recipe_names_a_file_beside_it(models: dict[str, Any], cli: Cli) -> None:
    code, out, err = cli("merge", "mine/own.yaml", "--out", "out")

    assert (code, out) == (0, "out\n"), err
    check("out", models)
    method = json.loads(Path("out/mergebench.json").read_text())["method"]
    assert (method["name"], Path(method["file"])) == ("mixed", Path("mine/own.py").resolve())
    planned = cli("plan", "mine/own.yaml").out
    assert planned.startswith("mixed (here), scope tensor\n")
    assert "share" in cli("methods", "mine/own.py:mixed").out
    assert "mine/own.py:mixed" in cli("doctor", "mine/own.py:mixed").out
    assert is_known("linear") and not is_known("elsewhere.py:mixed")


def test_the_best_of_a_search_finds_it(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Written into another folder, and read from a third."""
    Path("mine/probe").write_text("")
    edits = [{"edit": "surgery", "probe": "probe", "rows": "1"}]
    Path("mine/own.yaml").write_text(f"{RECIPE.format('own.py:mixed')}edits: {json.dumps(edits)}\n")
    Path("best").mkdir()
    write_recipe(mergebench.load("mine/own.yaml"), Path("best/best.yaml"), "the best")
    Path("third").mkdir()
    monkeypatch.chdir("third")
    found = mergebench.load("../best/best.yaml")
    assert found.method.name == "mixed" and found.edits[0].probe == "../mine/probe"


def test_a_changed_file_is_another_merge(models: dict[str, Any], cli: Cli) -> None:
    before = mergebench.plan("mine/own.yaml")
    Path("mine/own.py").write_text(OWN.replace("1 - p.share", "2 - p.share"))
    after = mergebench.plan("mine/own.yaml")

    assert fingerprint_of(before) != fingerprint_of(after)
    assert after.merge.method is not before.merge.method


def test_another_process_finds_the_file(models: dict[str, Any]) -> None:
    """As a worker that was not forked does, and a machine that has the file in the same place."""
    Path("plan").write_bytes(pickle.dumps(mergebench.plan("mine/own.yaml")))
    code = "import pickle, mergebench, pathlib; mergebench.run(pickle.loads(pathlib.Path('plan').read_bytes()), 'out')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    check("out", models)


@pytest.mark.parametrize(
    ("named", "source", "message", "hint"),
    [
        ("won.py:mixed", OWN, "won.py: no such file", "did you mean 'own.py'?"),
        ("own.py:mixd", OWN, "own.py: it has no 'mixd'", "did you mean 'mixed'?"),
        ("own.py:plain", OWN, "own.py:plain is not made with @merge_method", "put that above the function"),
        ("own.py", OWN, "own.py: which method in it?", "known: mixed"),
        ("own.py:f", "x = (\n", "own.py:1:5: '(' was never closed", None),
        ("own.py:f", "\n1 / 0\n", "own.py:2: ZeroDivisionError: division by zero", None),
        ("own.py:f", "import sys\nsys.exit('no')\n", "own.py:2: SystemExit: no", None),
    ],
)
def test_mistakes(models: dict[str, Any], named: str, source: str, message: str, hint: str | None) -> None:
    Path("own.py").write_text(source)
    with pytest.raises(RecipeError) as caught:
        mergebench.load(RECIPE_DICT | {"merge_method": named})
    assert caught.value.message == f"recipe: merge_method: {message}".replace(
        " own.py:1:", f" {Path('own.py').resolve()}:1:"
    )
    assert caught.value.hint == hint


def test_the_line_where_a_method_fails(models: dict[str, Any], cli: Cli) -> None:
    Path("mine/own.py").write_text(OWN.replace("return total(", "return totall("))
    code, out, err = cli("plan", "mine/own.yaml")
    assert (code, out) == (2, "")
    assert err == f"error: {Path('mine/own.py').resolve()}:13: NameError: name 'totall' is not defined\n"


def test_an_unknown_name_says_how_to_add_one() -> None:
    with pytest.raises(RecipeError) as caught:
        methods.get("zzzzzz")
    assert "FILE.py:NAME" in str(caught.value.hint) and "docs/plugins.md" in str(caught.value.hint)


def test_get_runs_no_file(models: dict[str, Any]) -> None:
    """Names in the files of a model are looked up by `get`."""
    Path("evil.py").write_text("open('ran', 'w')\n")
    with pytest.raises(RecipeError, match=r"no method is called 'evil\.py:f'"):
        methods.get("evil.py:f")
    assert not Path("ran").exists()


def test_a_directory_runs_no_code(models: dict[str, Any], cli: Cli) -> None:
    """A model that somebody shares may hold any file and any recipe."""
    assert cli("merge", "mine/own.yaml", "--out", "out", "-q").code == 0
    Path("mine/own.py").write_text("open('ran', 'w')\n")
    Path("kit").mkdir()
    Path("kit/mergekit_config.yml").write_text(RECIPE.format("own.py:mixed"))
    Path("kit/own.py").write_text("open('ran', 'w')\n")
    for directory in ("out", "kit"):
        code, _, err = cli("plan", directory)
        assert code == 2 and "is code, and a directory's recipe runs none" in err
        assert not Path("ran").exists()
    Path("mine/own.py").write_text(OWN)
    assert cli("plan", "out", "--set", "merge_method=mine/own.py:mixed").code == 0


def test_a_function_is_given(models: dict[str, Any]) -> None:
    @merge_method(takes="task_vectors", paper="here")
    def first(tvs: TaskVectors, p: Share, ctx: Context) -> Passes:
        """The first, scaled."""
        return total(tvs[:1]) * p.share

    wanted = models["base"]
    result = mergebench.merge(RECIPE_DICT, "out", method=first)
    for name, value in read_model(result.out).items():
        if value.is_floating_point():
            moved = wanted[name] + 0.25 * (models["a"][name] - wanted[name])
            assert torch.allclose(value, moved, atol=1e-6)
    recorded = result.provenance["method"]
    assert recorded["file"] == str(Path(__file__)) and len(recorded["sha256"]) == 64
    recipe = mergebench.load(RECIPE_DICT, method=first)
    assert recipe.method is first and default_out(recipe) == Path("merged/first")
    linear = methods.get("linear")
    assert mergebench.load({"models": RECIPE_DICT["models"]}, method=linear).merge_method == "linear"
    with pytest.raises(RecipeError, match="was checked for its own"):
        mergebench.plan(recipe, method=first)
    with pytest.raises(RecipeError, match="not made with @merge_method"):
        mergebench.load(RECIPE_DICT, method=print)  # type: ignore[arg-type]


def test_a_function_of_a_notebook(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no file, and no module knows it; its code is hashed."""
    monkeypatch.setitem(sys.modules, "cell", ModuleType("cell"))  # as a notebook's cells have __main__
    page: dict[str, Any] = {"__name__": "cell"}
    exec(compile(OWN, "<cell 1>", "exec"), page)
    first = mergebench.plan(RECIPE_DICT, method=page["mixed"])
    mergebench.run(first, "out")
    check("out", models)
    other: dict[str, Any] = {"__name__": "cell"}
    exec(compile(OWN.replace("1 - p", "2 - p"), "<cell 2>", "exec"), other)
    assert fingerprint_of(first) != fingerprint_of(mergebench.plan(RECIPE_DICT, method=other["mixed"]))
