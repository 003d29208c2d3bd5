"""LST: what a side network keeps against a pruning written step by step, and the ladder against its identities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from torch.autograd.graph import saved_tensors_hooks

from mergebench.deltas.open import open_model
from mergebench.errors import MergebenchError, ModelError, RecipeError
from mergebench.evaluation.measure import measure
from mergebench.networks.network import Network
from mergebench.systems.lst import side_init
from mergebench.systems.lst.choose import choose
from mergebench.systems.lst.importance import fisher, of_values
from mergebench.systems.lst.ladder import Ladder
from mergebench.systems.lst.layout import Layout
from mergebench.training import load_config, once, train
from mergebench.training.attached import Base
from mergebench.training.declared import kinds
from mergebench.training.memory import saved_by_autograd
from tests.conftest import Cli
from tests.encoders import write_encoder
from tests.language import write_decoder
from tests.training.trainable import classify, complete

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def random_values(place: Path) -> dict[str, Tensor]:
    """Positive numbers of a Fisher's range for every matrix of a model."""
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(place / "model.safetensors")
    return {
        name: torch.exp(4 * torch.randn(one.shape, generator=generator) - 20)
        for name, one in tensors.items()
        if one.dim() == 2
    }


def best(scores: Any, count: int) -> list[int]:
    """The places of the largest, in order."""
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


# -- what is kept ------------------------------------------------------------------------------------------


def chain_of_bert(f: dict[str, Any], layers: int, heads: int, keep: float) -> list[list[int]]:
    """The reference's list of steps, written with NumPy; rows of query, key and value are chosen head by head."""
    f = {name: one.double().numpy() for name, one in f.items()}
    words = [f[f"embeddings.{n}_embeddings.weight"] for n in ("word", "position", "token_type")]
    last = best(sum(np.abs(one).sum(0) for one in words), round(keep * words[0].shape[1]))
    sets = [last]
    for n in range(layers):
        at = f"encoder.layer.{n}."
        q, k, v = (f[f"{at}attention.self.{one}.weight"][:, last] for one in ("query", "key", "value"))
        rows = np.abs(q * k * v).sum(1)
        size = len(rows) // heads
        kept = [h * size + j for h in range(heads) for j in best(rows[h * size :][:size], round(keep * size))]
        o = f[f"{at}attention.output.dense.weight"][:, kept]
        after = best(np.abs(o).sum(1), len(last))
        up = np.abs(f[f"{at}intermediate.dense.weight"][:, after]).sum(1)
        inner = best(up, round(keep * len(up)))
        last = best(np.abs(f[f"{at}output.dense.weight"][:, inner]).sum(1), len(last))
        sets += [kept, after, inner, last]
    return sets


