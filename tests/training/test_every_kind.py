"""What was trained, of every kind: the same logits when it is folded, merged, evaluated, shown, converted to a LoRA."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from encoders import write_encoder
from torch import Tensor
from trainable import classify, complete

import mergebench
from mergebench.adapters import convert_adapter, describe_adapter, extract_adapter
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from mergebench.networks.network import Network
from mergebench.training import load_config, once, train
from mergebench.training.declared import kinds
from mergebench.training.peft_adapters import PeftAdapter
from mergebench.training.student import Student
from tests.conftest import Cli

CPU = torch.device("cpu")
SMALL: dict[str, dict[str, Any]] = {  # a kind that is not named here is trained with its defaults
    "adalora": {"init_rank": 4, "target_rank": 2, "warmup": 0},
    "hut": {"rank": 2},
    "ladder": {"reduction": 2},
    "list": {"bottleneck": 3},
    "pafi": {"share": 0.05},
    "subspace": {"d": 200},
}
PEFT = {
    "lora": {"peft_type": "LORA", "r": 4, "target_modules": ["query", "value", "dense"]},
    "dora": {"peft_type": "LORA", "r": 2, "use_dora": True, "target_modules": ["query", "value"]},
    "ia3": {"peft_type": "IA3", "target_modules": ["query", "value"], "feedforward_modules": []},
}
ROWS: dict[str, dict[str, Any]] = {
    **{name: {"delta": {"kind": name, **SMALL.get(name, {})}} for name in kinds.names()},
    "hiwi on weights": {"delta": {"kind": "hiwi", "on": "weights", "rank": 3}},
    "hut, pure": {"delta": {"kind": "hut", "rank": 2, "form": "pure"}},
    **{name: {"peft": peft} for name, peft in PEFT.items()},
}
BESIDE, UNCHANGED, WHOLE = {"ladder"}, {"head"}, {"full"}  # no change to weights; none at all; a checkpoint of its own
FOLDED = [name for name in ROWS if name not in BESIDE | UNCHANGED]

# what `inspect` says of a tensor on its base; of the directory the kind, the ranks, and whether its numbers are the
# trained ones
SHOWN: dict[str, tuple[set[str], str, list[int], bool]] = {
    "adalora": ({"low_rank rank 4", "low_rank rank 3", "low_rank rank 2", "low_rank rank 1"}, "ADALORA", [], False),
    "bias": ({"dense"}, "dense", [], True),
    "dora": ({"dora rank 2"}, "LORA", [2], True),
    "hiwi": ({"dense"}, "dense", [], False),  # the differences of the biases
    "hiwi on weights": ({"peanut rank 3"}, "peanut", [3], True),
    "hut": ({"multiplicative rank 2"}, "multiplicative", [2], True),
    "hut, pure": ({"multiplicative rank 3"}, "multiplicative", [3], False),  # and a column of ones
    "ia3": ({"scaled"}, "IA3", [], True),
    "list": ({"peanut rank 3"}, "peanut", [3], True),
    "lora": ({"low_rank rank 4"}, "LORA", [4], True),
    "pafi": (set(), "scattered", [], True),
    "subspace": ({"subspace of 200 dimensions"}, "subspace", [], True),
}
EXACT = {"adalora": 4, "hiwi on weights": 3, "list": 3, "lora": 4}  # and the largest rank
TRUNCATED = ["dora", "hut", "hut, pure", "ia3", "pafi", "pela"]
EXTRACTED = ["full", "subspace"]  # they change more than a LoRA holds


class Made(NamedTuple):
    """A row, trained."""

    base: Path
    directory: Path
    reference: str
    run: dict[str, Any]
    student: Student
    task: Any

    @property
    def states(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors of the base, and of the model that was trained."""
        before, after = (open_model(one).state_dict() for one in (str(self.base), self.reference))
        return before, after


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Made]]:
    """Every row, a few steps."""
    folder, students = tmp_path_factory.mktemp("every"), list[Student]()
    threads, fit = torch.get_num_threads(), once.fit
    torch.set_num_threads(1)
    rows = {name.replace(" ", "-"): row for name, row in ROWS.items()}
    config = load_config(classify(folder, rows=rows, max_steps=4, lr=0.02))
    write_encoder(folder / "other", seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(once, "fit", lambda student, *a, **k: students.append(student) or fit(student, *a, **k))
        runs = train(config, folder / "out", device="cpu").runs
    yield {
        name: Made(
            folder / "base",
            folder / "out" / run["directory"],
            run["reference"].replace("OUT", str(folder / "out")),
            dict(run),
            student,
            config.rows[0].task,
        )
        for name, run, student in zip(ROWS, runs, students, strict=True)
    }
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ROWS)
def test_trained_is_what_its_name_makes_of_the_base(name: str, made: dict[str, Made]) -> None:
    one = made[name]
    folded, plain = (
        Network(open_model(reference, to_run=True), "AutoModel", CPU) for reference in (one.reference, str(one.base))
    )
    with torch.no_grad():
        one.student.eval()
        trained, again, before = (
            one.task.rows(network, one.student.head, "test", list(range(24))).logits
            for network in (one.student.network, folded, plain)
        )
    assert torch.allclose(trained, again, atol=1e-5, rtol=1e-5)
    assert (name in UNCHANGED) == torch.allclose(before, again, atol=1e-5, rtol=0)
    assert one.run["history"][0]["loss"] > 0


