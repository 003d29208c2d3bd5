"""No code beside a model is ever run, and nobody is asked whether to run it."""

from __future__ import annotations

import ast
import io
import sys
from pathlib import Path

import pytest
import torch
from models import tiny_tensors, write_model

import mergebench
from mergebench.deltas.open import open_model
from mergebench.errors import MergebenchError, RecipeError
from mergebench.networks.network import Network
from mergebench.networks.verify import verify

PACKAGE = Path(mergebench.__file__).parent
DATA = {"GenerationConfig"}  # takes no such argument: it reads settings, and nothing is called by them


def calls(tree: ast.AST) -> list[ast.Call]:
    """Calls by which transformers may load the code of a model."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    called = [(node, node.func) for node in found if isinstance(node.func, ast.Attribute)]
    return [
        node
        for node, function in called
        if function.attr in ("from_pretrained", "from_config")
        and not (isinstance(function.value, ast.Name) and function.value.id in DATA)
    ]


def refuses(call: ast.Call) -> bool:
    return any(
        one.arg == "trust_remote_code" and isinstance(one.value, ast.Constant) and one.value.value is False
        for one in call.keywords
    )


def test_every_call_of_transformers_refuses_code() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}:{call.lineno}": refuses(call)
        for path in PACKAGE.rglob("*.py")
        for call in calls(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert len(found) >= 9 and [place for place, refused in found.items() if not refused] == []


@pytest.mark.parametrize("way", ["eval", "verify"])
def test_a_yes_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """A class that transformers has not, for a type that it has: only then it asks."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    own = {"model_type": "vit", "architectures": ["AutoModelForCausalLM"], **sizes}
    own["auto_map"] = {"AutoModelForCausalLM": "own.Model"}
    code = f"open({str(tmp_path / 'was run')!r}, 'w')"
    place = write_model(tmp_path / "model", tiny_tensors(), config=own, side_files={"own.py": code})
    answers = io.StringIO("y\n" * 9)
    monkeypatch.setattr(sys, "stdin", answers)
    with pytest.raises(MergebenchError):
        if way == "verify":
            verify(place)
        else:
            Network(open_model(str(place)), "AutoModelForCausalLM", torch.device("cpu"))
    assert not (tmp_path / "was run").exists() and answers.tell() == 0


@pytest.mark.parametrize("names", [[1], "BertModel", [], {}, ["Trainer"], ["pipeline"], [["BertModel"]]])
def test_architectures_of_any_shape(tmp_path: Path, names: object) -> None:
    """`architectures` may name anything: an error of ours, or the architecture of the config alone."""
    config = {"model_type": "bert", "architectures": names}
    place = write_model(tmp_path / "model", tiny_tensors(), config=config)
    with pytest.raises(MergebenchError):
        verify(place)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (None, "needs a config.json"),
        ({"_class_name": "UNet2DConditionModel"}, "cannot load 'model': it is a UNet2DConditionModel of diffusers"),
        ({"hidden_size": 2}, "cannot load 'model': config.json has no model_type"),
        ({"model_type": "own"}, "cannot load 'model': it knows no model_type 'own'"),
    ],
)
def test_what_cannot_be_verified_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, str] | None, why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model", tiny_tensors(), config=config)
    plan = mergebench.plan(mergebench.load({"merge_method": "linear", "models": [{"model": "model"}]}))
    with pytest.raises(RecipeError, match=f"^--verify:? .*{why}"):
        mergebench.run(plan, "out", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
