"""`mergebench probe fit`, whole: against transformers and scikit-learn by hand, what it keeps, what it refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

import mergebench
from mergebench.checkpoint.content import identity
from mergebench.deltas.open import open_model
from mergebench.editing.probes.classifier import validate
from mergebench.editing.probes.probe import Probe, read_probe
from mergebench.errors import RunError
from mergebench.networks.network import Network
from tests.conftest import Cli
from tests.language import WORDS, some_text, write_decoder, write_rows
from tests.processes import Server

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 70


def write_behaviour(path: Path, count: int = COUNT, seed: int = 0) -> Path:
    """Undesired texts, two of five, say "dog" more often than the others."""
    source = random.Random(seed)
    rows = []
    for number in range(count):
        bad = number % 5 < 2
        often = [source.choice([*WORDS, *["dog"] * 12] if bad else WORDS).strip() for _ in range(source.randint(3, 12))]
        rows.append({"text": f"{seed}.{number} {' '.join(often)} {some_text(source, 3)}", "label": int(bad)})
    return write_rows(path, rows)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_decoder(tmp_path / "m")
    write_behaviour(tmp_path / "d.jsonl")
    return tmp_path


def by_hand(model: str, file: str, layer: int, pool: str = "mean", length: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Features of each text alone, and whether it is undesired."""
    module = transformers.AutoModel.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    found = []
    for row in rows:
        ids = tokenizer(row["text"], truncation=True, max_length=length, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            state = module(input_ids=ids, output_hidden_states=True).hidden_states[layer][0]
        found.append(state.mean(0) if pool == "mean" else state[-1])
    return torch.stack(found).double().numpy(), np.array([row["label"] == 1 for row in rows])


@pytest.mark.parametrize(("layer", "pool", "length"), [(-1, "mean", 100), (1, "last", 20)])
def test_equal_to_a_fit_by_hand(layer: int, pool: str, length: int, place: Path, cli: Cli) -> None:
    done = cli(
        *["probe", "fit", "--model", "m", "--data", "d.jsonl", "--out", "new/p.safetensors", "--layer", layer],
        *["--pool", pool, "--max-length", length, "--json"],
    )
    assert (done.code, done.err) == (0, "")
    said = json.loads(done.out)
    probe = read_probe("new/p.safetensors")

    x, y = by_hand("m", "d.jsonl", layer, pool, length)
    known, asked = train_test_split(np.arange(COUNT), test_size=0.2, stratify=y, random_state=0)
    scale = np.median(x[known].std(0))
    hand = LogisticRegression(C=said["C"] / scale**2, tol=1e-10, max_iter=100_000).fit(x[known], y[known])
    logits = hand.decision_function(x)
    found = probe.logit(torch.from_numpy(x).float()).numpy()
    assert np.allclose(found, logits, atol=2e-3 * np.abs(logits).max())
    assert torch.equal(probe.weight[0], -probe.weight[1])
    assert probe.bias[0] == -probe.bias[1]
    difference = x[known][y[known]].mean(0) - x[known][~y[known]].mean(0)
    assert np.allclose(probe.mean_diff, difference, atol=1e-5)

    assert dict(probe.about).items() <= said.items()
    assert (said["layer"], said["depth"], said["norm"], said["pool"]) == (layer % 3, 2, "post", pool)
    assert (said["classes"], said["max_length"]) == (["0", "1"], length)
    assert (said["n_train"], said["n_test"]) == (56, 14)
    assert said["train_accuracy"] == np.mean((logits > 0)[known] == y[known])
    assert said["test_accuracy"] == np.mean((logits > 0)[asked] == y[asked])
    assert said["majority"] == max(y[asked].mean(), 1 - y[asked].mean())
    known.sort()
    validated = validate(x[known].astype(np.float32), y[known], 0)
    assert (said["C"], said["cv_accuracy"]) == (validated.strength, pytest.approx(validated.accuracy))
    assert said["auc"] == pytest.approx(roc_auc_score(y[asked], logits[asked]))
    assert said["model"] == {"reference": "m", "identity": identity(open_model("m"))}
    assert said["sha256"] == probe.sha256


def test_all_layers_and_their_plot(place: Path, cli: Cli) -> None:
    """The best by cross-validation is written, as if it had been asked for."""
    fit = ["probe", "fit", "--model", "m", "--data", "d.jsonl", "--norm", "pre"]
    done = cli(*fit, "--out", "all.safetensors", "--layer", "all")
    assert done.code == 0, done.err
    assert done.err == "wrote all.safetensors and all.png\n"
    best = read_probe("all.safetensors")
    layers = best.about["layers"]
    assert [one["layer"] for one in layers] == [0, 1, 2]
    accuracies = [one["cv_accuracy"] for one in layers]
    assert accuracies.index(max(accuracies)) == best.about["layer"]
    assert [line.split()[0] for line in done.out.splitlines()[1:4]] == ["0", "1", "2"]
    assert [line.endswith("<") for line in done.out.splitlines()[1:4]] == [n == best.about["layer"] for n in range(3)]
    for one in layers:
        assert cli(*fit, "--out", "one.safetensors", "--layer", one["layer"], "--overwrite", "-q").code == 0
        alone = read_probe("one.safetensors")
        assert {key: alone.about[key] for key in ("cv_accuracy", "cv_stderr", "C")}.items() <= one.items()
        assert torch.equal(alone.weight, best.weight) == (one["layer"] == best.about["layer"])
    assert Path("all.png").read_bytes().startswith(b"\x89PNG")


def test_equals_go_to_the_earlier_layer(place: Path) -> None:
    """A block that adds nothing: layer 1 is layer 0 again."""
    tensors = load_file("m/model.safetensors")
    for name in tensors:
        if "layers.0" in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, "m/model.safetensors", {"format": "pt"})
    probe = mergebench.fit_probe("m", "d.jsonl", "p.safetensors", layer="all", norm="pre")
    first, second, third = probe.about["layers"]
    assert first.items() - {("layer", 0)} == second.items() - {("layer", 1)}
    assert probe.about["layer"] == (0 if first["cv_accuracy"] >= third["cv_accuracy"] else 2)
    assert first["cv_accuracy"] >= third["cv_accuracy"], "the seed must make the tie the best"