@pytest.mark.parametrize("name", FOLDED)
def test_merged_in_a_recipe(name: str, made: dict[str, Made], tmp_path: Path) -> None:
    """Of another model and the weights that the trained network runs with."""
    one, other = made[name], made[name].base.with_name("other")
    models = [(one.reference, 0.6), (str(other), 0.4)]
    recipe = {
        "merge_method": "linear",
        "models": [{"model": model, "parameters": {"weight": weight}} for model, weight in models],
    }

    out = mergebench.run(mergebench.plan(mergebench.load(recipe)), tmp_path / "merged").out

    merged, second = (open_model(str(place)).state_dict() for place in (out, other))
    _, weights = one.states
    if not isinstance(one.student.attached, PeftAdapter):
        places = one.student.network.places
        weights |= {name: getattr(*several[0]).detach() for name, several in places.items() if several}
    for name, value in merged.items():
        torch.testing.assert_close(value, 0.6 * weights[name] + 0.4 * second[name], rtol=0, atol=1e-6)


def test_it_knows_its_base(made: dict[str, Made]) -> None:
    for name in {*ROWS} - WHOLE - UNCHANGED - {"adalora", *PEFT}:  # PEFT's files know a name alone
        opened = [open_model(f"{base}+{made[name].directory}", to_run=True) for base in bases_of(made[name])]
        assert not opened[0].remarks and "was made on another model" in opened[1].remarks[0], name


def bases_of(one: Made) -> tuple[Path, Path]:
    """Its own, and another of the same architecture."""
    return one.base, one.base.with_name("other")


@pytest.mark.parametrize("name", ROWS)
def test_evaluated(name: str, made: dict[str, Made], tmp_path: Path) -> None:
    one = made[name]
    data, head = one.base.with_name("test.jsonl"), one.directory / "head.safetensors"
    task = {"name": "words", "kind": "text-classification", "data": str(data), "head": str(head)}

    suite = mergebench.evaluation.load_suite({"tasks": [task]})
    (record,) = mergebench.measure(suite, [one.reference], device="cpu", results=tmp_path / "results").records

    lines = map(json.loads, (one.directory / "test-predictions.jsonl").read_text().splitlines())
    assert {id: answer.output for id, answer in record.predictions.items()} == {x["id"]: x["pred"] for x in lines}
    assert record.value == one.run["test"]["value"]


@pytest.mark.parametrize("name", SHOWN)
def test_shown(name: str, made: dict[str, Made], cli: Cli) -> None:
    one, (words, kind, ranks, all_trained) = made[name], SHOWN[name]
    before, after = one.states

    on_base = cli("inspect", one.reference, "--json")
    alone = cli("inspect", one.directory)

    said = {t["name"]: t["deltas"] for t in json.loads(on_base.out)["tensors"] if "deltas" in t}
    assert {tensor for tensor, value in before.items() if not torch.equal(value, after[tensor])} <= said.keys()
    if name == "pafi":
        words = {f"scattered {int((before[tensor] != after[tensor]).sum())} values" for tensor in said}
    assert {word for several in said.values() for word in several} <= words
    assert (alone.code, alone.err) == (0, "") and alone.out == cli("adapters", "inspect", one.directory).out
    found = describe_adapter(one.directory)
    assert (found.kind, found.base) == (kind, str(one.base))
    if name == "adalora":
        ranks = sorted(set(one.run["about"]["ranks"].values()))
    assert found.ranks == ranks
    assert (found.parameters == one.run["parameters"]) == all_trained
    files = ("delta.safetensors", "adapter_config.json", "adapter_model.safetensors")
    assert found.bytes == sum(file.stat().st_size for file in one.directory.iterdir() if file.name in files)
    assert kind == next(line.split()[1].rstrip(",") for line in alone.out.splitlines() if line.split()[:1] == ["type"])


def test_shown_where_there_is_no_delta(made: dict[str, Made], cli: Cli) -> None:
    ladder, pela, full, head = (made[name] for name in ("ladder", "pela", "full", "head"))
    found = describe_adapter(ladder.directory)
    assert (found.kind, found.parameters) == ("ladder", ladder.run["parameters"])
    assert found.bytes == (ladder.directory / "module.safetensors").stat().st_size
    assert "+ factored rank 4" in cli("inspect", pela.reference).out
    assert "BertModel: 39 tensors" in cli("inspect", full.directory).out
    for one, message, hint in (
        (pela, "it is a compressed model, not an adapter", f"mergebench inspect BASE+{pela.directory}"),
        (full, "not an adapter: it is a model", f"name it alone, {full.directory}"),
        (head, "not an adapter: a head alone, which changes no weights", "name the base; suites name"),
    ):
        ran = cli("adapters", "inspect", one.directory)
        assert (ran.code, ran.out) == (3, "") and message in ran.err and hint in ran.err


