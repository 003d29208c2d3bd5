"""Every mistake in a recipe: where, what, and the way out, word for word."""

# ruff: noqa: E501  (a table reads best with a case a line)

from __future__ import annotations

import textwrap
from collections.abc import Callable

import pytest

from mergebench import methods
from mergebench.errors import RecipeError
from mergebench.recipe import load

Write = Callable[[str], str]

START = """
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 0.5}
  - model: b
"""  # what a case below adds begins in line 7

REFERENCE = "write it as PATH, org/name@revision or MODEL+ADAPTER"
MODULES = "write it as modules: {NAME: {models: [...]}}"
KEYS = (
    "base_model, chat_template, dtype, edits, evaluate, exclude, include, lines, merge_method, models, name, out_dtype, parameters, "
    "schedule, scope, seed, slices, tokenizer, tokenizer_source"
)
OWN = "; the method's own go under parameters"
DENSITY = "share of elements kept, above 0, at most 1"
SLICES = "write it as '- sources: [{model: PATH, layer_range: [0, 8]}]'"
TOKEN = "write {source: MODEL}, {source: {kind: zero}} or {source: {kind: model_token, model: MODEL, token: TEXT}}"
TEMPLATE = "write auto (what most of the models have), chatml, llama3, mistral, alpaca, exaone, or the template itself"

