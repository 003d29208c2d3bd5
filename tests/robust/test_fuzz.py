"""Every file that the program reads, damaged hundreds of times: it works, or it is refused in one clear line."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from models import fine_tuned, tiny_tensors, write_model, write_recipe
from mutations import damaged
from safetensors.torch import save_file

import mergebench
from mergebench.adapters.describe import describe_adapter
from mergebench.adapters.peft_names import task_type
from mergebench.adapters.stored import read_stored
from mergebench.checkpoint.align import align
from mergebench.checkpoint.content import Contents
from mergebench.checkpoint.files import Files
from mergebench.checkpoint.side_files import copy_side_files
from mergebench.checkpoint.staging import Staging
from mergebench.checkpoint.target import PROVENANCE, finished
from mergebench.cli.inspect import _architecture
from mergebench.cli.patch import _title
from mergebench.deltas.formats.compressed import read_record
from mergebench.deltas.formats.masked import metadata_of, write_mask
from mergebench.deltas.formats.native import Writing, write_file
from mergebench.deltas.open import open_model
from mergebench.editing.patches import open_patch, write_patch
from mergebench.editing.probes.probe import read_probe
from mergebench.editing.summary import facts, layers_of, sentence
from mergebench.editing.targets import find_targets
from mergebench.errors import MergebenchError
from mergebench.evaluation import Results, load_suite, page, save
from mergebench.evaluation.compare.comparison import against
from mergebench.evaluation.compare.predictions import read_predictions
from mergebench.evaluation.head import read_head
from mergebench.evaluation.page.sources import read as read_sources
from mergebench.evaluation.search import history
from mergebench.evaluation.store import Store
from mergebench.evaluation.tables.results import markdown, report
from mergebench.evaluation.tasks.probe import Params as ProbeTask
from mergebench.evaluation.tasks.probe import _reading
from mergebench.networks.items import contents, read_rows
from mergebench.networks.module import config_of
from mergebench.networks.network import Network
from mergebench.networks.verify import verify
from mergebench.recipe import tokenizers
from mergebench.systems.mos.bank import read_bank
from mergebench.systems.mos.config import load_config
from mergebench.systems.pela.multiply import _pairs
from tests.evaluation.conftest import write_data, write_encoder, write_head
from tests.evaluation.page import documents
from tests.systems.mos.conftest import write_bank

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
Use = Callable[[Path], object]


class Kind(NamedTuple):
    """A sort of file: how a good one is made, the files to damage, and all that reads them."""

    make: Callable[[Path], object]
    files: tuple[str, ...]
    use: Use
    cases: int = 300


def read_all(folder: Path, reference: str = "model") -> None:
    """A model's tensors, deltas folded in, aligned with the base."""
    model, base = open_model(str(folder / reference)), open_model(str(folder / "base"))
    align(base, [model], lambda name: True)
    with Files() as files:
        values = model.values(files)
        for name, info in model.tensors.items():
            if info.numel < 10_000:
                values.whole(name)


def two_models(folder: Path, **how: Any) -> None:
    write_model(folder / "base", tiny_tensors())
    write_model(folder / "model", fine_tuned(tiny_tensors(), 1), **how)


def config(folder: Path) -> None:
    model = open_model(str(folder / "model"))
    _architecture(model.config), task_type(model), config_of(model)
    tokenizers.with_vocab_size(model.config, 12)
    align(model, [open_model(str(folder / "base"))], lambda name: True)
    (folder / "copy").mkdir(exist_ok=True)
    copy_side_files(model, folder / "copy", "BF16")
    find_targets(model.tensors, model.config, "*", 8, None)


def evaluated(folder: Path) -> None:
    network = Network(open_model(str(folder / "model")), "AutoModel", torch.device("cpu"))
    with torch.inference_mode():
        network.encode(network.tokenize(["w1 w2", "w3"], 9))
    tried(lambda: network.hidden)
    tried(lambda: network.blocks)


