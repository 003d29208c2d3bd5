"""The identities hold for every installed method, and each check fails on a method broken for the purpose.

python -m pytest tests/test_doctor.py
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergebench import (
    Context,
    Passes,
    PerModel,
    TaskVectors,
    Weights,
    deltas,
    gram,
    merge_method,
    methods,
    param,
    total,
)
from mergebench.adapters import combine, peft_directory
from mergebench.deltas.svd import Product
from mergebench.engine.method import Identity, Method
from mergebench.errors import RecipeError, RunError
from mergebench.testing.doctor import CHECKS, Finding, diagnose, examine
from mergebench.testing.doctor_adapters import examine_adapters
from mergebench.testing.methods import Bench
from tests.conftest import Cli


@dataclass(frozen=True)
class Params:
    weight: PerModel = param(1.0, "weight of the model", per_model=True)


@dataclass(frozen=True)
class Nothing:
    pass


def findings(method: Method) -> dict[str, Finding]:
    return {finding.check: finding for finding in diagnose(method)}


def failed(method: Method) -> dict[str, str]:
    """The checks that a method fails, with their marks."""
    return {check: finding.mark for check, finding in findings(method).items() if finding.failed}


def reasons(method: Method) -> dict[str, str]:
    """The checks that do not apply, and why."""
    return {check: finding.why for check, finding in findings(method).items() if finding.mark == "-"}


@pytest.mark.parametrize("name", methods.names())
def test_installed_methods_keep_the_identities(name: str) -> None:
    found = list(diagnose(methods.get(name)))

    assert [finding.check for finding in found] == list(CHECKS)
    assert [finding for finding in found if finding.failed] == []
    assert all(finding.why for finding in found if finding.mark == "-")


@merge_method(takes="task_vectors", paper="none")
def summed(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """The weighted sum, which keeps every identity."""
    return total(tvs, p.weight)


def test_a_sound_method_is_found_to_be() -> None:
    assert {check: finding.mark for check, finding in findings(summed).items()} == dict.fromkeys(CHECKS, "ok")


# -- each check fails for its own reason ----------------------------------------------------------------


def test_a_method_that_changes_a_single_model() -> None:
    @merge_method(takes="weights", paper="none")
    def shrinks(weights: Weights, p: Params, ctx: Context) -> Passes:
        """The weighted sum, a millionth shorter."""
        return total(weights, p.weight) * 0.999999

    found = findings(shrinks)

    assert failed(shrinks).keys() == {"one model", "equal models"}
    assert found["one model"].mark.startswith("off by ") and "same bytes are wanted" in found["one model"].why
    assert found["equal models"].mark.startswith("off by ")


def test_a_method_that_ignores_weights() -> None:
    """One model at weight 1 hides it; two at a half, and one taken off another, show it."""

    @merge_method(takes="task_vectors", paper="none")
    def deaf(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
        """The sum, whatever the weights."""
        return total(tvs)

    found = findings(deaf)

    assert failed(deaf).keys() == {"equal models", "negative"}
    assert "a model less itself" in found["negative"].why


def test_a_method_that_depends_on_the_order() -> None:
    @merge_method(takes="task_vectors", paper="none")
    def first_counts(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
        """The weighted sum, and a thousandth of what the first model has and the last has not."""
        return total(tvs, p.weight) + (tvs[0] - tvs[-1]) * 0.001

    found = findings(first_counts)

    assert failed(first_counts).keys() == {"order"}
    assert found["order"].mark.startswith("off by ") and "in two orders" in found["order"].why


def test_a_method_that_makes_nan_of_a_sign_tie() -> None:
    @merge_method(takes="task_vectors", paper="none")
    def divides(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
        """The weighted sum, multiplied and divided by the sum of the signs."""
        merged, vote = total(tvs, p.weight), total(tvs.sign())
        return torch.where((tvs == 0).any(0), merged, merged * (vote / vote))

    found = findings(divides)

    assert found["sign tie"].mark == "not finite" and found["sign tie"].why.endswith("holds nan")
    assert "sign tie" in failed(divides) and "equal models" not in failed(divides)


def test_nan_of_a_method_is_not_taken_for_an_overflow(tmp_path: Path) -> None:
    @merge_method(takes="weights", paper="none")
    def zero_by_zero(weights: Weights, p: Nothing, ctx: Context) -> Passes:
        """No number."""
        return total(weights) * 0 / 0

    with pytest.raises(RunError, match="w: 'zero_by_zero' makes nan of finite values"):
        bench = Bench(zero_by_zero, Nothing(), {"w": torch.ones(3)}, [{"w": torch.ones(3)}], tmp_path / "bench")
        bench.streamed(bench.opened, 3, 1)


def test_a_method_that_divides_by_the_sum_of_the_weights() -> None:
    @merge_method(takes="task_vectors", paper="none")
    def mean(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
        """The weighted mean, of whatever weights."""
        return total(tvs, p.weight) / torch.tensor(p.weight).sum()

    assert failed(mean) == {"negative": "not finite"}


def test_a_method_that_depends_on_the_chunk() -> None:
    @merge_method(takes="task_vectors", paper="none")
    def by_chunk(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
        """The weighted sum, and a millionth of the chunk's largest value."""
        return total(tvs, p.weight) + 1e-6 * (tvs - tvs[0]).abs().max()

    found = findings(by_chunk)

    assert "must not depend on where a chunk ends" in found["cuts"].why
    assert failed(by_chunk)["cuts"] == "wrong"


