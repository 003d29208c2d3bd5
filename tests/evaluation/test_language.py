"""Tasks of language models give what lm-evaluation-harness gives when it is run by itself."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergebench import plugins
from mergebench.errors import MergebenchError, ModelError, RecipeError, RunError
from mergebench.evaluation import Candidate, Record, evaluate_models, harness, harness_tasks, load_suite
from mergebench.evaluation.tasks.perplexity import stderr
from tests.evaluation.conftest import Files
from tests.language import TEMPLATE, write_decoder, write_prompts, write_questions, write_rows, write_texts

KINDS = {"multiple-choice": "questions", "perplexity": "texts", "generation": "prompts"}


@pytest.fixture(autouse=True)
def quick(one_thread: None) -> None:
    """Tiny matrices."""


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama; read only."""
    return write_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the data of every kind of task."""
    monkeypatch.chdir(tmp_path)
    write_questions(tmp_path / "questions.jsonl")
    write_texts(tmp_path / "texts.jsonl")
    write_prompts(tmp_path / "prompts.jsonl")
    return tmp_path


def suite_of(kind: str, **more: Any) -> Any:
    entry = {"name": "one", "kind": kind, **more}
    if kind in KINDS:
        entry.setdefault("data", f"{KINDS[kind]}.jsonl")
    return load_suite({"tasks": [entry]})


def measure(decoder: Path, kind: str, **more: Any) -> Record:
    (record,) = evaluate_models([Candidate("m", "base", Files(decoder))], suite_of(kind, **more)).records
    return record


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def by_itself(decoder: Path, config: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same through lm-eval alone: its own loader, its own templates, one request at a time."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = HFLM(pretrained=str(decoder), device="cpu", dtype="float32", batch_size=1)
    manager = TaskManager(include_defaults=False)
    found = lm_eval.evaluate(lm=model, task_dict=manager.load([config]), bootstrap_iters=1000)
    (name,) = found["samples"]
    return found["results"][name], found["samples"][name]


@pytest.fixture
def lm_eval_task(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Any]]]:
    """A task as lm-eval's users write it, on one of the files."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", here / "cache")
    datasets.disable_progress_bars()

    def make(kind: str, metrics: list[str], **more: Any) -> dict[str, Any]:
        file = str(here / f"{KINDS[kind]}.jsonl")
        plain = {"task": "alone", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": file}}}
        return plain | {"test_split": "test", "metric_list": [{"metric": name} for name in metrics]} | more

    yield make
    datasets.enable_progress_bars()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_multiple_choice_is_lm_evals(decoder: Path, lm_eval_task: Callable[..., Any], metric: str) -> None:
    data = rows("questions")
    for row in data:  # columns of one type, as lm-eval's loader wants them
        row["answer"] = row["choices"].index(row["answer"]) if isinstance(row["answer"], str) else row["answer"]
    record = measure(decoder, "multiple-choice", metric=metric)
    write_rows(Path("questions.jsonl"), data)
    template = {"doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "answer"}
    metrics, samples = by_itself(
        decoder, lm_eval_task("multiple-choice", ["acc", "acc_norm"], output_type="multiple_choice", **template)
    )

    assert record.value == pytest.approx(metrics[f"{metric},none"], abs=1e-12)
    assert [p.score for p in record.predictions.values()] == [sample[metric] for sample in samples]
    assert list(record.predictions) == [row["id"] for row in data]
    best = [max(range(len(s["resps"])), key=lambda i, s=s: _likelihood(s, i, metric)) for s in samples]
    assert [p.output for p in record.predictions.values()] == [
        row["choices"][i] for row, i in zip(data, best, strict=True)
    ]
    assert 0 < record.value < 1
    assert (record.metric, record.direction, record.n) == ("accuracy", "higher", len(data))


def _likelihood(sample: dict[str, Any], i: int, metric: str) -> float:
    return sample["resps"][i][0][0] / (len(sample["doc"]["choices"][i]) if metric == "acc_norm" else 1)


@pytest.mark.filterwarnings("ignore")
def test_perplexity_is_lm_evals(decoder: Path, lm_eval_task: Callable[..., Any]) -> None:
    names = ["word_perplexity", "byte_perplexity", "bits_per_byte"]
    config = lm_eval_task(
        "perplexity", names, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}"
    )
    metrics, samples = by_itself(decoder, config)
    for name in names:
        record = measure(decoder, "perplexity", metric=name)
        assert record.value == pytest.approx(metrics[f"{name},none"], rel=1e-5)
        assert (record.metric, record.direction) == (name, "lower")
        for prediction, row, sample in zip(record.predictions.values(), rows("texts"), samples, strict=True):
            bits = -sample["bits_per_byte"][0] / math.log(2) / len(row["text"].encode())
            assert prediction.score == pytest.approx(bits, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_generation_is_lm_evals(decoder: Path, lm_eval_task: Callable[..., Any]) -> None:
    how = {"until": ["dog", "?"], "max_gen_toks": 12, "do_sample": False}
    template = {"doc_to_text": "{{prompt}}", "doc_to_target": "{{target}}", "generation_kwargs": how}
    _, samples = by_itself(decoder, lm_eval_task("generation", [], output_type="generate_until", **template))
    written = [sample["resps"][0][0] for sample in samples]
    targets = [f" {text} " if n % 3 and text.strip() else "no" for n, text in enumerate(written)]
    write_rows(Path("prompts.jsonl"), ({**row, "target": t} for row, t in zip(rows("prompts"), targets, strict=True)))
    record = measure(decoder, "generation", scorer="exact-match", until=["dog", "?"], max_tokens=12)

    assert [p.output for p in record.predictions.values()] == written
    assert len(set(written)) > 3
    assert [p.score for p in record.predictions.values()] == [float(target != "no") for target in targets]
    assert record.metric == "accuracy"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("folder", [".", "below"])
def test_a_task_file_of_lm_eval(
    decoder: Path, lm_eval_task: Callable[..., Any], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data are found from the working directory and from the file's folder; results are lm-eval's, error and all."""
    config = lm_eval_task("generation", ["exact_match"], output_type="generate_until", doc_to_text="{{prompt}}")
    config |= {"doc_to_target": "{{target}}", "generation_kwargs": {"until": ["?"], "max_gen_toks": 4}}
    config["metric_list"] = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    _, samples = by_itself(decoder, config)
    targets = [sample["resps"][0][0] if n % 2 else "no" for n, sample in enumerate(samples)]
    write_rows(Path("prompts.jsonl"), ({**row, "target": t} for row, t in zip(rows("prompts"), targets, strict=True)))
    metrics, samples = by_itself(decoder, config)
    config["dataset_kwargs"] = {"data_files": {"test": "prompts.jsonl"}}
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "own.yaml").write_text(json.dumps(config))
    if folder == "below":
        Path("prompts.jsonl").rename("below/prompts.jsonl")
    record = measure(decoder, "lm-eval", task=f"{folder}/own.yaml")

    assert record.value == metrics["exact_match,none"]
    assert record.stderr == metrics["exact_match_stderr,none"]
    assert 0 < record.value < 1
    assert [p.score for p in record.predictions.values()] == [sample["exact_match"] for sample in samples]
    assert [p.output for p in record.predictions.values()] == [sample["resps"][0][0] for sample in samples]
    assert list(record.predictions) == [str(n) for n in range(9)]

    (task,) = suite_of("lm-eval", task=f"{folder}/own.yaml").tasks
    assert [file.name for file in task.ready.files] == ["own.yaml", "prompts.jsonl"]
    part = measure(decoder, "lm-eval", task=f"{folder}/own.yaml", limit=4, seed=1)
    assert len(part.predictions) == 4
    assert part.predictions.items() <= record.predictions.items()
    assert list(part.predictions) != ["0", "1", "2", "3"]


def test_batches_and_neighbours_change_nothing(decoder: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request at a time, several parts at once, all together, and after another model was in its place."""
    other = write_decoder(here / "other", seed=8)
    generation = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [1, *range(2, 258, 2)]}))
    plain = Path(shutil.copytree(decoder, here / "plain"))
    (plain / "generation_config.json").unlink()  # so the config says what ends an answer
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("multiple-choice", {}),
        ("perplexity", {}),
        ("generation", {"scorer": {"regex": "[a-m]"}, "max_tokens": 9}),
    ]
    for kind, more in kinds:
        records = []
        for room, threads in ((1, 1), (150, 3), (100_000, 1)):
            monkeypatch.setattr(harness, "READ_TOKENS", {"cpu": room})
            monkeypatch.setattr(harness, "WRITTEN_TOKENS", {"cpu": room})
            torch.set_num_threads(threads)
            records.append(measure(plain, kind, **more))
            assert torch.get_num_threads() == threads
        both = [Candidate("other", "input", Files(other)), Candidate("m", "input", Files(plain))]
        first, second = evaluate_models(both, suite_of(kind, **more)).records
        assert first.predictions != second.predictions
        for record in [*records[1:], second]:
            assert record.value == pytest.approx(records[0].value, rel=1e-5)
            outputs = [[p.output for p in one.predictions.values()] for one in (record, records[0])]
            assert outputs[0] == outputs[1]