def adapter(kind: str, tensors: dict[str, tuple[int, ...]], **config: Any) -> Kind:
    """A PEFT directory on two layers of the tiny model."""

    def make(folder: Path) -> None:
        two_models(folder)
        (folder / "adapter").mkdir()
        whole = {"peft_type": kind, "base_model_name_or_path": "base", "target_modules": ["layers.0"], **config}
        whole |= {"modules_to_save": ["norm"], "inference_mode": True}
        (folder / "adapter/adapter_config.json").write_text(json.dumps(whole))
        named = {f"base_model.model.{n}.{end}": torch.ones(s) for end, s in tensors.items() for n in ("layers.0",)}
        save_file(named | {"base_model.model.norm.weight": torch.ones(3)}, folder / "adapter/adapter_model.safetensors")

    def use(folder: Path) -> None:
        for act in (
            lambda: read_all(folder, f"base+{folder}/adapter"),
            lambda: describe_adapter(folder / "adapter").to_plain(),
            lambda: read_stored(folder / "adapter").layers,
        ):
            tried(act)

    return Kind(make, ("adapter/adapter_config.json", "adapter/adapter_model.safetensors"), use, 200)


def tried(act: Callable[[], object]) -> None:
    """One of several uses: a clear refusal does not keep the others from being tried."""
    try:
        act()
    except MergebenchError as error:
        clear(error)


def probe(folder: Path) -> None:
    found = read_probe(folder / "probe.safetensors")
    found.doubt(), found.direction("unit-diff"), found.logit(torch.ones(1, found.width))
    _reading(ProbeTask(probe=folder, data=folder), found)


def make_probe(folder: Path) -> None:
    about = {"layer": 1, "norm": "post", "pool": "mean", "max_length": 9, "classes": ["a", "b"], "n_test": 9}
    about |= {"model": {"reference": "x", "identity": "0"}, "test_accuracy": 0.5, "majority": 0.5}
    tensors = {"weight": torch.eye(2, 8), "bias": torch.zeros(2), "mean_diff": torch.ones(8)}
    save_file(tensors, folder / "probe.safetensors", metadata={"probe": json.dumps(about)})


def make_patch(folder: Path) -> None:
    two_models(folder)
    changes = {"layers.0.weight": (torch.tensor([1, 2]), torch.ones(2))}
    about = {key: value for key, value in documents.edit().items() if key != "by_layer"}
    write_patch(folder / "p.safetensors", open_model(str(folder / "base")), torch.ones(8), changes, frozenset(), about)


def patch(folder: Path) -> None:
    tried(lambda: read_all(folder, f"base+{folder}/p.safetensors"))
    read = open_patch(folder / "p.safetensors")
    edit = {**read.about, "patch": "p.safetensors"}
    sentence(edit), facts(edit), layers_of(edit), _title(read.about)
    for name in read.names:
        read.neurons(open_model(str(folder / "base")), name), read.change(name).edited(read.direction)


def make_delta(folder: Path) -> None:
    two_models(folder)
    parts = {"b": torch.ones(8, 2), "a": torch.ones(2, 8)}
    writings = {"layers.0.weight": Writing("low_rank", {"scale": 0.5}, parts)}
    writings |= {"layers.1.weight": Writing("dense", {}, {"values": torch.ones(8, 8)})}
    write_file(folder / "d.safetensors", writings, made={"x": 1}, base="0")
    write_mask(
        folder / "mask.safetensors",
        {"norm.weight": 2},
        lambda _: torch.tensor([0, 2]).int(),
        {"norm.weight": 3},
        "0",
        {},
    )
    about = metadata_of(folder / "mask.safetensors", "0", {})
    save_file({"norm.weight": torch.ones(2)}, folder / "values.safetensors", metadata=about)


def delta(folder: Path) -> None:
    tried(lambda: read_all(folder, f"base+{folder}/d.safetensors"))
    read_all(folder, f"base+{folder}/values.safetensors")


def make_emr(folder: Path) -> None:
    two_models(folder)
    write_model(folder / "other", fine_tuned(tiny_tensors(), 2))
    recipe = write_recipe(folder / "r.yaml", "emr", [folder / "model", folder / "other"], folder / "base")
    mergebench.run(mergebench.plan(mergebench.load(recipe), device="cpu"), folder / "emr")


def journal(folder: Path) -> None:
    with Staging(folder / "out", "0", resume=True) as staging:
        staging.save()


def make_journal(folder: Path) -> None:
    staging = Staging(folder / "out", "0", resume=False)
    staging.journal["answers"] = {"model": [{"norms": [1.0]}]}
    staging.save()
    staging.__exit__(ValueError)


