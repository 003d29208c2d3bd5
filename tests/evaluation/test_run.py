"""Evaluating candidates: order, memory, progress, silence, and models that cannot be measured."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergebench
from mergebench.deltas.open import open_model
from mergebench.errors import MergebenchError, ModelError, RecipeError, RunError
from mergebench.evaluation import Candidate, Results, Step, Suite, evaluate_models, load_suite
from mergebench.evaluation.run import homes_of as homes
from mergebench.networks.network import Network
from tests.evaluation.conftest import Files, write_encoder, write_head

Entry = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Changed(Files):
    """A model whose tensors are changed on their way into memory."""

    change: Callable[[dict[str, Tensor]], object] = field(default=lambda tensors: None)

    def state_dict(self) -> dict[str, Tensor]:
        tensors = super().state_dict()
        self.change(tensors)
        return tensors


@pytest.fixture
def suite(place: Path, entry: Entry) -> Suite:
    write_head(place / "b", seed=3)
    return load_suite({"tasks": [entry(limit=9), entry(name="b", head="b/head.safetensors", limit=5)]})


def test_records_in_order_with_what_made_them(encoder: Path, suite: Suite) -> None:
    candidates = [
        Candidate("base", "base", Files(encoder)),
        Candidate("x/b", "input", Files(encoder), Path("b")),
        Candidate("pcb", "merged", lambda: Files(encoder)),
    ]
    results = evaluate_models(candidates, suite)
    assert [(record.model, record.role, record.task) for record in results.records] == [
        ("base", "base", "a"), ("base", "base", "b"), ("x/b", "input", "a"), ("x/b", "input", "b"),
        ("pcb", "merged", "a"), ("pcb", "merged", "b"),
    ]  # fmt: skip
    assert all(record.seconds > 0 and record.n in (9, 5) for record in results.records)
    assert results.made["suite"] == suite.to_dict()
    assert results.made["mergebench"] == mergebench.__version__
    assert results.made["torch"] == torch.__version__
    assert results.made["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert results.made["date"].endswith("+00:00")


def test_relative_to_the_input_whose_directory_holds_the_head(encoder: Path, place: Path, entry: Entry) -> None:
    write_head(place / "b", seed=3)
    tasks = [entry(), entry(name="b", head="b/head.safetensors")]
    other, merged = write_encoder(place / "other", seed=4), write_encoder(place / "merged", seed=5)
    candidates = [
        Candidate("base", "base", Files(encoder), place / "b"),  # no input, so not the task's own
        Candidate("own", "input", Files(other), place / "b" / ".." / "a"),
        Candidate("twin", "input", Files(encoder), place / "a"),
        Candidate("pcb", "merged", Files(merged), place / "a"),
    ]
    suite = load_suite({"tasks": tasks})
    assert homes(candidates, suite) == {"a": "own"}  # the first one
    results = evaluate_models(candidates, suite)
    value = {model: results.of(model)["a"].value for model in results.models}
    assert len(set(value.values())) > 1
    assert {model: results.of(model)["a"].relative for model in results.models} == {
        model: value[model] / value["own"] for model in value
    }
    assert all(results.of(model)["b"].relative is None for model in results.models)


def test_twice_the_same(encoder: Path, suite: Suite) -> None:
    first, second = (evaluate_models([Candidate("m", "base", Files(encoder))], suite) for _ in range(2))
    assert [record.predictions for record in first.records] == [record.predictions for record in second.records]


def test_one_model_in_memory(encoder: Path, suite: Suite, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
    counts = []
    build = Network.__init__

    def counted(self: Network, *args: Any) -> None:
        counts.append(len(alive))
        build(self, *args)
        alive.add(self.module)

    monkeypatch.setattr(Network, "__init__", counted)
    opened: list[str] = []

    others = {family: write_encoder(place / family, family) for family in ("roberta", "distilbert")}

    def opener(name: str) -> Callable[[], Files]:
        return lambda: opened.append(name) or Files(others.get(name, encoder))

    def seen(step: Step) -> None:
        assert opened[-1] == step.model  # opened when its turn comes

    names = ["x", "y", "roberta", "distilbert", "z"]
    evaluate_models([Candidate(name, "input", opener(name)) for name in names], suite, progress=seen)
    assert counts == [0, 0, 0, 0]  # y takes the place of x; the others are built, one at a time
    assert opened == names


def test_a_model_is_read_on_one_thread(encoder: Path, suite: Suite) -> None:
    """On a busy machine the small steps of loading take many times as long on several."""
    before = torch.get_num_threads()
    seen = []
    torch.set_num_threads(2)
    try:
        model = Changed(encoder, "m", lambda tensors: seen.append(torch.get_num_threads()))
        evaluate_models([Candidate("m", "input", model)], suite)
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_progress_counts_every_item_once(encoder: Path, suite: Suite) -> None:
    steps: list[Step] = []
    evaluate_models([Candidate(name, "input", Files(encoder)) for name in "xy"], suite, progress=steps.append)
    assert [step.done for step in steps] == sorted({step.done for step in steps})
    assert {step.total for step in steps} == {28}
    assert steps[-1] == Step("y", "b", 28, 28)
    ends = {(step.model, step.task): step.done for step in steps}
    assert ends == {("x", "a"): 9, ("x", "b"): 14, ("y", "a"): 23, ("y", "b"): 28}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, which asks transformers by an old name
def test_a_checkpoint_and_an_adapter_folded_in(place: Path, entry: Entry) -> None:
    """As the merge command does it: base plus LoRA equals the weights peft merges."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    base = write_encoder(place / "base")
    torch.manual_seed(0)
    tuned = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(target_modules=["query", "value"], r=2))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    tuned.save_pretrained(place / "a")
    tuned.merge_and_unload().save_pretrained(place / "whole")
    for file in base.glob("token*"):
        (place / "whole" / file.name).write_bytes(file.read_bytes())
    model = open_model("base+a")
    candidates = [
        Candidate("base", "base", open_model("base")),
        Candidate("base+a", "input", model, model.own_directory()),
        Candidate("whole", "merged", open_model("whole")),
    ]
    results = evaluate_models(candidates, load_suite({"tasks": [entry()]}))
    plain, folded, whole = results.records
    assert folded.predictions == whole.predictions != plain.predictions
    assert (folded.relative, plain.relative) == (1.0, plain.value / folded.value)


