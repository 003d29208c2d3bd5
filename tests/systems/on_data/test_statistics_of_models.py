"""Statistics against hooks and gradients by hand, one text at a time; and whatever is wrong is said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import write_encoder
from language import write_decoder, write_rows
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergebench.checkpoint.measured import Measured, read_measured
from mergebench.errors import MergebenchError, ModelError, RecipeError, RunError
from mergebench.systems.on_data import gram, make_statistics
from tests.conftest import Cli
from tests.evaluation.conftest import write_data, write_head


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with a head of its task, and the texts."""
    place = tmp_path_factory.mktemp("tiny")
    write_head(write_encoder(place / "a"))
    write_data(place / "texts.jsonl", 9, longest=12)
    return place


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_decoder(tmp_path_factory.mktemp("decoder") / "a")
    write_rows(place.parent / "texts.jsonl", [{"text": text} for text in ("ab", "the cat", "a bird says é")])
    return place


def made(model: Path, out: Path, kind: str, **settings: Any) -> tuple[Measured, dict[str, Tensor]]:
    found = make_statistics(str(model), model.parent / "texts.jsonl", out, kind=kind, device="cpu", **settings)
    return found, load_file(found.file)


def tokens_of(model: Path, length: int) -> list[Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in (model.parent / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
    return [tokenizer(row["text"], truncation=True, max_length=length, return_tensors="pt").input_ids for row in rows]


def test_gram_is_what_hooks_see(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModel

    module, seen = AutoModel.from_pretrained(tiny / "a").eval(), {}
    for name, child in module.named_modules():
        if isinstance(child, torch.nn.Linear):
            child.register_forward_hook(
                lambda _, inputs, __, name=name: seen.setdefault(name, []).append(
                    inputs[0].reshape(-1, inputs[0].shape[-1])
                )
            )
    texts = tokens_of(tiny / "a", 10)
    with torch.no_grad():
        for ids in texts:
            module(input_ids=ids)
    found, values = made(tiny / "a", tmp_path / "out", "gram", max_length=10)
    tokens = sum(ids.shape[1] for ids in texts)
    assert values.keys() == {f"{name}.weight" for name in seen}
    assert (found.about["items"], found.about["tokens"]) == (9, tokens)
    for name, inputs in seen.items():
        x = torch.cat(inputs).double()
        torch.testing.assert_close(values[f"{name}.weight"].double(), x.T @ x / tokens, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(gram, "CPU_TOKENS", 1)  # one text at a time
    _, apart = made(tiny / "a", tmp_path / "apart", "gram", max_length=10)
    for name, value in values.items():
        torch.testing.assert_close(apart[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("labels", ["model", "true"])
def test_fisher_of_a_head_is_the_squared_gradients(tiny: Path, tmp_path: Path, labels: str) -> None:
    from transformers import AutoModel

    module, head = AutoModel.from_pretrained(tiny / "a").eval(), load_file(tiny / "a" / "head.safetensors")
    rows = [json.loads(line) for line in (tiny / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
    values = dict(module.named_parameters())
    want = {name: torch.zeros_like(value) for name, value in values.items()}
    for row, ids in zip(rows, tokens_of(tiny / "a", 24), strict=True):
        for number, label in enumerate(("bad", "good", "none")):
            pooled = module(input_ids=ids).last_hidden_state.mean(1)
            log = (pooled @ head["weight"].T + head["bias"]).log_softmax(-1)[0, number]
            share = float(log.detach().exp()) if labels == "model" else float(row["label"] == label)
            slopes = torch.autograd.grad(log, list(values.values()), allow_unused=True)
            for name, slope in zip(values, slopes, strict=True):
                if slope is not None:
                    want[name] += share * slope**2 / len(rows)
    found, got = made(tiny / "a", tmp_path / "out", "fisher", labels=labels)
    stored = load_file(tiny / "a" / "model.safetensors")
    assert got.keys() == {name for name, value in stored.items() if value.is_floating_point()}
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-7)
    assert found.about["norm"] == pytest.approx(
        float(torch.cat([one.flatten() for one in got.values()]).norm()), rel=1e-4
    )


def test_fisher_of_a_language_model_with_true_next_tokens(decoder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(decoder).eval()
    values, count = dict(module.named_parameters()), 0
    want = {name: torch.zeros_like(value) for name, value in values.items()}
    for ids in tokens_of(decoder, 512):
        logs = module(input_ids=ids).logits[0, :-1].log_softmax(-1)
        slopes = torch.autograd.grad(logs.gather(1, ids[0, 1:, None]).sum(), list(values.values()))
        count += len(logs)
        for name, slope in zip(values, slopes, strict=True):
            want[name] += slope**2
    _, got = made(decoder, tmp_path / "true", "fisher", labels="true")
    for name, value in want.items():
        torch.testing.assert_close(got[name], value / count, rtol=1e-4, atol=1e-7)
    _, drawn = made(decoder, tmp_path / "drawn", "fisher")
    _, again = made(decoder, tmp_path / "again", "fisher")
    _, other = made(decoder, tmp_path / "other", "fisher", seed=1)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(drawn[name], again[name]) and not torch.equal(drawn[name], other[name])


def test_drawn_answers_have_the_expectation_as_their_mean(tmp_path: Path) -> None:
    """One place, all tokens summed exactly, against many draws."""
    from transformers import AutoModelForCausalLM

    decoder = write_decoder(tmp_path / "a")
    write_rows(tmp_path / "texts.jsonl", [{"id": number, "text": "ab"} for number in range(150)])
    module = AutoModelForCausalLM.from_pretrained(decoder).eval()
    weight = module.model.layers[0].mlp.up_proj.weight
    logs = module(input_ids=tokens_of(decoder, 512)[0]).logits[0, :-1].log_softmax(-1)[0]
    want = sum(float(log.detach().exp()) * torch.autograd.grad(log, weight, retain_graph=True)[0] ** 2 for log in logs)
    _, got = made(decoder, tmp_path / "out", "fisher")
    assert isinstance(want, Tensor)
    assert float(got["model.layers.0.mlp.up_proj.weight"].sum()) == pytest.approx(float(want.sum()), rel=0.3)


def test_gpt2_stores_inputs_first(tmp_path: Path) -> None:
    import transformers

    write_encoder(tmp_path / "a")  # for its tokenizer
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=40)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "a")
    write_data(tmp_path / "texts.jsonl", 3)
    found, values = made(tmp_path / "a", tmp_path / "out", "gram")
    assert values["transformer.h.0.mlp.c_fc.weight"].shape == (16, 16)
    assert values["transformer.h.0.mlp.c_proj.weight"].shape == (64, 64)
    assert set(found.about["inputs_first"]) == values.keys()


def refused(error: type[MergebenchError], words: str, model: Path, out: Path, kind: str, **settings: Any) -> None:
    with pytest.raises(error) as caught:
        made(model, out, kind, **settings)
    assert words in caught.value.message, caught.value.message
    assert "\n" not in caught.value.message
    assert not (out / "statistics.safetensors").exists()


def test_what_cannot_be_made_is_refused(tiny: Path, tmp_path: Path) -> None:
    model, out = tiny / "a", tmp_path / "out"
    refused(RecipeError, "'hessian' is no kind", model, out, "hessian")
    refused(RunError, "no column 'body'", model, out, "gram", text="body")
    refused(RunError, "no column 'class'", model, out, "fisher", labels="true", label="class")
    other = write_encoder(tmp_path / "no-head")
    write_data(tmp_path / "texts.jsonl", 2)
    refused(ModelError, "it has no head", other, out, "fisher")
    head = write_head(tmp_path / "elsewhere", labels=("x", "y"))
    refused(RunError, "is no class of", other, out, "fisher", head=str(head), labels="true")
    tensors = load_file(other / "model.safetensors")
    tensors["encoder.layer.0.output.dense.bias"][0] = float("nan")
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    refused(RunError, "are not finite", other, out, "gram")


def test_a_file_is_not_replaced_unasked(tiny: Path, tmp_path: Path) -> None:
    made(tiny / "a", tmp_path, "gram", limit=2)
    with pytest.raises(RecipeError, match="it exists"):
        made(tiny / "a", tmp_path, "gram", limit=3)
    made(tiny / "a", tmp_path, "gram", limit=3, overwrite=True)
    found = read_measured(tmp_path)
    assert found.about["items"] == 3
    doubt = found.doubt()
    assert doubt is None or "directions without any" in doubt


def test_the_command(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    typed = ["statistics", str(tiny / "a"), "--data", str(tiny / "texts.jsonl"), "--kind", "gram", "--device", "cpu"]
    code, out, err = cli(*typed, "--out", str(tmp_path / "out"), "--limit", "2", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert (document["kind"], document["items"], document["settings"]["limit"]) == ("gram", 2, 2)
    assert len(document["warnings"]) == int(document["tokens"] < 32)
    code, out, err = cli(*typed, "--out", str(tmp_path / "out"))
    assert (code, out) == (2, "") and "it exists" in err
    code, out, err = cli(*typed[:-4], "--kind", "gramm", "--out", str(tmp_path / "other"))
    assert code == 2 and err.startswith("error: --kind: 'gramm' is no kind of statistics") and "Traceback" not in err