def make_results(folder: Path) -> None:
    failed = {"model": "x", "tasks": ["nouns"], "error": "no such file", "hint": None}
    about = {"failed": [failed], "by_task": ["pcb"], "unedited": {"linear": ["surgery"]}, "baseline": "linear"}
    save(documents.results(**about), folder)


def results(folder: Path) -> None:
    found = Results.load(folder)
    report(found), markdown(found)
    for one in against(found):
        one.to_dict()


def sources(folder: Path) -> None:
    page.render(read_sources(folder))


def searched(folder: Path) -> None:
    with history.held(folder, resume=True, overwrite=False):
        found = history.History(folder, {"objective": "mean"})
        found.resume()
        found.ranked, found.to_dict()


def store(folder: Path) -> None:
    Store(folder).find("a")


def make_store(folder: Path) -> None:
    found = {"value": 0.5, "stderr": None, "n": 1, "predictions": {"1": ["a", 1.0]}, "metric": "accuracy"}
    (folder / "a.json").write_text(json.dumps(found | {"direction": "higher", "seconds": 1}))


def items(folder: Path) -> None:
    tried(lambda: contents(read_rows(folder / "data.jsonl", "id", ("text", "label"))))
    read_predictions(folder / "predictions.jsonl")


def make_items(folder: Path) -> None:
    write_data(folder / "data.jsonl", 5)
    rows = [{"id": n, "pred": "a", "gold": "b", "score": 0.5} for n in range(4)]
    (folder / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))


def make_sequence(folder: Path) -> None:
    write_data(folder / "data.jsonl", 5)
    config = {"backbone": "model", "train": "data.jsonl", "test": "data.jsonl", "text": "text", "tasks": [["a"], ["b"]]}
    (folder / "cil.yaml").write_text(json.dumps(config | {"seeds": [0, 1], "epochs": 2, "pooling": "mean"}, indent=1))


def make_hashes(folder: Path) -> None:
    hashes(folder)


def hashes(folder: Path) -> None:
    """The sums that a folder of results keeps of files."""
    (folder / "x").write_text("x")
    assert Contents(folder).of_file(folder / "x") == hashlib.sha256(b"x").hexdigest()


def make_suite(folder: Path) -> None:
    write_data(folder / "data.jsonl", 5)
    write_head(folder)
    entry = {"name": "a", "kind": "text-classification", "data": "data.jsonl", "head": "head.safetensors"}
    tasks = [entry | {"split": "test", "limit": 3, "seed": 1}]
    tasks += [{"name": "p", "kind": "perplexity", "data": "data.jsonl", "limit": 2}]
    (folder / "suite.yaml").write_text(json.dumps({"tasks": tasks}, indent=1))


def suite(folder: Path) -> None:
    load_suite(folder / "suite.yaml")


def recipe(folder: Path) -> None:
    mergebench.plan(mergebench.load(folder / "recipe.yaml"), device="cpu")


def make_recipe(folder: Path) -> None:
    two_models(folder)
    models = [{"model": str(folder / "model"), "parameters": {"weight": [0, 1], "density": 0.5}}, str(folder / "base")]
    entries = [one if isinstance(one, dict) else {"model": one} for one in models]
    write_recipe(
        folder / "recipe.yaml", "dare_ties", entries, folder / "base", parameters={"normalize": True}, seed=1,
        include=["layers.*"], dtype="bfloat16", tokenizer_source="base", chat_template="auto",
    )  # fmt: skip


def make_tokenizer(folder: Path) -> None:
    write_encoder(folder / "model")


def tokenizer(folder: Path) -> None:
    model = open_model(str(folder / "model"))
    tokenizers.usual_template([model])
    tokenizers.with_template(tokenizers.stored(folder / "model"), "x")
    tokenizers.without_unused(tokenizers.load(folder / "model", "model"), 5, "model")


def make_compressed(folder: Path) -> None:
    two_models(folder)
    entry = {"shape": [8, 8], "rank": 2, "energy_kept": 1.0, "relative_error": 0.0, "squared_norm": 1.0}
    record = {"tensors": {"layers.0.weight": entry, "norm.weight": {"left": "a vector"}}, "stored": "[out, in]"}
    (folder / "compress.json").write_text(json.dumps(record))


def compressed(folder: Path) -> None:
    _pairs(open_model(str(folder / "base")), read_record(folder)["tensors"], False)