def test_nothing_on_stdout_or_stderr(encoder: Path, place: Path) -> None:
    """In a process of its own, with the pooler missing, which transformers would report."""
    tensors = {k: v for k, v in load_file(encoder / "model.safetensors").items() if not k.startswith("pooler.")}
    (place / "m").mkdir()
    for file in encoder.iterdir():
        (place / "m" / file.name).write_bytes(file.read_bytes())
    save_file(tensors, place / "m/model.safetensors", metadata={"format": "pt"})
    code = """
        import sys
        from mergebench.evaluation import Candidate, evaluate_models, load_suite
        assert not {"torch", "transformers", "rich"} & set(sys.modules), "imported too early"
        from mergebench.deltas.open import open_model
        from transformers.utils import logging
        before = logging.get_verbosity(), logging.is_progress_bar_enabled()
        task = {"name": "a", "kind": "text-classification", "data": "data.jsonl", "head": "a/head.safetensors"}
        suite = load_suite({"tasks": [task]})
        results = evaluate_models([Candidate(n, "base", open_model("m")) for n in "xy"], suite)
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
        assert results.records[0].n == 41
        """
    lines = "\n".join(line.strip() for line in code.strip().splitlines())
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def broken(encoder: Path, place: Path) -> Iterator[Path]:
    """A copy of the encoder to damage."""
    copy = place / "broken"
    copy.mkdir()
    for file in encoder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    yield copy


def no_config(copy: Path) -> None:
    (copy / "config.json").unlink()


def no_tokenizer(copy: Path) -> None:
    for file in copy.glob("token*"):
        file.unlink()


def bad_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")


def foreign_config(copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "nobody-knows"}')


def wider_config(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))


def deeper_config(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))


def shallower_config(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_config, "no config.json in"),
        (no_tokenizer, "it has no tokenizer"),
        (bad_tokenizer, "transformers cannot build its tokenizer: "),
        (foreign_config, "transformers cannot build the model: "),
        (wider_config, "'encoder.layer.0.intermediate.dense.bias' has [32], its config.json asks for [48]"),
        (deeper_config, "'encoder.layer.2.attention.output.LayerNorm.bias' is missing in the model of its config.json"),
        (shallower_config, "'encoder.layer.1.attention.output.LayerNorm.bias' has no place in the model of its"),
    ],
)
def test_models_that_cannot_be_measured(damage: Callable[[Path], None], words: str, broken: Path, suite: Suite) -> None:
    damage(broken)
    refused(ModelError, Files(broken, "runs/broken"), suite, "model 'runs/broken': ", words)


def refused(kind: type[MergebenchError], model: Files, suite: Suite, *words: str) -> None:
    with pytest.raises(kind) as caught:
        evaluate_models([Candidate("broken", "input", model)], suite)
    assert type(caught.value) is kind
    assert "\n" not in caught.value.message
    for word in words:
        assert word in caught.value.message, caught.value.message


def test_tensors_that_do_not_fit(broken: Path, suite: Suite) -> None:
    lost = "encoder.layer.0.output.dense.bias"
    refused(ModelError, Changed(broken, "m", lambda t: t.pop(lost)), suite, f"model 'm': '{lost}' is missing")
    refused(ModelError, Changed(broken, "m", lambda t: t.update(extra=t[lost])), suite, "'extra' has no place")
    evaluate_models([Candidate("m", "input", Changed(broken, "m", lambda t: t.pop("pooler.dense.weight")))], suite)
    buffer = {"embeddings.position_ids": torch.arange(40)[None], "encoder.layer.0.masked_bias": torch.zeros(1)}
    evaluate_models([Candidate("m", "input", Changed(broken, "m", lambda t: t.update(buffer)))], suite)


