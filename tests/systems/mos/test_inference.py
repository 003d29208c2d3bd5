"""`adapters retrieve`: a file of items answered on the command line, and what is wrong with bank, backbone or file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mergebench.checkpoint.content import Contents
from mergebench.deltas.open import open_model
from mergebench.networks.features import Pooling, Texts
from mergebench.networks.network import Network
from mergebench.systems.mos.bank import read_bank
from mergebench.systems.mos.encoder import Encoder
from mergebench.systems.mos.inference import open_encoder
from mergebench.systems.mos.manifest import Backbone, Features
from mergebench.systems.mos.variants import mos
from tests.conftest import Cli
from tests.evaluation.conftest import WORDS, write_encoder
from tests.evaluation.test_images import write_image_encoder, write_images
from tests.models import hashes
from tests.systems.mos.conftest import TASKS, write_bank

pytestmark = pytest.mark.usefixtures("one_thread")

ITEMS = [{"id": f"i{n}", "text": " ".join(WORDS[n % 9 : 12 + n % 7]), "label": "abcdef"[n % 6]} for n in range(30)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bank_of(backbone: Path, directory: Path, kind: str = "text") -> Path:
    """A bank of random tensors that fit a model."""
    model = open_model(str(backbone))
    content = Contents(None).of_model(model)
    assert content is not None
    encoder = Encoder(Network(model, "AutoModel", torch.device("cpu")), Pooling("cls"), 0.5)
    features = Features(kind=kind, pooling="cls", max_length=16 if kind == "text" else None)
    where = Backbone(model=str(backbone), sha256=content)
    return write_bank(directory, blocks=encoder.blocks, width=encoder.width, backbone=where, features=features)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made")
    bank_of(write_encoder(place / "model"), place / "bank")
    write(place / "data.jsonl", ITEMS)
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_lines_are_the_answers(place: Path, cli: Cli) -> None:
    bank, before = read_bank("bank"), hashes(place)
    encoder, inputs = open_encoder(bank, torch.device("cpu")), Texts([item["text"] for item in ITEMS], 16)

    def features(adapter: int, positions: torch.Tensor) -> torch.Tensor:  # no memory, all at once
        weights = None if adapter < 0 else bank.adapter(adapter)
        return encoder.features(inputs, range(len(ITEMS)), weights, lambda items: None)[positions]

    for stage in (None, 1, 2):
        wanted = mos(bank, (stage or 3) - 1, features, torch.arange(len(ITEMS)))
        assert wanted.retrieval is not None
        ran = cli(
            "adapters", "retrieve", "bank", "data.jsonl", "--trace", *([] if stage is None else ["--stage", stage])
        )
        assert ran.code == 0
        lines = [line.split("\t") for line in ran.out.splitlines()]
        assert [line[0] for line in lines] == [item["id"] for item in ITEMS]
        assert [line[1] for line in lines] == ["abcdef"[answer] for answer in wanted.classes]
        assert [line[2] for line in lines] == [f"0{adapter + 1}" for adapter in wanted.adapter]
        for number, (path, evaluations, end) in enumerate(line[3:] for line in lines):
            tasks = [int(task) - 1 for task in path.split(">")]
            visited, predicted = wanted.retrieval.visited[number], wanted.retrieval.predicted[number]
            count = int(evaluations)
            assert tasks[:-1] == visited[:count].tolist() and tasks[1:] == predicted[:count].tolist()
            assert end == ("settled" if tasks[-1] == tasks[-2] else "cycle" if tasks[-1] in tasks[:-2] else "stopped")
    assert hashes(place) == before


def test_the_summary_is_counted_from_the_lines(place: Path, cli: Cli) -> None:
    known = [item for item in ITEMS if item["label"] in "abc"]  # the classes of the first two tasks
    ran = cli("adapters", "retrieve", "bank", "data.jsonl", "--trace", "--stage", 2)
    found = json.loads(cli("adapters", "retrieve", "bank", "data.jsonl", "--json", "--stage", 2).out)

    lines = {line[0]: line for line in (text.split("\t") for text in ran.out.splitlines())}
    right = [lines[item["id"]][1] == item["label"] for item in known]
    own = [f"0{next(n for n, task in enumerate(TASKS, 1) if item['label'] in task)}" for item in known]
    paths = [lines[item["id"]][3].split(">")[:-1] for item in known]
    held = [[(path + [path[-1]] * 4)[step] for path in paths] for step in range(4)]
    assert found["accuracy"] == sum(right) / len(known) and found["labelled"] == len(known) == 15
    assert found["steps"] == [sum(a == b for a, b in zip(own, now, strict=True)) / len(known) for now in held]
    assert found["evaluations"] == pytest.approx(sum(int(line[4]) for line in lines.values()) / len(ITEMS))
    assert found["cycles"] == pytest.approx(sum(line[5] == "cycle" for line in lines.values()) / len(ITEMS))
    assert found["agreement"] == pytest.approx(sum(line[5] == "settled" for line in lines.values()) / len(ITEMS))
    runs = sum(len({"01", *line[3].split(">")[:-1]}) for line in lines.values())
    assert found["encodings"] == runs
    assert [item["label"] for item in found["items"]] == [line[1] for line in lines.values()]
    assert f"30 items at stage 02: {found['evaluations']:.2f} evaluations and {runs / 30:.2f} runs" in ran.err
    assert "15 of later tasks are not counted" in ran.err
    assert f"accuracy {100 * found['accuracy']:.1f} ± {100 * found['stderr']:.1f}%" in ran.err


def test_labels_are_no_part_of_the_answers(place: Path, cli: Cli) -> None:
    write(place / "bare.jsonl", [{"id": item["id"], "text": item["text"]} for item in ITEMS])
    with_labels, without = (cli("adapters", "retrieve", "bank", file) for file in ("data.jsonl", "bare.jsonl"))

    assert without.out == with_labels.out and "accuracy" in with_labels.err and "accuracy" not in without.err
    assert "accuracy" not in json.loads(cli("adapters", "retrieve", "bank", "bare.jsonl", "--json").out)
    assert cli("adapters", "retrieve", "bank", "bare.jsonl", "-q").err == ""


def test_images(place: Path, cli: Cli) -> None:
    bank_of(write_image_encoder(place / "eyes"), place / "images", "image")
    write_images(place / "pictures.jsonl", 9)
    rows = [json.loads(line) for line in (place / "pictures.jsonl").read_text().splitlines()]
    write(place / "pictures.jsonl", [{"id": row["id"], "image": row["image"]} for row in rows])
    ran = cli("adapters", "retrieve", "images", "pictures.jsonl")

    assert ran.code == 0 and [line.split("\t")[0] for line in ran.out.splitlines()] == [str(n) for n in range(9)]


def test_ids_do_not_write_to_the_terminal(place: Path, cli: Cli) -> None:
    write(place / "odd.jsonl", [ITEMS[0] | {"id": "a\tb\x1b[31m"}])

    assert cli("adapters", "retrieve", "bank", "odd.jsonl").out.startswith("a\\tb\\x1b[31m\t")


@pytest.mark.parametrize(
    ("spoil", "arguments", "code", "message"),
    [
        (None, ["nowhere", "data.jsonl"], 3, "error: nowhere: no such directory"),
        (None, ["model", "data.jsonl"], 3, "error: model: not a bank: it has no bank.json"),
        (None, ["bank", "data.jsonl", "--stage", "4"], 2, "error: stage 4: bank has 3 tasks"),
        (None, ["bank", "data.jsonl", "--backbone", "gone"], 3, "error: model 'gone': no such file"),
        (lambda place: write_encoder(place / "other", seed=1), ["bank", "data.jsonl", "--backbone", "other"], 3,
         "error: model 'other' is not the backbone that bank was made with\nhint: "),
        (lambda place: (place / "bank/heads/02.safetensors").unlink(), ["bank", "data.jsonl"], 3,
         "error: bank/heads/02.safetensors: no such file, bank.json has it for task 02"),
        (lambda place: write(place / "x", [{"id": 1, "words": "a"}]), ["bank", "x"], 1,
         "error: x:1: no column 'text', it has id, words\nhint: columns are id, text, and label in every line or"),
        (lambda place: write(place / "x", [ITEMS[0], {"id": 1, "text": "a"}]), ["bank", "x"], 1,
         "error: x:2: no column 'label'"),
        (lambda place: write(place / "x", [ITEMS[0] | {"label": "g"}]), ["bank", "x"], 1,
         "error: x:1: label 'g' is none of the labels of bank\nhint: known: a, b, c"),
        (lambda place: shutil.move(place / "bank", place / "run/seed-0/merged"), ["run", "data.jsonl"], 3,
         "error: run: not a bank: it has no bank.json\nhint: it holds banks, such as run/seed-0/merged"),
        (lambda place: [shutil.copytree(place / "bank", place / f"run/seed-{n}/{kind}")
                        for n, kind in ((0, "frozen"), (1, "merged"), (0, "merged"), (0, "unmerged"))],
         ["run", "data.jsonl"], 3,
         "error: run: not a bank: it has no bank.json\nhint: it holds banks, such as run/seed-0/merged"),
    ],
)  # fmt: skip
def test_mistakes(
    place: Path, cli: Cli, spoil: Callable[[Path], object] | None, arguments: list[str], code: int, message: str
) -> None:
    (place / "run/seed-0").mkdir(parents=True)
    if spoil is not None:
        spoil(place)
    ran = cli("adapters", "retrieve", *arguments)

    assert (ran.code, ran.out) == (code, "") and message in ran.err


def test_a_backbone_that_moved(place: Path, made: Path, cli: Cli) -> None:
    manifest = json.loads((place / "bank/bank.json").read_text())
    manifest["backbone"]["model"] = "./gone"
    (place / "bank/bank.json").write_text(json.dumps(manifest))

    ran = cli("adapters", "retrieve", "bank", "data.jsonl")
    assert ran.code == 3 and "error: bank: its backbone is not there: model './gone'" in ran.err
    assert "--backbone MODEL" in ran.err
    wanted = cli("adapters", "retrieve", made / "bank", "data.jsonl").out
    assert cli("adapters", "retrieve", "bank", "data.jsonl", "--backbone", "model").out == wanted