AFTER_START = [
    # unknown keys
    ("parameters:\n    densty: 1", "8:5", "parameters.densty: 'ties' has no such parameter", f"did you mean 'density' ({DENSITY})?"),
    ("parameters: {x: 1}", "7:14", "parameters.x: 'ties' has no such parameter", "it takes density, lambda, normalize, weight"),
    ("parmeters: {density: 1}", "7:1", "parmeters: no such key", "did you mean 'parameters'?"),
    ("x: 1", "7:1", "x: no such key", f"known: {KEYS}{OWN}"),
    # known keys in the wrong place
    ("density: 1", "7:1", "density: is in the wrong place", "write it under parameters: {density: 1}"),
    ("    weight: 0.3", "7:5", "models.1.weight: is in the wrong place", "write it under parameters: {weight: 0.3}"),
    ("    lambda: 1", "7:5", "models.1.lambda: is in the wrong place", "write it under parameters at the top of the recipe: {lambda: 1}"),
    ("    layer_range: [0, 2]", "7:5", "models.1.layer_range: is in the wrong place", "write it in the sources of slices, in place of models"),
    ("    dtype: float32", "7:5", "models.1.dtype: is in the wrong place", "write it at the top of the recipe"),
    ("parameters: {dtype: float32}", "7:14", "parameters.dtype: is in the wrong place", "write it at the top of the recipe"),
    ("pad_to_multiple_of: 8", "7:1", "pad_to_multiple_of: is in the wrong place", "write it under tokenizer: {source: union, pad_to_multiple_of: 8}"),
    ("    wieght: 1", "7:5", "models.1.wieght: no such key", f"known: as_trained, data, model, parameters, statistics, task_vector{OWN}"),
    ("    parameters: {wieght: 1}", "7:18", "models.1.parameters.wieght: 'ties' has no such parameter", "did you mean 'weight' (weight of the model)?"),
    ("evaluate: {suit: a}", "7:12", "evaluate.suit: no such key", "did you mean 'suite'?"),
    ("evaluate: {x: a}", "7:12", "evaluate.x: no such key", "known: baselines, suite"),
    ('"a\\nb": 1', "7:1", "'a\\nb': no such key", f"known: {KEYS}{OWN}"),
    # values of parameters
    ("parameters:\n  density: 5", "8:3", "parameters.density: must be above 0, at most 1, got 5", "share of elements kept"),
    ("parameters: {density: 0}", "7:14", "parameters.density: must be above 0, at most 1, got 0", "share of elements kept"),
    ("parameters: {density: '0.5'}", "7:14", "parameters.density: must be a number, above 0, at most 1, got '0.5'", "share of elements kept"),
    ("parameters: {density: true}", "7:14", "parameters.density: must be a number, above 0, at most 1, got true", "share of elements kept"),
    ("parameters: {density: }", "7:14", "parameters.density: must be a number, above 0, at most 1, got nothing", "share of elements kept"),
    ("parameters: {density: {a: 1}}", "7:14", "parameters.density.0: must be {filter, value} or {value}, got a mapping", None),
    ("parameters: {normalize: yes}", "7:14", "parameters.normalize: must be true or false, got 'yes'", "divide by the sum of the weights that agree"),
    ("parameters: {normalize: [[true]]}", "7:26", "parameters.normalize.0: must be true or false, got a list", "divide by the sum of the weights that agree"),
    ("parameters: {lambda: .inf}", "7:14", "parameters.lambda: must be finite, got inf", None),
    ("    parameters: {lambda: 1}", "7:18", "models.1.parameters.lambda: 'ties' takes it once for all models", "move it to the recipe's own parameters: lambda: 1"),
    ("    parameters: {density: 2}", "7:18", "models.1.parameters.density: must be above 0, at most 1, got 2", "share of elements kept"),
    # what varies
    ("parameters: {density: []}", "7:14", "parameters.density: an empty list", "give one number, a gradient, or {filter, value} entries"),
    ("parameters: {density: [0.1, 5]}", "7:29", "parameters.density.1: must be at least 0, at most 1, got 5", "share of elements kept"),
    ("parameters: {density: [0.1, a]}", "7:29", "parameters.density.1: must be a number, at least 0, at most 1, got 'a'", "share of elements kept"),
    ("parameters: {density: [0.1, {value: 1}]}", "7:24", "parameters.density.0: must be {filter, value} or {value}, got 0.1", None),
    ("parameters: {density: [{filter: mlp, value: 0}]}", "7:38", "parameters.density.0.value: must be above 0, at most 1, got 0", "share of elements kept"),
    ("parameters: {density: [{filter: mlp}]}", "7:24", "parameters.density.0: must be {filter, value} or {value}, got a mapping", None),
    ("parameters: {density: [{filtre: mlp, value: 1}]}", "7:24", "parameters.density.0: must be {filter, value} or {value}, got a mapping", None),
    ("parameters: {density: [{filter: '/(/', value: 1}]}", "7:25", "parameters.density.0.filter: no regular expression: missing ), unterminated subpattern at position 0", None),
    # not yet
    ("slices: [{sources: [{model: a, layer_range: [0, 2]}]}]", "7:1", "slices: cannot be given with models", "give one of them"),
    # tokens
    ("tokenizer: union", "7:1", "tokenizer: must be a mapping, got 'union'", "write tokenizer: {source: union}"),
    ("tokenizer_source: [union]", "7:1", "tokenizer_source: must be base, union or a model, got a list", None),
    ("tokenizer: {sauce: base}", "7:13", "tokenizer.sauce: no such key", "did you mean 'source'?"),
    ("tokenizer: {x: base}", "7:13", "tokenizer.x: no such key", "known: pad_to_multiple_of, source, tokens"),
    ("tokenizer: {pad_to_multiple_of: 0}", "7:13", "tokenizer.pad_to_multiple_of: must be a whole number, at least 1, got 0", None),
    ("tokenizer: {tokens: [a]}", "7:13", "tokenizer.tokens: must be a mapping of tokens, got a list", None),
    ("tokenizer: {tokens: {a: x}}", "7:22", "tokenizer.tokens.a: must be a mapping with a source, got 'x'", TOKEN),
    ("tokenizer: {tokens: {a: {source: x, force: 1}}}", "7:37", "tokenizer.tokens.a.force: must be true or false, got 1", None),
    ("tokenizer: {tokens: {a: {source: {kind: [x]}}}}", "7:26", "tokenizer.tokens.a.source: must be a model, or of kind zero or model_token, got a mapping", TOKEN),
    ("tokenizer: {tokens: {a: {source: {kind: zero, model: x}}}}", "7:26", "tokenizer.tokens.a.source: must be a model, or of kind zero or model_token, got a mapping", TOKEN),
    ("tokenizer: {tokens: {a: {source: {kind: model_token, model: x}}}}", "7:26", "tokenizer.tokens.a.source: must name a model, and either a token or a token_id", TOKEN),
    ("tokenizer: {tokens: {a: {source: {kind: model_token, model: x, token: 3}}}}", "7:64", "tokenizer.tokens.a.source.token: must be text, got 3", "put it in quotes"),
    ("tokenizer: {tokens: {a: {source: {kind: model_token, model: x, token_id: -3}}}}", "7:64", "tokenizer.tokens.a.source.token_id: must be a whole number, at least 0, got -3", None),
    ("chat_template: vicuna", "7:1", "chat_template: must be a chat template, got 'vicuna'", TEMPLATE),
    ("modules: {}", "7:1", "modules: must be a mapping of modules, got nothing", MODULES),
    ("modules: [a]", "7:1", "modules: must be a mapping of modules, got a list", MODULES),
    ("modules: {text: [a]}", "7:11", "modules.text: must be a mapping, got a list", MODULES),
    ("modules: {text: {models: [{model: a}]}}", "7:18", "modules.text.models: cannot be given with models at the top", "give one of them"),
    ("modules: {text: {dtype: float32}}", "7:18", "modules.text.dtype: no such key", "a module has models, slices, parameters"),
    ("modules: {text: {}, vision: {}}", "7:11", "modules.text: one of several modules takes models, or one slice of all its layers", "write a document for each module, with include: and the one before as its base_model"),
    ("name: a/b", "7:1", "name: must be a plain name, it becomes a directory's, got 'a/b'", None),
    ("name: .a", "7:1", "name: must be a plain name, it becomes a directory's, got '.a'", None),
    ("name: a@b", "7:1", "name: must be a plain name, it becomes a directory's, got 'a@b'", None),
    ("name: 1", "7:1", "name: must be a plain name, it becomes a directory's, got 1", None),
    # values of the recipe's own keys
    ("scope: layer", "7:1", "scope: must be tensor or model, got 'layer'", None),
    ("seed: -1", "7:1", "seed: must be a whole number, at least 0, got -1", None),
    ("seed: 1.5", "7:1", "seed: must be a whole number, at least 0, got 1.5", None),
    ("seed: true", "7:1", "seed: must be a whole number, at least 0, got true", None),
    ("dtype: bf16", "7:1", "dtype: must be one of float32, float16, bfloat16, got 'bf16'", "did you mean 'bfloat16'?"),
    ("dtype: int8", "7:1", "dtype: must be one of float32, float16, bfloat16, got 'int8'", None),
    ("out_dtype: [float32]", "7:1",
     "out_dtype: must be one of float32, float16, bfloat16, float8_e4m3, mxfp4, got a list", None),
    ("out_dtype: fp8", "7:1",
     "out_dtype: must be one of float32, float16, bfloat16, float8_e4m3, mxfp4, got 'fp8'",
     "did you mean 'float8_e4m3'?"),
    ("dtype: torch.float8_e4m3fn", "7:1",
     "dtype: must be one of float32, float16, bfloat16, got 'torch.float8_e4m3fn'",
     "did you mean out_dtype: float8_e4m3?"),
    ("dtype: mxfp4", "7:1", "dtype: must be one of float32, float16, bfloat16, got 'mxfp4'",
     "did you mean out_dtype: mxfp4?"),
    ("exclude: lm_head.*", "7:1", "exclude: must be a list of globs, got 'lm_head.*'", "write it in brackets: ['*.bias']"),
    ("include: [a, 3]", "7:14", "include.1: must be a glob, got 3", None),
    ("include: [a, '']", "7:14", "include.1: must be a glob, got ''", None),
    ("parameters: 3", "7:1", "parameters: must be a mapping, got 3", None),
    ("    parameters: [a]", "7:5", "models.1.parameters: must be a mapping, got a list", None),
    # models
    ("  - model: 3", "7:5", "models.2.model: must be a path or org/name, got 3", None),
    ("  - model: {path: a}", "7:5", "models.2.model: must be a path or org/name, got a mapping", REFERENCE),
    ("  - model: {model: {path: a, ref: b}}", "7:5", "models.2.model: must be a path or org/name, got a mapping", REFERENCE),
    ("  - model: {model: a, lora: {path: 1}}", "7:5", "models.2.model: must be a path or org/name, got a mapping", REFERENCE),
    ("  - c", "7:5", "models.2: must be a mapping, got 'c'", "list the models to merge as '- model: PATH'"),
    ("  - model: ''", "7:5", "models.2.model: must be a path or org/name, got ''", None),
    ("  - parameters: {weight: 1}", "7:5", "models.2: has neither model nor task_vector", "give one of them"),
    ("  - {task_vector: a, model: b}", "7:5", "models.2: has both model and task_vector", "give one of them"),
    # evaluation
    ("evaluate: suite.yaml", "7:1", "evaluate: must be a mapping, got 'suite.yaml'", "write evaluate: {suite: FILE}"),
    ("evaluate: {baselines: [linear]}", "7:1", "evaluate.suite: missing", "name a suite file, or write its tasks here"),
    ("evaluate: {suite: {}}", "7:12", "evaluate.suite: missing", "name a suite file, or write its tasks here"),
    ("evaluate: {suite: 3}", "7:12", "evaluate.suite: must be a file or a mapping, got 3", None),
    ("evaluate: {suite: a, baselines: linear}", "7:22", "evaluate.baselines: must be a list of merge methods, got 'linear'", "write it in brackets: [linear]"),
    ("evaluate: {suite: a, baselines: [linear, lineer]}", "7:42", "evaluate.baselines.1: no method is called 'lineer'", "did you mean 'linear'?"),
    ("evaluate: {suite: a, baselines: [slerp]}", "7:34", "evaluate.baselines.0: 'slerp' has no default for t", "give it: {slerp: {t: VALUE}}"),
    ("evaluate: {suite: a, baselines: [{ties: {densty: 0.2}}]}", "7:42", "evaluate.baselines.0.ties.densty: 'ties' has no such parameter", "did you mean 'density' (share of elements kept, above 0, at most 1)?"),
    ("evaluate: {suite: a, baselines: [{ties: 0.2}]}", "7:35", "evaluate.baselines.0.ties: must be a mapping of parameters", "write it as {ties: {density: 0.2}}"),
    ("evaluate: {suite: a, baselines: [{ties: {}, linear: {}}]}", "7:34", "evaluate.baselines.0: must be the name of a merge method, or one with parameters, got a mapping", "write it as ties, or {ties: {density: 0.2}}"),
    ("evaluate: {suite: a, baselines: [linear, linear]}", "7:42", "evaluate.baselines.1: 'linear' is listed twice", None),
]  # fmt: skip

