"""A bank gives back what was put in, and refuses what does not fit, before anything is left half-written."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergebench.errors import MergebenchError, ModelError, RecipeError, RunError
from mergebench.systems.mos.bank import Bank, BankWriter, read_bank
from tests.models import hashes
from tests.systems.mos.conftest import BLOCKS, TASKS, WIDTH, about, parts, write_bank


def test_what_was_put_in_comes_out(tmp_path: Path) -> None:
    bank = read_bank(write_bank(tmp_path / "bank"))
    given = [parts(before, classes, seed) for seed, (before, classes) in enumerate([(0, 2), (2, 1), (3, 3)])]

    assert bank.classes == tuple("abcdef") and bank.classes_at(1) == tuple("abc")
    assert bank.task_of.tolist() == [0, 0, 1, 2, 2, 2] and bank.task_of.dtype == torch.int64
    assert bank.width == WIDTH and [task.name for task in bank.tasks] == ["01", "02", "03"]
    for task, one in enumerate(given):
        assert bank.adapter(task).keys() == one["adapter"].keys()
        assert all(torch.equal(tensor, one["adapter"][name]) for name, tensor in bank.adapter(task).items())
        assert torch.equal(bank.head(task).weight, one["head"][0]) and torch.equal(bank.head(task).bias, one["head"][1])
        assert bank.head(task).labels == bank.classes_at(task)
        assert all(torch.equal(tensor, one["statistics"][name]) for name, tensor in bank.statistics(task).items())
        assert bank.statistics(task).keys() == {"mean", "count", "variance"}
        until = given[: task + 1]
        assert torch.equal(bank.trained(task).weight, torch.cat([one["trained"][0] for one in until]))
        assert torch.equal(bank.trained(task).bias, torch.cat([one["trained"][1] for one in until]))
        assert torch.equal(bank.prototypes(task), torch.cat([one["prototype"] for one in until]))
        assert torch.equal(bank.frozen(task), torch.cat([one["frozen"] for one in until]))


def test_a_bank_after_a_task_is_a_prefix(tmp_path: Path) -> None:
    short, long = write_bank(tmp_path / "short", TASKS[:2]), write_bank(tmp_path / "long")

    found = hashes(long)
    assert all(found[name] == one for name, one in hashes(short).items() if name != "bank.json")
    assert read_bank(long).tasks[:2] == read_bank(short).tasks


def test_what_is_done_to_an_adapter_does_not_reach_the_bank(bank: Bank) -> None:
    for tensor in bank.adapter(1).values():
        tensor.zero_()

    assert all(tensor.any() for tensor in bank.adapter(1).values())
    assert not any(tensor.requires_grad for tensor in bank.adapter(1).values())
    with pytest.raises(KeyError):
        bank.adapter(-1)  # none, not the last


def test_a_writer_goes_on(tmp_path: Path) -> None:
    whole, begun = write_bank(tmp_path / "whole"), write_bank(tmp_path / "begun", TASKS[:2])
    (begun / "adapters/02.safetensors").unlink()  # as a killed run leaves it, its journal cleared
    writer = BankWriter(begun, about())

    assert [task.name for task in writer.about.tasks] == ["01"]
    assert writer.add("c", **parts(2, 1, 1)) == [
        *("adapters/02.safetensors", "heads/02.safetensors", "heads/02.trained.safetensors"),
        *("classes/02.safetensors", "bank.json"),
    ]
    writer.add("def", **parts(3, 3, 2))
    assert hashes(begun) == hashes(whole)
    with pytest.raises(RecipeError, match="made with other settings"):
        BankWriter(begun, about(alpha=0.2))


@pytest.mark.parametrize(
    ("classes", "changes", "message"),
    [
        ("ga", {}, r"bank.json: class 'a' is claimed by task 01 and again by task 04"),
        ("gg", {}, r"bank.json: class 'g' is claimed by task 04 and again by task 04"),
        ("", {}, r"bank.json: task 04 has no classes"),
        ("gh", {"head": (torch.ones(7, WIDTH), torch.ones(7))}, r"heads/04.safetensors: 8 different labels for 7"),
        ("gh", {"trained": (torch.ones(2, 5), torch.ones(2))}, r"04.trained.safetensors: it takes 5 features, .* 6"),
        ("gh", {"prototype": torch.ones(2, 5)}, r"04.safetensors: prototype has \[2, 5\], not \[2, 6\]"),
        ("gh", {"frozen": torch.full((2, WIDTH), torch.nan)}, r"04.safetensors: frozen holds .* not finite"),
        ("gh", {"blocks": BLOCKS[:1]}, r"adapters/04.safetensors: layers.1.down.bias is missing as in task 01"),
        ("gh", {"width": 8}, r"adapters/04.safetensors: layers.0.down.weight has \[2, 8\], not \[2, 6\] as in task 01"),
    ],
)
def test_nothing_is_left_of_a_task_that_does_not_fit(
    tmp_path: Path, classes: str, changes: dict[str, Any], message: str
) -> None:
    bank = write_bank(tmp_path / "bank")
    before = hashes(bank)

    with pytest.raises(MergebenchError, match=message):
        BankWriter(bank, about()).add(classes, **parts(6, len(classes), 3, **changes))
    assert hashes(bank) == before


def test_statistics_must_be_what_the_manifest_says(tmp_path: Path) -> None:
    given = parts(0, 2, 0)
    mean, count = given["statistics"]["mean"], given["statistics"]["count"]
    for kind, spread in (("covariance", (WIDTH, WIDTH)), ("centroids", (3, WIDTH)), ("variance", (WIDTH,))):
        writer = BankWriter(tmp_path / kind, about(statistics=kind))
        with pytest.raises(ModelError, match=f"{kind} is missing|{kind} has"):
            writer.add("ab", **given | {"statistics": {"mean": mean, "count": count, kind: mean[0]}})
        names = (kind, "within") if kind == "centroids" else (kind,)
        whole = {"mean": mean, "count": count, **{name: torch.ones(2, *spread) for name in names}}
        with pytest.raises(ModelError, match="class 'b' counts 0 items"):
            writer.add("ab", **given | {"statistics": whole | {"count": torch.tensor([3, 0])}})
        writer.add("ab", **given | {"statistics": whole})
        assert read_bank(tmp_path / kind).statistics(0)[kind].shape == (2, *spread)


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(bank: Path) -> None:
        document = json.loads((bank / "bank.json").read_text())
        change(document)
        (bank / "bank.json").write_text(json.dumps(document))

    return edit


def restored(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """A file changed, and the manifest with it."""

    def restore(bank: Path) -> None:
        tensors = load_file(bank / name)
        change(tensors)
        save_file(tensors, bank / name)
        sha256 = hashlib.sha256((bank / name).read_bytes()).hexdigest()
        task = int(re.findall(r"\d+", name)[0]) - 1
        edited(lambda document: document["tasks"][task]["files"].update({name: sha256}))(bank)

    return restore


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda bank: (bank / "bank.json").unlink(), ModelError, "not a bank: it has no bank.json"),
        (lambda bank: (bank / "bank.json").write_text("{"), RunError, "bank.json: not readable as JSON"),
        (edited(lambda m: m.pop("alpha")), ModelError, "bank.json: alpha: "),
        (edited(lambda m: m.update(statistics="median")), ModelError, "bank.json: statistics: .*covariance"),
        (edited(lambda m: m.update(more=1)), ModelError, "bank.json: more: "),
        (edited(lambda m: m.update(tasks=[])), ModelError, "it holds no tasks"),
        (edited(lambda m: m["tasks"].pop(1)), ModelError, "task 02 is missing: '03' follows"),
        (edited(lambda m: m["tasks"][2]["classes"].insert(0, "b")), ModelError, "class 'b' .* task 01 .* task 03"),
        (edited(lambda m: m["tasks"][1].update(classes=[])), ModelError, "task 02 has no classes"),
        (edited(lambda m: m["tasks"][1].update(classes=["x"])), ModelError, r"it is for a, b, c \(3 classes\), .* x"),
        (edited(lambda m: m["tasks"][0]["files"].update({"../x": ""})), ModelError, "task 01: its files are not"),
        (edited(lambda m: m["adapter"].update(bottleneck=3)), ModelError, r"has \[2, 6\], not \[3, 6\]"),
        (edited(lambda m: m["features"].update(pooling="cls+mean")), ModelError, "takes 6 features, .* give 12"),
        (edited(lambda m: m["features"].update(max_length=8)), ModelError, "its pooling or max_length"),
        (lambda bank: (bank / "heads/02.safetensors").unlink(), ModelError, "heads/02.safetensors: no such file"),
        (lambda bank: (bank / "classes/02.safetensors").write_bytes(b""), RunError, "not the file that bank.json"),
        (restored("adapters/02.safetensors", lambda t: t.pop("layers.1.up.bias")), ModelError, "up.bias is missing"),
        (restored("adapters/02.safetensors", lambda t: t.update(x=torch.ones(1))), ModelError, "x has no place"),
        (restored("adapters/02.safetensors", lambda t: t["layers.0.up.bias"].fill_(torch.inf)), RunError, "finite"),
        (restored("classes/03.safetensors", lambda t: t.update(count=t["count"].float())), ModelError, "is float32"),
        (restored("adapters/01.safetensors", lambda t: t.clear()), ModelError, "not an adapter: it holds no tensors"),
    ],
)
def test_a_bank_that_is_not_whole(
    tmp_path: Path, spoil: Callable[[Path], object], error: type[MergebenchError], message: str
) -> None:
    bank = write_bank(tmp_path / "bank")
    spoil(bank)

    with pytest.raises(error, match=message) as raised:
        read_bank(bank)
    assert raised.value.exit_code == (3 if error is ModelError else 1)


def test_a_bank_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such directory"):
        read_bank(tmp_path / "nowhere")