def test_a_head_for_another_width(encoder: Path, place: Path, entry: Entry) -> None:
    write_head(place / "a", hidden=8)
    refused(
        ModelError,
        Files(encoder, "m"),
        load_suite({"tasks": [entry()]}),
        "a/head.safetensors: it takes 8",
        "'m' gives 16",
    )


def test_values_that_are_not_finite(broken: Path, suite: Suite) -> None:
    poison = Changed(broken, "m", lambda t: t["encoder.layer.0.output.dense.bias"].fill_(float("nan")))
    refused(RunError, poison, suite, "model 'm': its outputs are not finite")


def test_what_is_asked_for_wrongly(encoder: Path, suite: Suite) -> None:
    twins = [Candidate("m", "input", Files(encoder)), Candidate("m", "merged", Files(encoder))]
    with pytest.raises(RecipeError, match="two models to measure are called 'm'"):
        evaluate_models(twins, suite)
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="no CUDA device"):
            evaluate_models(twins[:1], suite, device="cuda")
    assert evaluate_models([], suite).records == ()
    assert isinstance(evaluate_models(twins[:1], suite, device="cpu"), Results)


def test_what_fails_stops_nobody(encoder: Path, place: Path, entry: Entry) -> None:
    write_head(place / "wide", hidden=8)
    suite = load_suite({"tasks": [entry(), entry(name="wide", head="wide/head.safetensors")]})

    def missing() -> Files:
        raise ModelError("model 'gone': no such file or directory", "look for it")

    def taken() -> Files:
        raise FileNotFoundError(2, "No such file or directory", "there/model.safetensors")

    def full(tensors: dict[str, Tensor]) -> None:
        torch.empty(2**60)

    poison = Changed(encoder, "p", lambda t: t["encoder.layer.0.output.dense.bias"].fill_(float("nan")))
    steps: list[Step] = []
    results = evaluate_models(
        [
            Candidate("gone", "input", missing),
            Candidate("taken", "input", taken),
            Candidate("good", "input", Files(encoder)),
            Candidate("poison", "input", poison),
            Candidate("full", "input", Changed(encoder, "f", full)),
            Candidate("last", "input", Files(encoder)),
        ],
        suite,
        progress=steps.append,
    )
    assert [(record.model, record.task) for record in results.records] == [("good", "a"), ("last", "a")]
    assert results.records[0].predictions == results.records[1].predictions
    wide = "wide/head.safetensors: it takes 8 features, model "
    found = [(one["model"], one["tasks"], one["error"]) for one in results.made["failed"]]
    assert found == [
        ("gone", ["a", "wide"], "model 'gone': no such file or directory"),
        ("taken", ["a", "wide"], "there/model.safetensors: No such file or directory"),
        ("good", ["wide"], f"{wide}'tiny' gives 16"),
        ("poison", ["a"], "model 'p': its outputs are not finite"),
        ("poison", ["wide"], f"{wide}'p' gives 16"),
        ("full", ["a", "wide"], "model 'full': out of memory on 'a', 'wide'"),
        ("last", ["wide"], f"{wide}'tiny' gives 16"),
    ]
    assert results.made["failed"][0]["hint"] == "look for it"
    assert steps[-1].done == steps[-1].total


def test_memory_that_runs_out_between_tasks(encoder: Path, suite: Suite) -> None:
    """Tasks that were measured stay measured, and each of the others fails once."""

    def full(network: Network, tick: Any) -> Any:
        raise MemoryError

    first, second = suite.tasks
    greedy = replace(second, name="greedy", ready=replace(second.ready, measure=full))
    reads: list[bool] = []

    def once(tensors: dict[str, Tensor]) -> None:
        reads.append(True)
        if len(reads) > 1:  # the model is gone, and cannot be read again
            raise MemoryError

    three = replace(suite, tasks=(first, greedy, second))
    results = evaluate_models([Candidate("m", "input", Changed(encoder, "m", once))], three)
    assert [record.task for record in results.records] == [first.name]
    assert [one["tasks"] for one in results.made["failed"]] == [["greedy"], [second.name]]


def test_a_model_larger_than_the_memory(encoder: Path, suite: Suite, tmp_path: Path) -> None:
    """Refused before a byte of it is read: what does not fit would end the program."""
    import shutil

    huge = tmp_path / "huge"
    shutil.copytree(encoder, huge)
    header = json.dumps({"embeddings.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    with open(huge / "model.safetensors", "wb") as file:  # a hole of 4 TB
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + 2**42)
        except OSError:
            pytest.skip("the file system takes no file of 4 TB")
    with pytest.raises(RunError, match=r"measuring it takes 10995.1 GB of memory, \d+\.\d GB are free"):
        evaluate_models([Candidate("huge", "input", open_model(str(huge)))], suite)