WHOLE = [
    ("merge_method: linear\n", "recipe.yaml:1:1: models: names no model", "list the models to merge as '- model: PATH'"),
    ("merge_method: linear\nmodels:\n", "recipe.yaml:2:1: models: names no model", "list the models to merge as '- model: PATH'"),
    ("merge_method: linear\nmodels: []\n", "recipe.yaml:2:1: models: names no model", "list the models to merge as '- model: PATH'"),
    ("merge_method: linear\nmodels: a\n", "recipe.yaml:2:1: models: must be a list, got 'a'", "list the models to merge as '- model: PATH'"),
    ("models: [{model: a}]\n", "recipe.yaml:1:1: merge_method: missing", "name a method, such as merge_method: linear"),
    ("models: [{model: a}]\nmerge_method: [ties]\n", "recipe.yaml:2:1: merge_method: must be the name of a merge method, got a list", None),
    ("models: [{model: a}]\nmerge_method: dare-ties\n", "recipe.yaml:2:1: merge_method: no method is called 'dare-ties'", "did you mean 'dare_ties'?"),
    ("merge_method: ties\nmodels: [{model: a}]\n", "recipe.yaml:1:1: base_model: missing, 'ties' merges task vectors", "name the model the others were fine-tuned from: base_model: PATH"),
    ("merge_method: ties\nbase_model:\nmodels: [{model: a}]\n", "recipe.yaml:2:1: base_model: missing, 'ties' merges task vectors", "name the model the others were fine-tuned from: base_model: PATH"),
    ("merge_method: linear\nmodels:\n- task_vector: a\n", "recipe.yaml:3:3: models.0.task_vector: needs a base_model to be added to", "name it: base_model: PATH"),
    ("merge_method: slerp\nmodels: [{model: a}, {model: b}]\n", "recipe.yaml:1:1: parameters.t: missing, 'slerp' needs it", "place between the base (0) and the other model (1), at least 0, at most 1"),
    ("merge_method: slerp\nmodels: [{model: a}]\nparameters: {}\n", "recipe.yaml:3:1: parameters.t: missing, 'slerp' needs it", "place between the base (0) and the other model (1), at least 0, at most 1"),
    ("merge_method: pcb\nbase_model: x\nmodels: [{model: a}]\nparameters: {variant: nlq}\n", "recipe.yaml:4:14: parameters.variant: must be one of readme, nlp, vision-es, vision, got 'nlq'", "which of the authors' four programs"),
    ("merge_method: pcb\nbase_model: x\nmodels: [{model: a}]\nparameters: {variant: }\n", "recipe.yaml:4:14: parameters.variant: must be one of readme, nlp, vision-es, vision, got nothing", "which of the authors' four programs"),
    ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 2], weight: 1}]}]\n", "recipe.yaml:2:53: slices.0.sources.0.weight: is in the wrong place", "write it under parameters: {weight: 1}"),
    ("merge_method: linear\nslices: [{sources: []}]\n", "recipe.yaml:2:11: slices.0.sources: names no model", SLICES),
    ("merge_method: linear\nslices: [{}]\n", "recipe.yaml:2:10: slices.0.sources: names no model", SLICES),
    ("merge_method: linear\nslices: [{sources: [{model: a}]}]\n", "recipe.yaml:2:21: slices.0.sources.0.layer_range: missing", SLICES),
    ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [2, 2]}]}]\n", "recipe.yaml:2:32: slices.0.sources.0.layer_range: must be two layer numbers, [first, one past the last], got [2, 2]", None),
    ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]}]\n", "recipe.yaml:2:10: slices.0: its sources have different numbers of layers", None),
    ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 2]}], residual_weight: 1}]\n", "recipe.yaml:2:55: slices.0.residual_weight: no such key", f"known: base_model, parameters, sources{OWN}"),
    ("merge_method: slerp\nslices: [{sources: [{model: a, layer_range: [0, 2], parameters: {t: 1}}]}]\n", "recipe.yaml:2:66: slices.0.sources.0.parameters.t: 'slerp' takes it once for all models", "move it to the recipe's own parameters: t: 1"),
    ("merge_method: picky\nmodels:\n- {model: a, parameters: {share: 1}}\n- model: b\n", "recipe.yaml:4:3: models.1.parameters.share: missing, 'picky' needs it", "share of the model, at least 0"),
    ("merge_method: picky\nmodels: [{model: a}]\nparameters: {share: 1, rounds: 2.5}\n", "recipe.yaml:3:24: parameters.rounds: must be a whole number, at least 1, got 2.5", "rounds to iterate"),
    ("merge_method: linear\nmodels: [{model: a}]\nevaluate: {suite: s, baselines: [ties]}\n", "recipe.yaml:3:34: evaluate.baselines.0: 'ties' merges task vectors, and the recipe has no base_model", "name the model the others were fine-tuned from: base_model: PATH"),
]  # fmt: skip