def check_truncated(one: Made, lora: Path, rank: int) -> dict[str, Tensor]:
    """That a LoRA holds the best approximation of each changed matrix of a linear layer; returns what else changed."""
    before, after = one.states
    found = open_model(f"{one.base}+{lora}").state_dict()
    others = {}
    for name, value in before.items():
        change = after[name].double() - value.double()
        if value.dim() == 2 and "embeddings" not in name:
            u, s, v = torch.linalg.svd(change, full_matrices=False)
            best = (u[:, :rank] * s[:rank]) @ v[:rank]
            torch.testing.assert_close(found[name].double() - value.double(), best, rtol=0, atol=1e-5)
        elif not torch.equal(found[name], after[name]):
            others[name] = found[name]
    return others


@pytest.mark.parametrize("name", EXACT)
def test_converted_exactly(name: str, made: dict[str, Made], tmp_path: Path) -> None:
    one = made[name]

    result = convert_adapter(str(one.base), one.directory, tmp_path / "lora")

    ranks = {module["rank"] for module in result.provenance["modules"].values()}
    assert max(ranks) <= EXACT[name] and result.provenance["energy_kept"] == 1
    assert not [name for name in check_truncated(one, result.out, EXACT[name]) if "bias" not in name]
    _, after = one.states
    found = open_model(f"{one.base}+{result.out}").state_dict()
    assert all(torch.allclose(found[tensor], value, atol=1e-6) for tensor, value in after.items())


@pytest.mark.parametrize("name", TRUNCATED)
def test_converted_by_the_best_approximation(name: str, made: dict[str, Made], tmp_path: Path) -> None:
    one = made[name]
    with pytest.raises(ModelError, match="has no exact low-rank form") as error:
        convert_adapter(str(one.base), one.directory, tmp_path / "lora")
    assert "truncate it: a rank" in str(error.value.hint)

    result = convert_adapter(str(one.base), one.directory, tmp_path / "lora", rank=2)

    assert not check_truncated(one, result.out, 2)
    assert result.provenance["energy_kept"] < 1


@pytest.mark.parametrize("name", EXTRACTED)
def test_what_a_lora_holds_of_it_is_extracted(name: str, made: dict[str, Made], tmp_path: Path) -> None:
    one = made[name]
    with pytest.raises(ModelError) as error:
        convert_adapter(str(one.base), one.directory, tmp_path / "lora")
    if name == "subspace":
        assert "a LoRA cannot hold this change" in error.value.message
        assert "mergebench adapters extract --model BASE+ADAPTER" in str(error.value.hint)

    result = extract_adapter(str(one.base), one.reference, tmp_path / "lora", rank=2)

    assert check_truncated(one, result.out, 2) and result.provenance["left_out"] > 0


REFUSED = {
    "ladder": ("it is a module that runs beside the model, which no weights can hold", "mergebench eval SUITE BASE+"),
    "head": ("not an adapter: a head alone, which changes no weights", "name the base"),
    "full": ("not an adapter: it is a model", "name it alone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_no_weights_can_hold_it(name: str, made: dict[str, Made], tmp_path: Path, cli: Cli) -> None:
    one, (message, hint) = made[name], REFUSED[name]
    base, out = str(one.base), str(tmp_path / "out")
    model = f"{base}+{one.directory}"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": model}]}))
    for command in (
        ("merge", tmp_path / "recipe.yaml", "--out", out),
        ("adapters", "fold", one.directory, "--base", base, "--out", out),
        ("adapters", "convert", one.directory, "--base", base, "--out", out),
        ("inspect", model),
    ):
        ran = cli(*command)
        assert (ran.code, ran.out) == (3, "")
        assert message in ran.err and hint in ran.err and len(ran.err.splitlines()) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["bias", "hiwi"])
def test_biases_have_nothing_for_a_lora(name: str, made: dict[str, Made], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="changes no matrix of a linear layer") as error:
        convert_adapter(str(made[name].base), made[name].directory, tmp_path / "lora", rank=2)
    assert "mergebench adapters fold" in str(error.value.hint)


def test_every_kind_is_here() -> None:
    """A new kind says what becomes of it."""
    converted = {*EXACT, *TRUNCATED, *EXTRACTED, "bias", "hiwi", *BESIDE, *UNCHANGED}
    assert converted == {*SHOWN, *BESIDE, *UNCHANGED, *WHOLE, "pela"} == set(ROWS)


def test_completions_are_learnt(tmp_path: Path, one_thread: None) -> None:
    what: dict[str, Any] = {"epochs": 12, "lr": 1e-2, "delta": "full"}

    made = train(load_config(complete(tmp_path, **what)), tmp_path / "out", device="cpu")

    losses = [point["validation_loss"] for point in made.runs[0]["history"] if "validation_loss" in point]
    assert min(losses) < 0.6 * losses[0]
    folded = Network(open_model(str(tmp_path / "out/full/seed-0")), "AutoModelForCausalLM", torch.device("cpu"))
    ids = folded.tokenizer("cab", return_tensors="pt")["input_ids"]
    assert folded.module(ids).logits.isfinite().all()