def test_drawn_continuations(decoder: Path, here: Path) -> None:
    how = {"scorer": {"regex": "[a-e]"}, "max_tokens": 6, "temperature": 1.0, "samples": 4}
    first, again = (measure(decoder, "generation", **how, limit=9, seed=seed) for seed in (1, 1))
    other = measure(decoder, "generation", **how, limit=9, seed=2)
    assert first.predictions == again.predictions
    assert first.predictions != other.predictions
    scores = [p.score for p in first.predictions.values()]
    assert set(scores) <= {0, 0.25, 0.5, 0.75, 1}
    assert not set(scores) <= {0, 1}  # means, not the first of four
    assert first.value == pytest.approx(numpy.mean(scores))
    assert first.stderr == pytest.approx(numpy.std(scores, ddof=1) / 3)


def test_chat_template(decoder: Path, here: Path) -> None:
    """With the template the model reads what the template makes of the prompt, and nothing else."""
    talker = write_decoder(here / "talker", template=TEMPLATE)
    asked = measure(talker, "generation", scorer={"regex": "a"}, chat=True, max_tokens=8)
    write_rows(Path("prompts.jsonl"), ({**row, "prompt": f"<user>{row['prompt']}<a>"} for row in rows("prompts")))
    plain = measure(talker, "generation", scorer={"regex": "a"}, max_tokens=8)
    assert asked.predictions == plain.predictions
    with pytest.raises(ModelError, match=r"its tokenizer has no chat template"):
        measure(decoder, "generation", scorer={"regex": "a"}, chat=True)