@pytest.mark.parametrize("heads", [1, 2])
def test_chain_of_an_encoder_is_the_published_list_of_steps(heads: int, tmp_path: Path) -> None:
    base = write_encoder(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_attention_heads": heads}))
    found = random_values(base)

    choice = choose(Layout(open_model(str(base))), 2, [0, 1], of_values(found), "chain")

    expected = chain_of_bert(found, 2, heads, 0.5)
    kept = [choice.cuts["embeddings.word_embeddings.weight"].columns]
    for n in range(2):
        for one in ("attention.self.key", "attention.output.dense", "intermediate.dense", "output.dense"):
            kept.append(choice.cuts[f"encoder.layer.{n}.{one}.weight"].rows)
    assert [one.tolist() for one in kept if one is not None] == expected
    reads = choice.cuts["encoder.layer.1.attention.self.query.weight"]
    assert reads.columns is not None and reads.columns.tolist() == expected[4]
    norm = choice.cuts["encoder.layer.0.attention.output.LayerNorm.bias"]
    assert norm.rows is not None and norm.rows.tolist() == expected[2]
    assert [one.tolist() for one in choice.residual] == [expected[0], expected[4], expected[8]]


def test_a_decoder_keeps_whole_heads_and_the_rows_of_gate_and_up_together(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    f = random_values(tmp_path / "base")

    choice = choose(Layout(open_model(str(tmp_path / "base"))), 2, [1], of_values(f), "chain")

    n = {name: one.double().numpy() for name, one in f.items()}
    last = best(n["model.embed_tokens.weight"].sum(0), 8)
    q, k, v = (n[f"model.layers.1.self_attn.{one}_proj.weight"][:, last] for one in "qkv")
    score = [sum((q[4 * h + i] * k[4 * (h // 2) + i] * v[4 * (h // 2) + i]).sum() for i in range(4)) for h in range(4)]
    shared = 0 if score[0] + score[1] > score[2] + score[3] else 1
    heads = [2 * shared, 2 * shared + 1]
    queries = [4 * h + i for h in heads for i in range(4)]
    cuts = {name.removeprefix("model.layers.0."): cut for name, cut in choice.cuts.items()}
    assert choice.config["num_attention_heads"], choice.config["num_key_value_heads"] == (2, 1)
    assert cuts["self_attn.q_proj.weight"].rows.tolist() == queries  # type: ignore[union-attr]
    assert cuts["self_attn.k_proj.weight"].rows.tolist() == [4 * shared + i for i in range(4)]  # type: ignore[union-attr]
    after = best(n["model.layers.1.self_attn.o_proj.weight"][:, queries].sum(1), 8)
    rows = (n["model.layers.1.mlp.gate_proj.weight"] * n["model.layers.1.mlp.up_proj.weight"])[:, after].sum(1)
    assert cuts["mlp.up_proj.weight"].rows.tolist() == best(rows, 12)  # type: ignore[union-attr]
    assert cuts["mlp.up_proj.weight"].source == "model.layers.1.mlp.up_proj.weight"


def test_a_shared_basis_is_one_set_everywhere(tmp_path: Path) -> None:
    base = write_encoder(tmp_path / "base")

    choice = choose(Layout(open_model(str(base))), 4, [0, 1], of_values(random_values(base)), "shared")

    kept = choice.residual[0].tolist()
    assert all(one.tolist() == kept for one in choice.residual)
    assert choice.cuts["encoder.layer.1.output.dense.weight"].rows.tolist() == kept  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_a_side_network_is_a_checkpoint_of_the_bases_rows_and_columns(family: str, tmp_path: Path) -> None:
    base = write_encoder(tmp_path / "base") if family == "encoder" else write_decoder(tmp_path / "base")
    auto = "AutoModel" if family == "encoder" else "AutoModelForCausalLM"

    side_init(str(base), tmp_path / "side", reduction=2, keep_layers=[1])

    found, values = (load_file(place / "model.safetensors") for place in (tmp_path / "side", base))
    for name, cut in json.loads((tmp_path / "side/side.json").read_text())["tensors"].items():
        kept = values[cut["from"]]
        kept = kept if cut["rows"] is None else kept[cut["rows"]]
        kept = kept if cut["columns"] is None else kept[:, cut["columns"]]
        assert torch.equal(found.pop(name), kept), name
    assert not found
    network = Network(open_model(str(tmp_path / "side")), auto, CPU)
    assert network.hidden == 8 and len(network.blocks) == 1
    ids, mask = network.padded([[5, 6, 7]])
    assert network.last_states(ids, mask).shape == (1, 3, 8)


@pytest.mark.parametrize("basis", ["chain", "shared"])
@pytest.mark.parametrize("write", [write_encoder, write_decoder])
def test_a_reduction_of_one_is_the_base(write: Any, basis: str, tmp_path: Path) -> None:
    base = write(tmp_path / "base")

    side_init(str(base), tmp_path / "side", reduction=1, basis=basis)

    found, values = (load_file(place / "model.safetensors") for place in (tmp_path / "side", base))
    assert found.keys() == values.keys() and all(torch.equal(found[name], values[name]) for name in values)


def test_fisher_is_the_mean_of_squared_gradients_item_by_item(tmp_path: Path) -> None:
    complete(tmp_path)
    found = fisher(open_model(str(tmp_path / "base")), tmp_path / "validation.jsonl", causal=True)

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    items = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    name = "model.layers.0.mlp.down_proj.weight"
    squares = torch.zeros_like(model.get_parameter(name))
    for item in items:
        prompt, rest = tokenizer(item["prompt"])["input_ids"], [*tokenizer(item["completion"])["input_ids"], 1]
        labels = torch.tensor([[-100] * len(prompt) + rest])
        model.zero_grad()
        model(torch.tensor([[*prompt, *rest]]), labels=labels).loss.backward()
        squares += model.get_parameter(name).grad.square() / len(items)
    assert torch.allclose(found[name], squares, rtol=1e-4, atol=1e-12)


def test_fisher_of_an_encoder_is_of_a_fitted_head(tmp_path: Path) -> None:
    classify(tmp_path)

    side_init(
        str(tmp_path / "base"), tmp_path / "side", reduction=2, importance="fisher", data=tmp_path / "train.jsonl"
    )
    found = fisher(open_model(str(tmp_path / "base")), tmp_path / "train.jsonl", causal=False)

    assert found["encoder.layer.0.intermediate.dense.weight"].gt(0).any()
    assert json.loads((tmp_path / "side/side.json").read_text())["importance"] == "fisher"


# -- the ladder --------------------------------------------------------------------------------------------


def ladder_on(place: Path, auto: str = "AutoModel", **params: Any) -> tuple[Network, Ladder]:
    """A network with an untrained ladder."""
    model = open_model(str(place))
    network = Network(model, auto, CPU, packed=False)
    kind = kinds.get("ladder")
    attached: Any = kind(Base(model, network, Generator().manual_seed(0)), kind.params(**params))
    return network, attached.ladder.eval()


TOKENS = [[5, 6, 7, 8, 9], [10, 11, 12], [13]]


@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_a_ladder_as_wide_as_its_base_with_closed_gates_is_the_base(family: str, tmp_path: Path) -> None:
    base = write_encoder(tmp_path / "base") if family == "encoder" else write_decoder(tmp_path / "base")
    plain = Network(open_model(str(base)), "AutoModel", CPU)
    network, ladder = ladder_on(base, reduction=1.0)
    ladder.gates.data.fill_(10.0)
    with torch.no_grad():
        for layer in (ladder.first, ladder.up):
            layer.weight.copy_(torch.eye(16))
            layer.bias.zero_()

    ids, mask = network.padded(TOKENS)
    with torch.no_grad():
        own, expected = network.last_states(ids, mask), plain.last_states(ids, mask)

    assert torch.allclose(own[mask > 0], expected[mask > 0], atol=1e-5)


def test_gates_decide_what_of_the_backbone_is_seen(tmp_path: Path) -> None:
    """mu = 1: nothing after the embeddings; mu = 0: the last kept block alone."""
    network, ladder = ladder_on(write_encoder(tmp_path / "base"), reduction=2.0)
    ids, mask = network.padded(TOKENS)
    blocks = list(network.blocks.values())
    first, last = (block.output.dense.weight for block in blocks)
    kept = first.clone()

    def moved(gate: float, weight: Tensor) -> float:
        ladder.gates.data.fill_(gate)
        with torch.no_grad():
            before = network.last_states(ids, mask)
            weight.mul_(1.5)
            after = network.last_states(ids, mask)
            weight.div_(1.5)
        return float((after - before).abs().max())

    assert moved(10.0, first) == moved(10.0, last) == 0
    assert moved(0.0, first) > 1e-3 and moved(0.0, last) > 1e-3
    with torch.no_grad():
        ladder.gates.fill_(-10.0)
        before = network.last_states(ids, mask)
        ladder.first.weight.mul_(2)
        ladder.down[0].weight.mul_(2)
        assert torch.equal(network.last_states(ids, mask), before)
    assert torch.allclose(first, kept)


def test_autograd_keeps_nothing_of_the_backbone(tmp_path: Path) -> None:
    network, ladder = ladder_on(write_encoder(tmp_path / "base"), reduction=4.0)
    ids, mask = network.padded(TOKENS)
    kept: list[int] = []
    steps = ladder.step
    inside = False

    def step(number: int, block: Any, *args: Any) -> Any:
        def seen(*more: Any, **named: Any) -> Any:
            nonlocal inside
            inside = True
            out = block(*more, **named)
            inside = False
            return out

        return steps(number, seen, *args)

    ladder.step = step  # type: ignore[method-assign]

    def pack(tensor: Tensor) -> Tensor:
        kept.append(inside)
        return tensor

    with saved_tensors_hooks(pack, lambda one: one):
        out = network.last_states(ids, mask)
    out.sum().backward()

    assert kept and not any(kept)
    assert not any(one.requires_grad or one.grad is not None for one in network.backbone.encoder.parameters())
    assert all(one.grad is not None for one in ladder.parameters())


@pytest.mark.parametrize("config", [classify, complete])
def test_trained_is_what_its_directory_makes_of_the_base(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    students = []
    kept = once.fit
    monkeypatch.setattr(once, "fit", lambda student, *a, **more: students.append(student) or kept(student, *a, **more))
    rows = {
        "ladder": {"kind": "ladder", "reduction": 2},
        "random": {"kind": "ladder", "start": "random", "reduction": 2},
    }
    loaded = load_config(config(tmp_path, epochs=2, rows={name: {"delta": delta} for name, delta in rows.items()}))

    made = train(loaded, tmp_path / "out", device="cpu")

    task = loaded.rows[0].task
    for one, student in zip(made.runs, students, strict=True):
        reference = one["reference"].replace("OUT", str(tmp_path / "out"))
        network = Network(open_model(reference, to_run=True), task.auto_class, CPU)
        with torch.no_grad():
            student.eval()
            for part, error in (
                ("validation", 1e-4),
                ("test", 1e-5),
            ):  # states of disk, from other batches; computed now
                trained = task.rows(student.network, student.head, part, list(range(12))).logits
                again = task.rows(network, student.head, part, list(range(12))).logits
                assert torch.allclose(trained, again, atol=error, rtol=error)
        assert one["about"]["gates"] != [0.5, 0.5]
        assert not list((tmp_path / "out").rglob("states-*"))
    with pytest.raises(ModelError, match="no weights can hold"):
        open_model(reference)
    with pytest.raises(ModelError, match="not a model"):
        open_model(str(tmp_path / "out/ladder/seed-0"))
    with pytest.raises(ModelError, match="not a model"):
        open_model(str(tmp_path / "out/ladder/seed-0/module.safetensors"))


def test_eval_measures_what_training_did(tmp_path: Path) -> None:
    config = classify(tmp_path, delta={"kind": "ladder", "reduction": 2}, epochs=2)
    made = train(load_config(config), tmp_path / "out", device="cpu")
    place = tmp_path / "out/ladder/seed-0"
    task = {"name": "words", "kind": "text-classification", "data": "test.jsonl", "head": f"{place}/head.safetensors"}
    (tmp_path / "suite.yaml").write_text(json.dumps({"tasks": [task]}))

    found = measure(tmp_path / "suite.yaml", [str(tmp_path / "base"), f"{tmp_path / 'base'}+{place}"], results=None)

    record = found.records[1]
    assert record.value == made.runs[0]["test"]["value"]
    lines = (place / "test-predictions.jsonl").read_text().splitlines()
    assert {name: one.output for name, one in record.predictions.items()} == {
        (line := json.loads(text))["id"]: line["pred"] for text in lines
    }


def test_the_cache_of_a_language_model_has_the_side_networks_too(tmp_path: Path) -> None:
    network, _ = ladder_on(write_decoder(tmp_path / "base"), "AutoModelForCausalLM", reduction=2.0)
    ids = torch.tensor([[3, 4, 5, 6]])

    written = [
        network.module.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cached) for cached in (True, False)
    ]

    assert torch.equal(*written)


def test_bytes_that_autograd_keeps_are_counted(tmp_path: Path) -> None:
    """The states that samplers read, once each, whatever the backbone needed to make them."""
    rows = {"full": {"delta": "full"}, "ladder": {"delta": {"kind": "ladder", "reduction": 2}}}
    config = classify(tmp_path, rows=rows)

    made = train(load_config(config), tmp_path / "out", device="cpu")

    full, ladder = (one["saved_by_autograd"] for one in made.runs)
    assert 0 < ladder < full

    class Owner(torch.nn.Module):
        network = None

    x = torch.ones(3, 5)
    layer = torch.nn.Linear(5, 7)
    owner = Owner()
    owner.add_module("layer", layer)
    with saved_by_autograd(owner) as count:
        layer(x)
        layer(x[:1])
    assert count.bytes == x.nbytes


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"reduction": 0.5}, "--reduction: must be at least 1, got 0.5"),
        ({"reduction": 1000.0}, "reduction: 1000: nothing is left of a width of 16"),
        ({"importance": "gut"}, "--importance: 'gut' is not possible"),
        ({"basis": "own"}, "--basis: 'own' is not possible"),
        ({"importance": "fisher"}, "--data: fisher is computed on items"),
        ({"data": "x.jsonl"}, "--data: only fisher reads items"),
        ({"keep_layers": [0, 2]}, "keep_layers: 2: there is no such layer"),
        ({"keep_layers": [1, 1]}, "keep_layers: the same layer twice"),
    ],
)
def test_settings_that_are_refused(how: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        side_init(str(write_encoder(tmp_path / "base")), tmp_path / "side", **how)

    assert message in str(caught.value) and caught.value.hint
    assert not (tmp_path / "side").exists()


def test_models_that_are_refused(tmp_path: Path) -> None:
    write_encoder(tmp_path / "distil", "distilbert")
    with pytest.raises(ModelError, match="it is of type distilbert"):
        side_init(str(tmp_path / "distil"), tmp_path / "side")
    base = write_encoder(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "encoder.layer.0.extra.weight": torch.ones(2)}, base / "model.safetensors")
    with pytest.raises(ModelError, match=r"'encoder.layer.0.extra.weight' has no place"):
        side_init(str(base), tmp_path / "side")


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        ({"side": "side", "reduction": 2}, "reduction: the side network in"),
        ({"side": "base"}, "no readable side.json"),
        ({"side": "other"}, "it was made from"),
        ({"keep_layers": [7]}, "keep_layers: 7: there is no such layer"),
        ({"start": "random", "basis": "shared"}, "basis: a start at random has none"),
    ],
)
def test_ladders_that_are_refused_before_the_first_step(delta: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = classify(tmp_path)
    side_init(str(tmp_path / "base"), tmp_path / "side", reduction=2)
    side_init(str(write_encoder(tmp_path / "base 2", seed=1)), tmp_path / "other", reduction=2)
    delta = {name: str(tmp_path / one) if name == "side" else one for name, one in delta.items()}

    with pytest.raises(MergebenchError) as caught:
        train(load_config({**config, "delta": {"kind": "ladder", **delta}}), tmp_path / "out", device="cpu")

    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_ladder_begins_as_its_side_directory(tmp_path: Path) -> None:
    base = write_encoder(tmp_path / "base")
    side_init(str(base), tmp_path / "side", reduction=2, basis="shared", keep_layers=[1])

    _, of_directory = ladder_on(base, side=tmp_path / "side")
    _, of_memory = ladder_on(base, reduction=2.0, basis="shared", keep_layers=[1])

    one, other = of_directory.state_dict(), of_memory.state_dict()
    assert of_directory.layers == of_memory.layers == (1,)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_command(tmp_path: Path, cli: Cli) -> None:
    base, side = write_encoder(tmp_path / "base"), tmp_path / "side"
    ran = cli("side", "init", "--base", base, "--reduction", "2", "--keep-layers", "1", "--out", side)
    assert (ran.code, ran.out) == (0, f"{side}\n") and "width 16 -> 8, heads 2 x 8 -> 2 x 4" in ran.err
    code, _, err = cli("side", "init", "--base", base, "--out", side)
    assert code == 2 and "replace it with --overwrite" in err
    ran = cli("side", "init", "--base", base, "--basis", "shared", "--out", side, "--overwrite", "--json")
    assert (ran.code, ran.err) == (0, "") and json.loads(ran.out)["heads"] == "2 x 8 -> 2 x 1"
    again = cli("side", "init", "--base", base, "--basis", "shared", "--out", side, "--resume")
    assert again.code == 0 and "already finished" in again.err
    code, _, err = cli("inspect", f"{base}+{side}")
    assert code == 3


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    config = classify(tmp_path, delta={"kind": "ladder", "reduction": 2, "dropout": 0.1}, epochs=2)
    train(load_config(config), tmp_path / "whole", device="cpu")

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("training") and done == 8:  # of 12; there is a checkpoint after 6
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(load_config(config), tmp_path / "out", device="cpu", progress=stop)
    train(load_config(config), tmp_path / "out", device="cpu", resume=True)

    one, other = (tmp_path / name / "ladder/seed-0/module.safetensors" for name in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()


def test_damaged_files_are_told_in_one_line(tmp_path: Path) -> None:
    config = classify(tmp_path)
    base, side = tmp_path / "base", tmp_path / "side"
    side_init(str(base), side, reduction=2)
    about = json.loads((side / "config.json").read_text())
    (side / "config.json").write_text(json.dumps({**about, "intermediate_size": 7}))
    delta = {"kind": "ladder", "side": str(side)}
    with pytest.raises(ModelError, match="its files do not belong together"):
        train(load_config({**config, "delta": delta}), tmp_path / "out", device="cpu")
    _, made = ladder_on(base, reduction=2.0)
    made.save(tmp_path, "0" * 16)
    module = tmp_path / "module.safetensors"
    opened = open_model(f"{base}+{module}", to_run=True)
    assert "was made on another model" in opened.remarks[0]
    metadata = {"holds": "module", "module": "ladder", "about": "{}"}
    save_file({"first.weight": torch.ones(2, 16)}, module, metadata)
    with pytest.raises(ModelError, match="it is no ladder, or a damaged one"):
        Network(open_model(f"{base}+{module}", to_run=True), "AutoModel", CPU)
    save_file({"first.weight": torch.ones(2, 16)}, module, {**metadata, "module": "rope"})
    with pytest.raises(RecipeError, match="no module of a network is called 'rope'"):
        Network(open_model(f"{base}+{module}", to_run=True), "AutoModel", CPU)


def test_no_room_for_the_states_is_told_before_the_first_step(tmp_path: Path) -> None:
    """What is asked of the disk: the states of every token of train and validation, 4 bytes a number."""
    config = load_config(classify(tmp_path, delta="ladder"))
    model = open_model(str(tmp_path / "base"))
    network = Network(model, "AutoModel", CPU, packed=False)
    kind = kinds.get("ladder")
    attached = kind(Base(model, network, Generator().manual_seed(0)), kind.params(keep_layers=[1]))

    task = config.rows[0].task
    tokens = sum(len(network.tokenize([text], 16)[0]) for text in texts(tmp_path, "train", "validation"))
    assert attached.scratch(task) == tokens * 16 * 4


def texts(folder: Path, *parts: str) -> list[str]:
    return [json.loads(line)["text"] for part in parts for line in (folder / f"{part}.jsonl").read_text().splitlines()]
