"""Firing: equal to counting open gates in transformers' own modules, one text at a time."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergebench.deltas.open import open_model
from mergebench.editing.neurons import write_vectors
from mergebench.editing.patches import open_patch, write_patch
from mergebench.errors import MergebenchError, ModelError, RecipeError, RunError
from mergebench.evaluation import Candidate, Record, evaluate_models, load_suite
from tests.evaluation.conftest import Files, write_encoder
from tests.language import write_decoder, write_texts

SIZES: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 192, "initializer_range": 0.5,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
GATES = {
    "llama": "model.layers.{}.mlp.gate_proj.weight",
    "phi3": "model.layers.{}.mlp.gate_up_proj.weight",
    "gpt2": "transformer.h.{}.mlp.c_fc.weight",
    "opt": "model.decoder.layers.{}.fc1.weight",
}
ROWS = {0: [0, 3, 4, 11, 23], 1: [2, 19]}
DIRECTION = torch.linspace(-1, 2, 16)


@pytest.fixture(autouse=True)
def quick(one_thread: None) -> None:
    """Tiny matrices."""


def write_family(directory: Path, family: str, seed: int = 1) -> Path:
    """A random causal language model; Phi-3 has its gates and ups in one matrix, GPT-2 its matrices turned."""
    import transformers

    write_decoder(directory, seed)
    torch.manual_seed(seed)
    if family == "phi3":
        model: Any = transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES))
    elif family == "gpt2":
        sizes = {"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 2, "n_positions": 192}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**SIZES, **sizes}))
    elif family == "opt":
        sizes = {"ffn_dim": 24, "word_embed_proj_dim": 16}
        model = transformers.OPTForCausalLM(transformers.OPTConfig(**{**SIZES, **sizes}))
    elif family == "mixtral":
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=2))
    else:
        return directory
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers begins with zeros, which would hide a lost bias
                parameter.normal_(std=0.5)
    model.save_pretrained(directory)
    return directory


def patch_of(directory: Path, gate: str, rows: dict[int, list[int]] = ROWS, width: int = 16) -> Path:
    """A patch that gives these neurons 0.5 times the direction."""
    changes = {gate.format(layer): (torch.tensor(n), torch.full((len(n),), 0.5)) for layer, n in rows.items()}
    columns = frozenset(changes) if "c_fc" in gate else frozenset()
    file = directory / "patch.safetensors"
    write_patch(file, open_model(str(directory)), DIRECTION[:width], changes, columns, {"edit": "surgery"})
    return file


def pre_activations(directory: Path, gate: str) -> dict[str, dict[int, Tensor]]:
    """Of every text and layer [tokens, all neurons], in transformers' modules."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    found: dict[str, dict[int, Tensor]] = {}
    for line in Path("texts.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        ids = tokenizer(row["text"], truncation=True, max_length=50, return_tensors="pt")["input_ids"]
        outs: list[Tensor] = []
        with ExitStack() as hooks, torch.no_grad():
            for layer in (0, 1):
                gates = module.get_submodule(gate.format(layer).removesuffix(".weight"))
                hooks.callback(gates.register_forward_hook(lambda *call, outs=outs: outs.append(call[-1])).remove)
            module(ids)
        found[row["id"]] = {layer: out.reshape(ids.shape[1], -1) for layer, out in enumerate(outs)}
    return found


def shares(pre: dict[str, dict[int, Tensor]], rows: dict[int, list[int]] = ROWS) -> dict[str, float]:
    return {
        item: torch.cat([layers[layer][:, numbers] for layer, numbers in rows.items()], 1).gt(0).double().mean().item()
        for item, layers in pre.items()
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with texts, most of them of other lengths."""
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "texts.jsonl", count=9)
    return tmp_path


def measure(directory: Path, patch: Path, **more: Any) -> Record:
    entry = {"name": "f", "kind": "firing", "data": "texts.jsonl", "patch": str(patch), "max_length": 50, **more}
    suite = load_suite({"tasks": [entry]})
    (record,) = evaluate_models([Candidate("m", "merged", Files(directory))], suite).records
    return record


@pytest.mark.parametrize("family", GATES)
def test_firing_is_what_open_gates_are_counted(here: Path, family: str) -> None:
    directory = write_family(here / family, family)
    record = measure(directory, patch_of(directory, GATES[family]))
    expected = shares(pre_activations(directory, GATES[family]))

    assert {item: p.score for item, p in record.predictions.items()} == pytest.approx(expected, abs=1e-6)
    values = torch.tensor(list(expected.values()), dtype=torch.float64)
    assert record.value == pytest.approx(values.mean().item(), abs=1e-6)
    assert record.stderr == pytest.approx((values.std() / len(values) ** 0.5).item(), abs=1e-6)
    assert (record.metric, record.direction, record.n) == ("firing", "higher", 9)
    assert 0.1 < record.value < 0.9
    assert len(set(expected.values())) > 4


def test_what_an_edit_of_the_first_layer_opens(here: Path) -> None:
    """There a neuron's pre-activation rises by its amount of <direction, input>, exactly."""
    directory, rows = write_family(here / "before", "llama"), {0: ROWS[0]}
    patch = patch_of(directory, GATES["llama"], rows)
    shutil.copytree(directory, here / "after")
    opened, model = open_patch(patch), open_model(str(here / "after"))
    for name in opened.names:
        change = opened.change(name)
        write_vectors(opened.neurons(model, name), change.numbers, change.edited(DIRECTION))
    before, after = (pre_activations(here / place, GATES["llama"]) for place in ("before", "after"))
    added = {item: 0.5 * (inputs @ DIRECTION) for item, inputs in inputs_of_first_gate(directory).items()}
    for item, layers in before.items():
        layers[0][:, rows[0]] += added[item].unsqueeze(1)
        torch.testing.assert_close(layers[0], after[item][0], atol=2e-5, rtol=0)

    first, second = (measure(here / place, patch) for place in ("before", "after"))
    assert {item: p.score for item, p in second.predictions.items()} == pytest.approx(shares(before, rows), abs=1e-6)
    assert abs(second.value - first.value) > 0.01


def inputs_of_first_gate(directory: Path) -> dict[str, Tensor]:
    """Of every text, what the first layer's gates read [tokens, width]: the inverse of a square piece of the matrix."""
    pre = pre_activations(directory, GATES["llama"])
    weight = load_file(directory / "model.safetensors")[GATES["llama"].format(0)].double()
    return {item: (layers[0].double() @ torch.linalg.pinv(weight).T).float() for item, layers in pre.items()}


def test_neither_threads_nor_the_model_before_change_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of three texts on three threads; the second model's weights take the place of the first one's."""
    from mergebench.networks import features

    first, second = write_decoder(here / "a"), write_decoder(here / "b", seed=5)
    patch = patch_of(first, GATES["llama"])
    alone = [measure(place, patch) for place in (first, second)]
    monkeypatch.setattr(features, "CPU_TOKENS", 100)
    torch.set_num_threads(3)
    entry = {"name": "f", "kind": "firing", "data": "texts.jsonl", "patch": str(patch), "max_length": 50}
    both = evaluate_models(
        [Candidate(place.name, "input", Files(place)) for place in (first, second)], load_suite({"tasks": [entry]})
    )
    assert [dict(record.predictions) for record in both.records] == [dict(record.predictions) for record in alone]
    assert alone[0].value != alone[1].value


def test_neurons_of_several_patches_count_once(here: Path) -> None:
    directory = write_decoder(here / "m")
    files = []
    for number, rows in enumerate(({0: [1, 3], 1: [0]}, {0: [2, 3]})):
        files.append(patch_of(directory, GATES["llama"], rows).rename(here / f"{number}.safetensors"))
    entry = {"name": "f", "kind": "firing", "data": "texts.jsonl", "max_length": 50}
    with pytest.raises(RecipeError, match=r"tasks\.0\.patch: missing, 'firing' needs it"):
        load_suite({"tasks": [entry]})
    suite = load_suite({"tasks": [entry]}, edited=True)
    assert suite.tasks[0].ready.files == (Path("texts.jsonl"),)
    (record,) = evaluate_models([Candidate("m", "merged", Files(directory))], suite.on(files)).records
    expected = shares(pre_activations(directory, GATES["llama"]), {0: [1, 2, 3], 1: [0]})
    assert {item: p.score for item, p in record.predictions.items()} == pytest.approx(expected, abs=1e-6)
    assert suite.on(files).tasks[0].ready.files == (Path("texts.jsonl"), *files)


def test_what_cannot_be_watched(here: Path) -> None:
    llama, encoder = write_decoder(here / "llama"), write_encoder(here / "bert")
    patch = patch_of(llama, GATES["llama"])
    mixtral = write_family(here / "mixtral", "mixtral")

    def refused(what: str, directory: Path, patch: Path, kind: type[MergebenchError] = ModelError, **more: Any) -> None:
        with pytest.raises(kind, match=what):
            measure(directory, patch, **more)

    refused("'tiny': it has no tensor 'model.layers.0.mlp.gate_proj.weight'", encoder, patch)
    one_expert = patch_of(mixtral, "model.layers.{}.block_sparse_moe.experts.0.w1.weight")
    refused("its tensors are not in memory as they are in the files", mixtral, one_expert)
    refused("are no gates", llama, patch_of(llama, "model.embed_tokens.weight", {0: [1]}))
    refused("text must be text", llama, patch, RunError, data=_written("blank.jsonl", {"id": 1, "text": " "}))
    refused("not a patch", llama, llama / "model.safetensors")
    patch = patch_of(llama, GATES["llama"])
    refused(r"other.safetensors: tiny has \[24, 16\] for .*1.mlp.gate_proj", llama, _changed(patch, "{}.rows", 24))
    tensors = load_file(llama / "model.safetensors")
    tensors[GATES["llama"].format(0)][0] = float("nan")
    shutil.copytree(llama, here / "nan")
    save_file(tensors, here / "nan" / "model.safetensors", metadata={"format": "pt"})
    refused("its outputs are not finite", here / "nan", patch, RunError)


def _changed(patch: Path, what: str, value: int) -> Path:
    """The patch with another last number in the second layer's part."""
    with safe_open(patch, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors[what.format(GATES["llama"].format(1))][-1] = value
    save_file(tensors, patch.with_name("other.safetensors"), metadata)
    return patch.with_name("other.safetensors")


def _written(name: str, row: dict[str, Any]) -> str:
    Path(name).write_text(json.dumps(row) + "\n")
    return name