def test_stderr_of_a_ratio() -> None:
    """As drawing the texts again and again has it; and by hand for two texts of one byte: |l1 - l2| / 2."""
    random_numbers = numpy.random.default_rng(0)
    counts = random_numbers.integers(50, 400, 300).astype(float)
    pairs = [(-c * rate, c) for c, rate in zip(counts, random_numbers.gamma(9, 0.1, 300), strict=True)]
    drawn = random_numbers.integers(0, 300, (4000, 300))
    table = numpy.array(pairs)[drawn].sum(1)
    rates = -table[:, 0] / table[:, 1]
    assert stderr(pairs, "byte_perplexity") == pytest.approx(numpy.exp(rates).std(), rel=0.05)
    assert stderr(pairs, "bits_per_byte") == pytest.approx(rates.std() / math.log(2), rel=0.05)
    assert stderr([(-1.0, 1), (-2.0, 1)], "bits_per_byte") == pytest.approx(0.5 / math.log(2))
    assert stderr([(-1.0, 1)], "bits_per_byte") is None


def test_quiet_and_leaves_no_trace(decoder: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tqdm import tqdm

    random.seed(7)
    numpy.random.seed(7)
    torch.manual_seed(7)
    expected = (random.Random(7).random(), numpy.random.RandomState(7).rand(), torch.Generator().manual_seed(7))
    done: dict[str, int] = {}
    begin, level = vars(tqdm)["__init__"], logging.getLogger("lm_eval").level
    for kind, more in (("multiple-choice", {}), ("perplexity", {}), ("generation", {"scorer": {"regex": "a"}})):
        suite = suite_of(kind, **more)
        steps = []
        evaluate_models([Candidate("m", "base", Files(decoder))], suite, progress=steps.append)
        done[kind] = steps[-1].done - suite.items
    assert set(done.values()) == {0}
    assert capfd.readouterr() == ("", "")
    found = (random.random(), numpy.random.rand(), torch.rand(3))
    assert found[:2] == expected[:2]
    assert torch.equal(found[2], torch.rand(3, generator=expected[2]))
    assert vars(tqdm)["__init__"] is begin
    assert logging.getLogger("lm_eval").level == level


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"question": "a?", "choices": ["x", "y"]}, "no column 'answer', it has id, question, choices"),
        ({"question": "a?", "choices": ["xa", "xb"], "answer": "xc"}, "answer 'xc' is none of the choices"),
        ({"question": "a?", "choices": ["x", "y"], "answer": 2}, "answer 2 is none of the choices"),
        ({"question": "a?", "choices": ["x", "y"], "answer": True}, "answer True is none of the choices"),
        ({"question": "a?", "choices": ["x", "x"], "answer": 0}, "choices must be two or more, all different"),
        ({"question": "a?", "choices": ["x"], "answer": 0}, "choices must be two or more, all different"),
        ({"question": "a?", "choices": ["x", " "], "answer": 0}, "choices must be a list of texts"),
        ({"question": "a?", "choices": "xy", "answer": 0}, "choices must be a list of texts"),
        ({"question": "", "choices": ["x", "y"], "answer": 0}, "question must be text"),
    ],
)
def test_wrong_questions(here: Path, row: dict[str, Any], what: str) -> None:
    write_rows(
        here / "questions.jsonl", [{"id": 1, "question": "?", "choices": ["a", "b"], "answer": 1}, {"id": 2, **row}]
    )
    with pytest.raises(RunError) as error:
        suite_of("multiple-choice")
    assert error.value.message.startswith(f"questions.jsonl:2: {what}")