KINDS = {
    "weights": Kind(two_models, ("model/model.safetensors",), read_all),
    "index": Kind(lambda folder: two_models(folder, shards=2), ("model/model.safetensors.index.json",), read_all),
    "config": Kind(two_models, ("model/config.json",), config),
    "config, verified": Kind(make_tokenizer, ("model/config.json",), lambda folder: verify(folder / "model"), 100),
    "config, evaluated": Kind(make_tokenizer, ("model/config.json",), evaluated, 100),
    "sequence": Kind(make_sequence, ("cil.yaml",), lambda folder: load_config(folder / "cil.yaml")),
    "hashes": Kind(make_hashes, ("hashes.json",), hashes),
    "LoRA": adapter(
        "LORA", {"lora_A.weight": (2, 8), "lora_B.weight": (8, 2)}, r=2, lora_alpha=4, alpha_pattern={"layers": 8},
        rank_pattern={"layers.0": 2}, use_dora=False, bias="none", fan_in_fan_out=False,
    ),
    "IA3": adapter("IA3", {"ia3_l": (8, 1)}, feedforward_modules=[]),
    "FourierFT": adapter("FOURIERFT", {"fourierft_spectrum": (5,)}, random_loc_seed=1, scaling=2.0, n_frequency=5),
    "HRA": adapter("HRA", {"hra_u": (8, 2)}, r=2, apply_GS=False),
    "AdaLoRA": adapter(
        "ADALORA", {"lora_A": (2, 8), "lora_B": (8, 2), "lora_E": (2, 1)}, lora_alpha=4, init_r=2, target_r=2,
        rank_pattern={"layers.0.lora_E": [True, True]},
    ),
    "probe": Kind(make_probe, ("probe.safetensors",), probe),
    "patch": Kind(make_patch, ("p.safetensors",), patch),
    "delta files": Kind(make_delta, ("d.safetensors", "mask.safetensors", "values.safetensors"), delta),
    "task": Kind(
        make_emr, ("emr/tasks/model/task.json", "emr/tasks/model/model.safetensors"),
        lambda folder: read_all(folder, f"base+{folder}/emr/tasks/model"),
    ),
    "bank": Kind(lambda at: write_bank(at / "bank"), ("bank/bank.json",), lambda at: read_bank(at / "bank")),
    "journal": Kind(make_journal, (".out.partial/.journal.json",), journal),
    "provenance": Kind(documents.write_all, (PROVENANCE,), lambda folder: finished(folder)),
    "results": Kind(make_results, ("evaluation.json",), results, 100),
    "page": Kind(documents.write_all, (PROVENANCE, "statistics.json", "search.json", "evaluation.json"), sources, 40),
    "search": Kind(documents.write_all, ("search.json",), searched),
    "store": Kind(make_store, ("a.json",), store),
    "items": Kind(make_items, ("data.jsonl", "predictions.jsonl"), items),
    "head": Kind(write_head, ("head.safetensors",), lambda folder: read_head(folder / "head.safetensors")),
    "suite": Kind(make_suite, ("suite.yaml", "data.jsonl", "head.safetensors"), suite),
    "recipe": Kind(make_recipe, ("recipe.yaml",), recipe),
    "tokenizer": Kind(make_tokenizer, ("model/tokenizer.json", "model/tokenizer_config.json"), tokenizer, 150),
    "compressed": Kind(make_compressed, ("compress.json",), compressed),
}  # fmt: skip


def clear(error: MergebenchError) -> None:
    for text in (error.message, error.hint or ""):
        assert len(text) < 500 and text.isprintable(), text
    assert error.message and str(error) == error.message


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kind, good, place = KINDS[name], tmp_path / "good", tmp_path / "place"
    good.mkdir()
    kind.make(good)
    shutil.copytree(good, place)
    tried(lambda: kind.use(place))  # relative to the folder, as the damaged ones are
    failed = []
    for seed in range(kind.cases):
        file = kind.files[seed % len(kind.files)]
        shutil.rmtree(place)
        shutil.copytree(good, place)
        raw = damaged((good / file).read_bytes(), zlib.crc32(f"{name} {seed}".encode()))
        (place / file).write_bytes(raw)
        try:
            tried(lambda: kind.use(place))
        except Exception as error:
            failed.append((seed, file, f"{type(error).__name__}: {error}"[:300], raw[:200]))
    assert not failed, "\n".join(map(str, failed[:20]))