def test_a_method_that_writes_into_its_input() -> None:
    @merge_method(takes="task_vectors", paper="none")
    def careless(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
        """The weighted sum, added up in the first row."""
        merged = total(tvs, p.weight)
        tvs[0] = merged
        return merged

    assert failed(careless) == {"cuts": "wrong"}
    assert "writes into its input" in findings(careless)["cuts"].why


@pytest.mark.parametrize(
    ("spoil", "mark"),
    [
        (lambda tensors: {name: value for name, value in tensors.items() if "scalar" not in name}, "other names"),
        (lambda tensors: {name: value.float() for name, value in tensors.items()}, "other types"),
        (lambda tensors: {name: value.reshape(-1) for name, value in tensors.items()}, "other types"),
        (lambda tensors: {name: value * torch.nan for name, value in tensors.items()}, "not finite"),
    ],
)
def test_a_checkpoint_that_is_read_back_as_another(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], mark: str
) -> None:
    right = Bench.streamed

    def spoilt(bench: Bench, *args: Any) -> dict[str, Tensor]:
        right(bench, *args)
        file = bench.place / "out" / "model.safetensors"
        save_file(spoil(load_file(file)), file)
        return load_file(file)

    monkeypatch.setattr(Bench, "streamed", spoilt)

    assert findings(summed)["reload"].mark == mark


# -- what cannot be tried -------------------------------------------------------------------------------