def test_wrong_texts_and_prompts(here: Path) -> None:
    write_rows(here / "texts.jsonl", [{"id": 1, "text": " "}])
    with pytest.raises(RunError, match=r"texts.jsonl:1: text must be text, got ' '"):
        suite_of("perplexity")
    write_rows(here / "prompts.jsonl", [{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}])
    with pytest.raises(RunError, match=r"prompts.jsonl:2: id '1' is in prompts.jsonl:1 already"):
        suite_of("generation", scorer={"regex": "a"})
    with pytest.raises(RunError, match=r"prompts.jsonl:1: no column 'target'"):
        suite_of("generation", scorer="exact-match")
    with pytest.raises(RecipeError, match=r"samples: 3 of temperature 0 would all be the same"):
        suite_of("generation", scorer={"regex": "a"}, samples=3)
    with pytest.raises(RecipeError, match=r"until: must be a list of texts, got 'x'"):
        suite_of("generation", scorer={"regex": "a"}, until="x")


def test_without_lm_eval(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(library: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(plugins, "version", nothing)
    for kind in ("multiple-choice", "perplexity", "generation", "lm-eval"):
        more = {"scorer": {"regex": "a"}} if kind == "generation" else {"task": "x"} if kind == "lm-eval" else {}
        with pytest.raises(RecipeError, match=f"{kind} tasks need lm-eval, which is not installed") as error:
            suite_of(kind, **more)
        assert error.value.hint == f"pip install -e '{Path(plugins.__file__).parents[1]}[eval]'"


def test_how_an_extra_is_installed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the source that runs, or as a package where there is no source."""

    def hint() -> str | None:
        with pytest.raises(RecipeError) as error:
            plugins.need("no-such-library", "tests")
        return error.value.hint

    root = Path(plugins.__file__).parents[1]
    assert hint() == f"pip install -e '{root}[eval]'"
    monkeypatch.chdir(root)
    assert hint() == "pip install -e '.[eval]'"
    monkeypatch.setattr(plugins, "__file__", str(here / "mergebench" / "plugins.py"))
    assert hint() == "pip install 'mergebench[eval]'"


def test_models_that_cannot_be_asked(decoder: Path, here: Path) -> None:
    broken = write_decoder(here / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    for kind, more in (("multiple-choice", {}), ("generation", {"scorer": {"regex": "a"}})):
        with pytest.raises(RunError, match=r"model 'tiny': its outputs are not finite"):
            measure(broken, kind, **more)
    with pytest.raises(RunError, match=r"model 'tiny': lm-eval failed: .*maximum sequence length"):
        measure(decoder, "generation", scorer={"regex": "a"}, max_tokens=500)


@pytest.mark.filterwarnings("ignore")
def test_wrong_task_files(here: Path, lm_eval_task: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_tasks, "_hub_answers", lambda: False)  # as it is without a network, at once
    plain = lm_eval_task("generation", ["exact_match"], output_type="generate_until", doc_to_text="{{prompt}}")
    plain |= {"doc_to_target": "{{target}}"}

    def wrong(what: str, kind: type[MergebenchError], text: str, **more: Any) -> None:
        Path("own.yaml").write_text(text)
        with pytest.raises(kind, match=what):
            suite_of("lm-eval", **{"task": "own.yaml", **more})

    wrong("tasks.0.task: no such file: other.yaml", RecipeError, "", task="other.yaml")
    wrong("own.yaml: lm-eval cannot read the task: ", RecipeError, "a: [")
    wrong("has no metric 'acc'", RecipeError, json.dumps(plain), metric="acc")
    gone = plain | {"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}
    wrong("own.yaml: its data are not on this machine, and the hub did not give them", RunError, json.dumps(gone))
    hub = plain | {"dataset_path": "allenai/ai2_arc", "dataset_name": "ARC-Easy", "dataset_kwargs": {}}
    wrong("own.yaml: its data are not on this machine", RunError, json.dumps(hub))
    assert "huggingface_hub.constants" not in sys.modules or not sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE


@pytest.mark.slow
def test_names_of_lm_evals_own_tasks(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_tasks, "_hub_answers", lambda: False)
    for name, what in (
        ("arc_eazy", "lm-eval has no task 'arc_eazy'"),
        ("mmlu", "lm-eval's 'mmlu' is a group of tasks"),
        ("arc_easy", "arc_easy: its data are not on this machine, and the hub did not give them"),
    ):
        with pytest.raises(MergebenchError, match=what):
            suite_of("lm-eval", task=name)