def refused(source: str) -> tuple[str, str | None]:
    with pytest.raises(RecipeError) as caught:
        load(source)
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message
    return caught.value.message, caught.value.hint


@pytest.mark.parametrize(("added", "place", "what", "hint"), AFTER_START)
def test_one_mistake(write: Write, added: str, place: str, what: str, hint: str | None) -> None:
    assert refused(write(START + added + "\n")) == (f"recipe.yaml:{place}: {what}", hint)


@pytest.mark.parametrize(("text", "message", "hint"), WHOLE)
def test_whole_recipe(write: Write, text: str, message: str, hint: str | None) -> None:
    assert refused(write(text)) == (message, hint)


def test_the_start_itself_is_fine(write: Write) -> None:
    assert load(write(START)).merge_method == "ties"


def test_the_first_mistake_in_the_file_is_told(write: Write) -> None:
    message, _ = refused(write("seed: x\nmerge_method: linear\nmodles: []\nscope: y\n"))
    assert message.startswith("recipe.yaml:1:1: seed: must be")


def test_a_mapping_has_no_lines() -> None:
    with pytest.raises(RecipeError) as caught:
        load({"merge_method": "linear", "models": [{"model": "a"}], "parameters": {"normalise": True}})
    assert caught.value.message == "recipe: parameters.normalise: 'linear' has no such parameter"
    assert caught.value.hint == "did you mean 'normalize' (divide by the sum of the weights)?"


@pytest.mark.parametrize("method", methods.names())
def test_every_method_refuses_what_it_does_not_take(method: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe: parameters.no_such: '{method}' has no such parameter"):
        load({"merge_method": method, "base_model": "x", "models": [{"model": "a"}], "parameters": {"no_such": 1}})


def test_several_files_in_one(write: Write) -> None:
    text = textwrap.dedent(START) + "---\n" + START
    assert refused(write(text))[0] == "recipe.yaml:9:1: several documents, load reads one"