def test_a_method_that_raises() -> None:
    @merge_method(takes="task_vectors", paper="none")
    def absent(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
        """Has a mistake in it."""
        return [][0]

    assert set(failed(absent).values()) == {"error"} and failed(absent).keys() == set(CHECKS)
    assert findings(absent)["order"].why == "IndexError: list index out of range"


def test_a_method_that_refuses() -> None:
    """It may refuse what is special, not any models at all."""

    @merge_method(takes="task_vectors", paper="none")
    def refuses(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
        """Takes nothing."""
        raise RecipeError("not these")

    assert failed(refuses) == {"cuts": "error", "reload": "refused"}
    assert reasons(refuses)["one model"] == "not these"


def test_exemptions_are_the_methods_own() -> None:
    @merge_method(takes="weights", paper="none", exempt={"one model": "it halves", "equal models": "it halves"})
    def half(weights: Weights, p: Params, ctx: Context) -> Passes:
        """Half the weighted sum."""
        return total(weights, p.weight) * 0.5

    assert failed(half) == {}
    assert reasons(half) == {"one model": "it halves", "equal models": "it halves"}
    assert failed(dataclasses.replace(half, exempt={})).keys() == {"one model", "equal models"}
    with pytest.raises(TypeError, match="exempt: 'weights' is none of"):
        merge_method(takes="weights", paper="none", exempt={"weights": "no"})(summed.function)  # type: ignore[dict-item]


def exemptions() -> Iterator[tuple[str, Identity]]:
    for name in methods.names():
        for identity in methods.get(name).exempt:
            yield name, identity


@pytest.mark.parametrize(("name", "identity"), exemptions())
def test_no_exemption_is_idle(name: str, identity: Identity) -> None:
    """Without it the check fails: a method that keeps an identity does not claim to be exempt."""
    found = findings(dataclasses.replace(methods.get(name), exempt={}))

    assert found[identity].mark.startswith("off by ")


def test_random_draws_belong_to_a_place() -> None:
    @merge_method(takes="task_vectors", paper="none")
    def random(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
        """Keeps half of the elements, when there are several models."""
        return total(tvs * ctx.bernoulli([0.5 if len(tvs) == 3 else 1.0] * len(tvs)), p.weight)

    assert reasons(random) == {"order": "what it draws at random belongs to a model's place"}


@dataclass(frozen=True)
class Chosen:
    mode: str = param(help="a word", choices=("sum", "other"))
    factor: float = param(help="a factor", low=0.5, high=1.5)
    steps: int = param(help="how often", low=2)
    density: float = param(0.1, "share kept", above=0, high=1)


@dataclass(frozen=True)
class Word:
    word: str = param(help="any word")


def test_parameters_are_chosen_by_name_and_range() -> None:
    """Shares to keep are one where nothing is to be dropped; what is required comes from its range."""

    @merge_method(takes="weights", paper="none", models=1)
    def one(weights: Weights, p: Chosen, ctx: Context) -> Passes:
        """The model, where the parameters are those expected."""
        expected = p.mode == "sum" and p.factor == 0.8 and p.steps == 2 and p.density in (0.5, 1)
        return total(weights) * (1.0 if expected else 0.0)

    assert failed(one) == {}

    @merge_method(takes="weights", paper="none")
    def worded(weights: Weights, p: Word, ctx: Context) -> Passes:
        """The first model."""
        return weights[0].clone()

    assert reasons(worded)["one model"] == "'word' has no default, and any word may be one"


def test_a_method_without_a_base_is_tried_with_and_without() -> None:
    """What is right about task vectors may be wrong about weights."""

    @merge_method(takes="task_vectors", paper="none", optional_base=True, models=2)
    def longest(values: TaskVectors, p: Nothing, ctx: Context) -> Passes:
        """The mean, but for tensors that are long."""
        dots = yield gram(values)
        return total(values, (0.5, 0.5)) * (1.0 if ctx.numel == 1 or dots[0, 0] / ctx.numel < 0.1 else 0.9)

    found = findings(longest)["equal models"]

    assert found.mark.startswith("off by ")
    assert not findings(dataclasses.replace(longest, optional_base=False))["equal models"].failed


# -- the command ----------------------------------------------------------------------------------------


def plug_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    """Install a package whose module `other_merges` holds the method `other`."""
    folder = tmp_path / "other_merges-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: other-merges\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[mergebench.methods]\nother = other_merges:other\n")
    (tmp_path / "other_merges.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("MERGEBENCH_PLUGINS", raising=False)
    methods._registry.__dict__.pop("_plugins", None)


@pytest.fixture(autouse=True)
def forget_plug_ins() -> Iterator[None]:
    yield
    methods._registry.__dict__.pop("_plugins", None)
    sys.modules.pop("other_merges", None)


BROKEN = '''
from dataclasses import dataclass
from mergebench import merge_method, total, Weights, Context, Passes

@dataclass(frozen=True)
class Params:
    pass

@merge_method(takes="weights", paper="none", models=2)
def other(weights: Weights, p: Params, ctx: Context) -> Passes:
    """Twice the mean."""
    return total(weights)
'''


def test_the_table(cli: Cli) -> None:
    code, out, err = cli("doctor", "linear", "slerp")

    assert (code, err) == (0, "")
    head, linear, slerp, _, *legend = out.splitlines()
    assert [line.strip().split("  ")[0] for line in legend] == [*CHECKS, "-"]
    assert legend[0].split(maxsplit=2)[2].strip() == "One model at weight 1 gives that model."
    assert head.split("  ")[0].strip() == "method" and all(check in head for check in CHECKS)
    assert linear.split() == ["linear", *["ok"] * 7]
    assert slerp.split() == ["slerp", "-", "ok", "-", "ok", "-", "ok", "ok"]


def test_a_plug_in_that_fails(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plug_in(monkeypatch, tmp_path, BROKEN)

    code, out, err = cli("doctor", "other")

    assert (code, err) == (1, "")
    _, row, why, *_ = out.splitlines()
    assert row.split()[:3] == ["other", "-", "off"]
    assert why.startswith("other: equal models: bfloat16.matrix: result and model differ by ")


def test_a_plug_in_that_does_not_load(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plug_in(monkeypatch, tmp_path, "import nothing_of_that_name\n")

    code, out, err = cli("doctor", "other", "--json")

    assert (code, err) == (1, "")
    (report,) = json.loads(out)["methods"]
    assert {check["mark"] for check in report["checks"]} == {"does not load"}
    assert "nothing_of_that_name" in report["checks"][0]["why"]


def test_json(cli: Cli) -> None:
    code, out, err = cli("doctor", "passthrough", "--json")

    assert (code, err) == (0, "") and out.count("\n") == 1
    found = json.loads(out)
    (report,) = found["methods"]
    assert (found["ok"], report["ok"], report["method"], report["package"]) == (True, True, "passthrough", "mergebench")
    assert report["checks"][:2] == [
        {"check": "one model", "mark": "ok", "why": ""},
        {"check": "equal models", "mark": "-", "why": "it takes one model"},
    ]


def test_an_unknown_method(cli: Cli) -> None:
    code, out, err = cli("doctor", "linear", "tise")

    assert (code, out) == (2, "")
    assert err == "error: no method is called 'tise'\nhint: did you mean 'ties'?\n"


def test_progress_is_told() -> None:
    told: list[tuple[str, str, int, int]] = []

    (report,) = examine(["passthrough", "passthrough"], lambda *step: told.append(step))

    assert report.ok
    assert told == [("passthrough", check, number, 7) for number, check in enumerate(CHECKS)]


# -- adapters -------------------------------------------------------------------------------------------


def adapter_marks() -> dict[str, tuple[str, ...]]:
    return {report.name: tuple(finding.mark for finding in report.findings) for report in examine_adapters()}


def test_merged_adapters_keep_their_identities() -> None:
    kinds = dict.fromkeys(("LoRA", "rsLoRA", "DoRA", "lora_bias", "rank_pattern"), ("ok", "ok", "ok"))
    assert adapter_marks() == kinds | {"lora_bias": ("ok", "-", "-")}


def test_adapters_that_are_merged_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum that is a hundredth too large; methods to which the first adapter counts for more."""
    add, run = combine._sum, combine._run

    def larger(*args: Any) -> Product:
        product = add(*args)
        return product._replace(b=product.b * 1.01)

    def first_counts(job: Any, module: str, rows: Tensor) -> Tensor:
        return run(job, module, torch.cat([rows[:1] * 1.01, rows[1:]]))

    monkeypatch.setattr(combine, "_sum", larger)
    assert adapter_marks()["LoRA"] == ("ok", "off by 1.0e-02", "ok")
    monkeypatch.undo()
    monkeypatch.setattr(combine, "_run", first_counts)
    assert {kind: marks[2][:7] for kind, marks in adapter_marks().items() if marks[2] != "-"} == dict.fromkeys(
        ("LoRA", "rsLoRA", "DoRA", "rank_pattern"), "off by "
    )


def test_an_adapter_that_is_written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    original = peft_directory.copy

    def copied(adapter: Any, directory: Path) -> None:
        original(adapter, directory)
        (directory / "adapter_config.json").write_text(json.dumps(adapter.config, indent=2))

    monkeypatch.setattr(peft_directory, "copy", copied)

    assert {marks[0] for marks in adapter_marks().values()} == {"other bytes"}


def test_adapters_in_the_command(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "names", lambda: ["linear"])
    monkeypatch.setattr(deltas, "names", lambda: ["low_rank", "nf4"])
    code, out, err = cli("doctor")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    at = rows.index(["adapter", "one", "adapter", "sum", "order"])
    assert rows[0] == ["installation"] and rows[at + 1] == ["LoRA", "ok", "ok", "ok"]
    found = json.loads(cli("doctor", "--json").out)
    assert found["ok"] and [one["adapter"] for one in found["adapters"]][:2] == ["LoRA", "rsLoRA"]
    assert found["adapters"][3]["checks"][1]["why"].startswith("a bias of lora_B is no difference")
    assert {part["name"] for part in found["installation"]} > {"torch", "devices", "plug-ins", "[probe]"}
    assert json.loads(cli("doctor", "linear", "--json").out).keys() == {"ok", "methods"}
