"""Models of different vocabularies: mergekit's tokens, ids and rows; refusals; chunks; what transformers loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergebench
from mergebench.checkpoint.side_files import needs_sentencepiece
from mergebench.errors import MergebenchError, ModelError
from mergebench.recipe.tokenizers import load

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
import mergekit_tokens
from mergekit_tokens import BASED, BOTH, CASES, LINEAR, VOCABULARY

HERE = Path(mergekit_tokens.__file__)
GOLDEN = load_file(HERE.with_suffix(".safetensors"))
IDS: dict[str, dict[str, int]] = json.loads(HERE.with_suffix(".json").read_text(encoding="utf-8"))
EMBEDDING, HEAD = VOCABULARY
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    mergekit_tokens.write_models(folder)
    return folder


@pytest.fixture
def models(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models in the working directory, for this test alone."""
    for model in mergekit_tokens.MODELS:
        shutil.copytree(written / model, tmp_path / model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def make(models: Path) -> Make:
    """Merge a recipe; the result's directory."""

    def run(text: str, **options: Any) -> Path:
        (models / "recipe.yaml").write_text(text, encoding="utf-8")
        out = models / f"out{len(list(models.glob('out*')))}"
        return mergebench.run(mergebench.plan(mergebench.load(models / "recipe.yaml"), **options), out).out

    return run


def replace(file: Path, content: str) -> None:
    file.unlink()
    file.write_text(content, encoding="utf-8")


def vocabulary(folder: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    return dict(AutoTokenizer.from_pretrained(folder).get_vocab())


@pytest.mark.parametrize("case", CASES)
def test_mergekits_rows(case: str, make: Make) -> None:
    out = make(CASES[case])

    mine, theirs = vocabulary(out), IDS[case]
    assert mine.keys() == theirs.keys()
    # mergekit numbers a union's new tokens in the order of a hash table, another at each run
    settled = [token for token in theirs if "union" not in CASES[case] or theirs[token] < 25]
    assert [mine[token] for token in settled] == [theirs[token] for token in settled]
    merged = load_file(out / "model.safetensors")
    places = [mine[token] for token in theirs]
    for name in VOCABULARY:
        expected = GOLDEN[f"{case}/{name}"]
        assert merged[name].shape == expected.shape
        count = len(theirs)
        torch.testing.assert_close(merged[name][places], expected[list(theirs.values())], rtol=2e-6, atol=2e-7)
        torch.testing.assert_close(merged[name][count:], expected[count:], rtol=2e-6, atol=2e-7)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(merged[EMBEDDING])


def test_a_unions_tokens_come_in_recipe_order(make: Make) -> None:
    mine = vocabulary(make(CASES["union"]))
    new = sorted((token for token in mine if mine[token] >= 25), key=mine.__getitem__)
    # ordinary tokens of left and right by their ids, then added ones; ours1 and <r> are added ones of another
    assert new == ["ours0", "left0", "right0", "<l>", "ours1", "<r>"]


def test_transformers_loads_what_was_merged(make: Make) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = make(CASES["tokens"])
    merged = load_file(out / "model.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("all2 <l> right0 b1", return_tensors="pt").input_ids
    weights = model.get_input_embeddings().weight
    assert torch.equal(weights[ids[0]], merged[EMBEDDING][ids[0]])
    assert tokenizer.convert_ids_to_tokens(ids[0].tolist()) == ["all2", "<l>", "right0", "b1"]
    right = mergekit_tokens.tensors("right")[EMBEDDING][9]  # forced on all, so that it is everyone's
    torch.testing.assert_close(weights[ids[0, 3]].detach(), torch.from_numpy(right), rtol=2e-6, atol=2e-7)
    assert not weights[ids[0, 1]].any()
    assert model.get_output_embeddings().weight.shape == weights.shape


@pytest.mark.parametrize("case", ["tokens", "union", "task-vectors"])
def test_chunks_and_workers_change_nothing(case: str, make: Make) -> None:
    text = CASES[case].replace("dtype: float32", "dtype: bfloat16")
    expected = load_file(make(text) / "model.safetensors")
    for options in ({"chunk": 7, "workers": 1}, {"chunk": 16, "workers": 3}, {"chunk": 131, "workers": 2}):
        found = load_file(make(text, **options) / "model.safetensors")
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_statistics_over_remapped_rows_are_cut_alike(make: Make) -> None:
    text = CASES["task-vectors"].replace("task_arithmetic", "ties").replace("{weight", "{density: 0.4, weight")
    expected = load_file(make(text) / "model.safetensors")
    found = load_file(make(text, chunk=50, workers=2) / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_forked_workers_read_the_same_rows(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergebench.engine import executors

    expected = load_file(make(CASES["tokens"]) / "model.safetensors")
    monkeypatch.setattr(executors, "FORK_FROM", 0)
    found = load_file(make(CASES["tokens"], workers=2) / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_models_of_other_types_and_tied_heads(make: Make, models: Path) -> None:
    """left is stored as bfloat16; none stores a head. The output has the base's type."""
    for model in mergekit_tokens.MODELS:
        kind = torch.bfloat16 if model == "left" else torch.float32
        stored = load_file(models / model / "model.safetensors")
        (models / model / "model.safetensors").unlink()
        kept = {name: value.to(kind) for name, value in stored.items() if name != HEAD}
        save_file(kept, models / model / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((models / model / "config.json").read_text())
        replace(models / model / "config.json", json.dumps(config | {"tie_word_embeddings": True}))
    out = make(CASES["union"].replace("dtype: float32\n", ""))
    merged = load_file(out / "model.safetensors")
    assert HEAD not in merged and merged[EMBEDDING].dtype == torch.float32
    mine = vocabulary(out)
    left = torch.from_numpy(mergekit_tokens.tensors("left")[EMBEDDING])
    row = left[vocabulary(models / "left")["<l>"]].bfloat16().float()
    torch.testing.assert_close(merged[EMBEDDING][mine["<l>"]], row, rtol=2e-6, atol=2e-7)


def test_an_excluded_embedding_is_the_bases_with_the_output_tokens(make: Make, models: Path) -> None:
    out = make(CASES["union"] + f"exclude: [{EMBEDDING}]\n")
    merged, base = load_file(out / "model.safetensors"), load_file(models / "base" / "model.safetensors")
    assert torch.equal(merged[EMBEDDING][:25], base[EMBEDDING][:25])
    left = load_file(models / "left" / "model.safetensors")[EMBEDDING]
    assert torch.equal(merged[EMBEDDING][vocabulary(out)["<l>"]], left[vocabulary(models / "left")["<l>"]])


def test_the_bases_files_stay_as_they_are_where_its_tokens_do(make: Make, models: Path) -> None:
    out = make(CASES["base"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (models / "base" / name).read_bytes()
    out = make(CASES["left"])
    assert (out / "tokenizer.json").read_bytes() == (models / "left" / "tokenizer.json").read_bytes()
    assert vocabulary(out) == vocabulary(models / "left")


def test_the_shards_and_their_layout_are_the_bases(make: Make, models: Path) -> None:
    whole = load_file(models / "base" / "model.safetensors")
    (models / "base" / "model.safetensors").unlink()
    index = {}
    for number, names in enumerate((list(whole)[::2], list(whole)[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: whole[name] for name in names}, models / "base" / file)
        index |= dict.fromkeys(names, file)
    (models / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    out = make(CASES["union"])
    assert json.loads((out / "model.safetensors.index.json").read_text())["weight_map"] == index


def test_slices(make: Make) -> None:
    layers = "- sources: [{model: base, layer_range: [0, 2]}]\n- sources: [{model: left, layer_range: [1, 4]}]\n"
    out = make("merge_method: passthrough\ndtype: float32\ntokenizer_source: union\nslices:\n" + layers)
    config, merged = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert config["num_hidden_layers"] == 5
    assert config["vocab_size"] == len(merged[EMBEDDING]) == len(merged[HEAD]) == len(vocabulary(out))


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (LINEAR + BASED, "lm_head.weight: left has [21, 16], base has [30, 16]", "tokenizer_source: union"),
        (LINEAR + BASED + "tokenizer_source: none\n", "recipe.yaml:5:1: model 'none': no such", "org/name"),
        (LINEAR + BASED + "tokenizer_source: base\ntokenizer: {}\n", "cannot be given with tokenizer", "one of them"),
        (LINEAR + BASED + "tokenizer: {sorce: base}\n", "tokenizer.sorce: no such key", "did you mean 'source'"),
        (LINEAR + BASED + "tokenizer: {pad_to_multiple_of: 0}\n", "at least 1", ""),
        (LINEAR + BASED + "tokenizer: {tokens: {x: base}}\n", "tokenizer.tokens.x: must be a mapping", "source"),
        (LINEAR + BASED + "tokenizer: {tokens: {x: {source: base}}}\n", "'base' has no token 'x'", ""),
        (LINEAR + BASED + "tokenizer: {tokens: {x: {source: bse}}}\n", "'bse' is no model", "did you mean 'base'"),
        (
            LINEAR + BASED + "tokenizer: {tokens: {x: {source: {kind: model_token, model: left, token: lefto}}}}\n",
            "'left' has no token 'lefto'",
            "did you mean 'left0'",
        ),
        (
            LINEAR + BASED + "tokenizer: {tokens: {x: {source: {kind: model_token, model: left, token_id: 21}}}}\n",
            "'left' has 21 tokens, the last is 20",
            "",
        ),
        (LINEAR + BASED + "tokenizer: {tokens: {x: {source: {kind: one}}}}\n", "of kind zero or model_token", ""),
        (LINEAR + BOTH + "chat_template: vicuna\n", "must be a chat template", "chatml"),
    ],
)
def test_refused(text: str, message: str, hint: str, make: Make) -> None:
    with pytest.raises(MergebenchError) as caught:
        make(text)
    assert message in caught.value.message and "\n" not in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_model_without_a_tokenizer(make: Make, models: Path) -> None:
    (models / "left" / "tokenizer.json").unlink()
    with pytest.raises(MergebenchError, match="model 'left': it has no tokenizer"):
        make(CASES["union"])
    (models / "left" / "tokenizer.json").write_text("{")
    with pytest.raises(MergebenchError, match=r"model 'left': transformers cannot build its tokenizer"):
        make(CASES["union"])


def test_tokens_that_the_base_has_no_row_for(make: Make, models: Path) -> None:
    """Added tokens beyond the embedding are dropped, as mergekit does; words of a WordLevel model are refused."""
    cut(models / "base", 24)
    mine = vocabulary(make(CASES["base"]))
    assert "<s>" in mine and "<pad>" not in mine and len(mine) == 24
    cut(models / "base", 10)
    with pytest.raises(MergebenchError, match="15 tokens that it has no rows for"):
        make(CASES["base"])


def cut(model: Path, size: int) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    cut = {name: value[:size] if name in VOCABULARY else value for name, value in tensors.items()}
    save_file({name: value.clone() for name, value in cut.items()}, model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    replace(model / "config.json", json.dumps(config | {"vocab_size": size}))


@pytest.mark.parametrize("tokens", ["", "tokenizer_source: union\n"])
def test_chat_templates(tokens: str, make: Make, models: Path) -> None:
    from transformers import AutoTokenizer

    text = LINEAR + (BASED if tokens else "models: [{model: base}]\n") + tokens
    hello = [{"role": "user", "content": "all1"}]

    def rendered(more: str) -> str:
        tokenizer = AutoTokenizer.from_pretrained(make(text + more))
        return str(tokenizer.apply_chat_template(hello, tokenize=False, add_generation_prompt=True))

    assert rendered("chat_template: chatml\n") == "<|im_start|>user\nall1<|im_end|>\n<|im_start|>assistant\n"
    assert rendered("chat_template: '{{ messages[0].content }}!'\n") == "all1!"
    for model, template in (("base", "usual {{ bos_token }}"), ("left", "other"), ("right", "usual {{ bos_token }}")):
        (models / model / "chat_template.jinja").write_text(template)
    assert rendered("chat_template: auto\n").startswith("usual")


def test_a_recipe_round_trips(models: Path) -> None:
    recipe = mergebench.load(
        {"merge_method": "linear", "models": [{"model": "base"}], "tokenizer": {
            "tokens": {"a": {"source": "base"}, "b": {"source": {"kind": "zero"}, "force": True},
                       "c": {"source": {"kind": "model_token", "model": "base", "token_id": 3}}},
            "pad_to_multiple_of": 8}, "chat_template": "chatml"}
    )  # fmt: skip
    assert recipe.vocabulary is not None and recipe.vocabulary.source == "union"
    assert mergebench.load(recipe.to_dict()) == recipe


def test_recipes_without_it_import_no_transformers(models: Path) -> None:
    code = (
        "import sys, mergebench\n"
        "mergebench.plan(mergebench.load({'merge_method': 'linear', 'models': [{'model': 'base'}]}))\n"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


def test_the_union_of_equal_tokenizers_is_that_tokenizer(make: Make, models: Path) -> None:
    """Also where transformers builds a class that gives other tokens than tokenizer.json."""
    for model in ("base", "left"):
        for file in (models / "base").glob("token*"):
            replace(models / model / file.name, file.read_text()) if model == "left" else None
        named = json.loads((models / model / "tokenizer_config.json").read_text())
        replace(models / model / "tokenizer_config.json", json.dumps(named | {"tokenizer_class": "Qwen2Tokenizer"}))
    out = make("base_model: base\nmodels: [{model: base}, {model: left}]\nmerge_method: linear\n"
               "parameters: {weight: 0.5}\ntokenizer_source: union\nexclude: ['*norm*']\n")  # fmt: skip
    assert (out / "tokenizer.json").read_bytes() == (models / "base" / "tokenizer.json").read_bytes()
    tokens = 1 + len(mergekit_tokens.WORDS["base"]) + len(mergekit_tokens.ADDED["base"])
    assert len(load_file(out / "model.safetensors")[EMBEDDING]) == tokens
    card = (out / "README.md").read_text()
    assert all(f"{name}: transformers' Qwen2Tokenizer gives other tokens" in card for name in ("base", "left"))


def test_a_union_keeps_the_pipeline_and_the_class_of_the_base(make: Make, models: Path) -> None:
    from tokenizers import Tokenizer

    named = json.loads((models / "base" / "tokenizer_config.json").read_text())
    replace(models / "base" / "tokenizer_config.json", json.dumps(named | {"tokenizer_class": "Qwen2Tokenizer"}))
    out = make(CASES["union"])
    before, after = (Tokenizer.from_file(str(place / "tokenizer.json")) for place in (models / "base", out))
    assert before.encode("all2 b1 all0").ids == after.encode("all2 b1 all0").ids != []
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "Qwen2Tokenizer"


@pytest.mark.parametrize("source", ["left", "base"])
def test_a_link_among_the_files_of_a_tokenizer_is_not_copied(make: Make, models: Path, source: str) -> None:
    (models / "secret").write_text("a secret")
    (models / source / "vocab_notes").symlink_to(models / "secret")
    with pytest.raises(MergebenchError, match="vocab_notes: a link out of the model's directory"):
        make(f"base_model: base\nmodels: [{{model: base}}, {{model: left}}]\nmerge_method: linear\n"
             f"parameters: {{weight: 0.5}}\ntokenizer_source: {source}\n")  # fmt: skip


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="reads it")
def test_a_sentencepiece_model_without_its_package(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"tokenizer\.model is a SentencePiece model") as error:
        load(tmp_path, "one")
    assert error.value.hint == "pip install sentencepiece, or put a tokenizer.json beside it"


def test_a_tokenizer_model_that_is_not_sentencepieces(tmp_path: Path) -> None:
    """tiktoken's files have the same name, and are text."""
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert needs_sentencepiece(tmp_path) is None


def test_a_chat_template_comes_with_what_ends_a_turn(make: Make, models: Path) -> None:
    """The template of a fine-tune, and its generation_config.json: the base's would generate past the end."""
    ends = {"base": 2, "left": [2, 5], "right": 7}
    for name, end in ends.items():
        (models / name / "generation_config.json").unlink(missing_ok=True)
        (models / name / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))

    said: list[bool] = []

    def ends_of(template: str) -> object:
        out = make(LINEAR + BASED + "tokenizer_source: union\n" + template)
        notes = json.loads((out / "mergebench.json").read_text())["notes"]
        said.append(any("the chat template and generation_config.json: those of" in note for note in notes))
        return json.loads((out / "generation_config.json").read_text())["eos_token_id"]

    assert ends_of("chat_template: auto\n") == 2
    (models / "left" / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert ends_of("chat_template: auto\n") == [2, 5]
    assert ends_of("chat_template: chatml\n") == ends_of("") == 2
    (models / "base" / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert ends_of("chat_template: auto\n") == 2
    assert said == [False, True, False, False, False]