def test_a_test_file(place: Path, cli: Cli) -> None:
    write_behaviour(place / "t.jsonl", 30, seed=1)
    fit = ["probe", "fit", "--model", "m", "--data", "d.jsonl", "--out", "p.safetensors", "--test"]
    done = cli(*fit, "t.jsonl", "--json")
    said = json.loads(done.out)
    assert (said["n_train"], said["n_test"], list(said["data"])) == (COUNT, 30, ["d.jsonl", "t.jsonl"])
    probe = read_probe("p.safetensors")
    x, y = by_hand("m", "t.jsonl", -1)
    right = (probe.logit(torch.from_numpy(x).float()) > 0).numpy() == y
    assert said["test_accuracy"] == right.mean()
    with open("t.jsonl", "a") as file:
        file.write(Path("d.jsonl").read_text().splitlines()[4])
    wrong = cli(*fit, "t.jsonl", "--overwrite")
    assert (wrong.code, wrong.out) == (1, "")
    assert wrong.err.splitlines()[0] == "error: t.jsonl:31: the same text is in d.jsonl:5"


def test_a_model_runs_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is the same as what is read anew: the probe's bytes are; other texts and pools are read anew."""
    built: list[str] = []
    build = Network.__init__
    monkeypatch.setattr(Network, "__init__", lambda self, *args: built.append("") or build(self, *args))

    def fit(results: str | None = "results", **how: Any) -> Probe:
        return mergebench.fit_probe("m", "d.jsonl", "p.safetensors", results=results, overwrite=True, **how)

    one = fit()
    assert len(built) == 1
    assert fit().sha256 == one.sha256
    assert fit(layer=0).sha256 != fit(layer="all").sha256
    assert len(built) == 1
    assert fit(results=None).sha256 == one.sha256
    assert len(built) == 2
    fit(pool="last")
    fit(max_length=5)
    assert len(built) == 4
    write_behaviour(place / "d.jsonl", 40, seed=2)
    fit()
    assert len(built) == 5
    (folder,) = [found for found in Path("results/features").iterdir() if np.load(found / "0.npy").shape[0] == 40]
    assert sorted(path.name for path in folder.iterdir()) == ["0.npy", "1.npy", "2.npy", "pre.npy"]
    (folder / "1.npy").write_bytes((folder / "1.npy").read_bytes()[:-1])  # damaged: made anew
    fit()
    assert len(built) == 6
    tensors = load_file("m/model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, "m/model.safetensors", {"format": "pt"})
    fit()
    assert len(built) == 7


def test_features_belong_to_tokens(place: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files read by another tokenizer are other texts to the model; a note says whose tokens they are."""
    with open("d.jsonl", "a") as file:
        file.write(json.dumps({"text": "cafe\u0301 dog", "label": 0}) + "\n")  # whose accent that class joins to the e
    named = Path("m/tokenizer_config.json")
    named.write_text(json.dumps(json.loads(named.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}))
    fit = ["probe", "fit", "--model", "m", "--data", "d.jsonl", "--out", "p.safetensors", "--overwrite"]
    with monkeypatch.context() as patched:
        its_class = transformers.AutoTokenizer.from_pretrained
        patched.setattr("mergebench.networks.tokenizer.load", lambda place, name: (its_class(place), None))
        patched.setattr("mergebench.networks.network.load_tokenizer", lambda place, name: (its_class(place), None))
        assert "note:" not in cli(*fit).err
    done = cli(*fit)
    kept = cli(*fit)  # from the folder
    note = "note: m: transformers' Qwen2Tokenizer gives other tokens than tokenizer.json; the file is used\n"
    assert done.err.startswith(note) and kept.err.startswith(note)
    assert len(list(Path("results/features").iterdir())) == 2
    assert (
        read_probe("p.safetensors").sha256 == mergebench.fit_probe("m", "d.jsonl", "q.safetensors", results=None).sha256
    )


def test_threads_and_batches_do_not_matter(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = mergebench.fit_probe("m", "d.jsonl", "a.safetensors", results=None)
    torch.set_num_threads(3)
    assert mergebench.fit_probe("m", "d.jsonl", "b.safetensors", results=None).sha256 == first.sha256
    monkeypatch.setattr("mergebench.networks.features.CPU_TOKENS", 150)
    other = mergebench.fit_probe("m", "d.jsonl", "c.safetensors", results=None)
    assert torch.allclose(other.weight, first.weight, rtol=1e-2, atol=1e-4)


def test_killed_and_run_again(place: Path, server: Server) -> None:
    """After kill -9 in the middle nothing half is taken for whole, and the next run gives what one run gives."""
    fit = ["probe", "fit", "--model", "m", "--data", "d.jsonl", "--out", "p.safetensors", "--json"]
    wanted = mergebench.fit_probe("m", "d.jsonl", "wanted.safetensors", results=None)
    assert server.run(*fit, folder=place, die_at=31)[0] < 0
    (left,) = Path("results/features").iterdir()
    assert left.name.endswith(".partial")
    assert len(list(left.glob("*.npy"))) > 1
    assert not Path("p.safetensors").exists()
    found = mergebench.fit_probe("m", "d.jsonl", "p.safetensors", results="results")
    assert found.sha256 == wanted.sha256
    (kept,) = Path("results/features").iterdir()
    assert left.name == f".{kept.name}.partial"


def test_a_probe_that_learns_nothing_is_said(place: Path, cli: Cli) -> None:
    source = random.Random(6)
    rows = ({"text": f"{n} {some_text(source, 9)}", "label": source.randrange(2)} for n in range(200))
    write_rows(place / "d.jsonl", rows)
    done = cli("probe", "fit", "m", "--data", "d.jsonl", "--out", "p.safetensors", "--layer", "0")
    assert done.code == 0
    assert done.err.startswith("warning: the probe is no better than the majority: ")
    assert read_probe("p.safetensors").doubt() is not None


@pytest.mark.parametrize(
    ("options", "code", "message", "hint"),
    [
        (["--layer", "3"], 2, "layer 3: the model has 2 blocks", "0 (the embeddings) to 2, or -1 (the last) to -3"),
        (
            ["--layer", "x"],
            2,
            "--layer: must be a whole number or all, got 'x'",
            "0 (embeddings) to the number of blocks",
        ),
        (
            ["--norm", "no"],
            2,
            "--norm: must be one of post, pre, got 'no'",
            "the last layer, after the final norm or before",
        ),
        (["--pool", "cls"], 2, "--pool: must be one of mean, last, got 'cls'", "the mean over a text's tokens"),
        (["--out", "p"], 2, "--out: 'p' is no place for a probe", "a probe is a file: NAME.safetensors"),
        (["--out", "old.safetensors"], 2, "old.safetensors: it exists", "replace it with --overwrite, or choose"),
        (["--out", "o.safetensors", "--layer", "all"], 2, "o.png: it exists", "replace it with --overwrite"),
        (["--out", "d.jsonl/p.safetensors"], 1, "d.jsonl/p.safetensors: cannot be written: File exists", ""),
        (["--data", "few.jsonl"], 1, "few.jsonl: 8 texts of class '1'", "a probe needs at least 10 of each class"),
        (["--data", "few.jsonl", "--test", "d.jsonl"], 1, "few.jsonl: 8 texts of class '1'", "a probe needs at least"),
        (["--data", "none.jsonl"], 1, "none.jsonl: cannot be read: No such file or directory", ""),
        (["--undesired", "x"], 2, "d.jsonl: no label is 'x'", "known: 0, 1"),
        (["--model", "none"], 3, "model 'none': no such file or directory", ""),
    ],
)
def test_what_is_refused(options: list[str], code: int, message: str, hint: str, place: Path, cli: Cli) -> None:
    """In one line, before the model runs, and nothing is written."""
    write_behaviour(place / "few.jsonl", 20)
    Path("old.safetensors").write_text("x")
    Path("o.png").write_text("x")
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    model = ["m"] if "--model" not in options else []
    done = cli("probe", "fit", *model, "--data", "d.jsonl", "--out", "p.safetensors", *options)
    assert (done.code, done.out) == (code, "")
    lines = done.err.splitlines()
    assert lines[0] == f"error: {message}"
    assert len(lines) <= 2
    assert "".join(lines[1:]).startswith(f"hint: {hint}" if hint else "")
    after = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    kept = {place / "results", place / "results/hashes.json"}
    assert {path for path in after if after[path] != before.get(path)} - kept <= {place}


def test_a_model_that_is_not_finite_leaves_nothing(place: Path) -> None:
    tensors = load_file("m/model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, "m/model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match="its outputs are not finite"):
        mergebench.fit_probe("m", "d.jsonl", "p.safetensors", results="results")
    assert list(Path("results/features").iterdir()) == []
    assert not Path("p.safetensors").exists()
