"""The command line: what goes to stdout, what to stderr, and that the numbers are right."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SINGLE, fine_tuned, names, read_model, tiny_tensors, write_model, write_recipe
from safetensors.torch import save_file
from torch import Tensor

import mergebench
from mergebench.checkpoint import read_header
from mergebench.cli import output
from mergebench.cli.options import parse_size
from mergebench.cli.output import byte_bar
from mergebench.errors import RecipeError, human
from tests.conftest import Cli

Tensors = dict[str, Tensor]
FLOATS = 11 * 8 + 8 * 8 + 8 + 8 * 8 + 8 + 3  # elements of tiny_tensors
STEPS = 5 * 8  # bytes of its integers


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tensors:
    """base (float32), ft1 (bfloat16), ft2 (float32) and a TIES recipe in the working directory."""
    monkeypatch.chdir(tmp_path)
    tensors = tiny_tensors()
    write_model(Path("base"), tensors)
    write_model(Path("ft1"), {n: v.bfloat16() if n != "steps" else v for n, v in fine_tuned(tensors, 1).items()})
    write_model(Path("ft2"), fine_tuned(tensors, 2), shards=2)
    recipe("ties", parameters={"density": 0.5})
    return tensors


def recipe(method: str, models: Any = ("ft1", "ft2"), base: str | None = "base", **more: Any) -> None:
    write_recipe(Path("recipe.yaml"), method, models, base, **more)


def document(text: str) -> Any:
    """The one JSON document that a text is, by the standard's rules (no NaN, no Infinity)."""
    assert text.endswith("\n") and text.count("\n") == 1
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def adapter(directory: Path, module: str = "layers.0", rank: int = 2) -> None:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 4}))
    factors = {f"{module}.lora_A.weight": torch.ones(rank, 8), f"{module}.lora_B.weight": torch.ones(8, rank)}
    save_file(factors, directory / "adapter_model.safetensors")


# -- start-up ----------------------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "numpy", "safetensors", "huggingface_hub", "ruamel", "rich.progress")


@pytest.mark.parametrize("what", ["import mergebench", "import mergebench.cli", "help", "version", "edit help"])
def test_nothing_heavy_is_imported(what: str) -> None:
    """The price of --help; commands import what they need when they run."""
    words = ["mergebench", *what.split()[:-1], f"--{what.split()[-1]}"]
    code = what if what.startswith("import") else f"import sys; sys.argv = {words!r}; main()"
    program = f"""
import sys
try:
    {"from mergebench.cli import main" if "main" in code else "pass"}
    {code}
except SystemExit as end:
    assert not end.code
loaded = [name for name in {HEAVY!r} if name in sys.modules]
sys.exit(f"loaded: {{loaded}}" if loaded else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_and_version(shell: Cli) -> None:
    code, out, err = shell("--help")
    assert (code, err) == (0, "")
    for command in ("merge", "plan", "explain", "adapters", "task-vector", "inspect", "diff", "methods", "doctor"):
        assert command in out
    assert shell("-h").out == out
    assert shell("--version") == (0, f"mergebench {mergebench.__version__}\n", "")


@pytest.mark.parametrize(
    "args, says",
    [
        (["merg"], "Did you mean 'merge'?"),
        (["merge"], "RECIPE"),
        (["merge", "recipe.yaml", "--workers", "0"], "--workers"),
        (["merge", "recipe.yaml", "--workers", "many"], "--workers"),
        (["merge", "recipe.yaml", "--densty", "1"], "--densty"),
        (["inspect"], "MODEL"),
        (["task-vector", "ft1"], "--base"),
        (["edit"], "MODEL"),
        (["adapters", "merge", "a"], "--out"),
        (["adapters", "merg"], "Did you mean 'merge'?"),
    ],
)
def test_usage(cli: Cli, args: list[str], says: str) -> None:
    code, out, err = cli(*args)
    assert (code, out) == (2, "")
    assert says in err and "Traceback" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_stdout_that_cannot_be_written(base: Tensors) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mergebench", "inspect", "base"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert done.stderr == b"error: No space left on device\n"


# -- merge -------------------------------------------------------------------------------------------


def test_stdout_is_the_result(base: Tensors, cli: Cli) -> None:
    code, out, err = cli("merge", "recipe.yaml", "--out", "out")
    assert (code, out) == (0, "out\n")
    assert re.fullmatch(
        r"ties: 2 models, 0\.0 M elements, 1 sweep, [\d.]+ kB to read\n"
        r"kept at or above the thresholds: ft1 4\d\.\d\d%, ft2 4\d\.\d\d%\n"
        r"wrote out in \d+\.\d s, peak memory \d+ MB\n"
        r"to publish it: hf repos create out\n {15}hf upload out out\n",
        err,
    )


def test_quiet(base: Tensors, cli: Cli) -> None:
    recipe("ties", parameters={"density": 0.5, "int8_mask": True})
    assert cli("merge", "recipe.yaml", "--out", "out", "-q") == (0, "out\n", "")
    assert cli("merge", "recipe.yaml", "--out", "again", "--quiet") == (0, "again\n", "")


def test_notes(base: Tensors, cli: Cli) -> None:
    """What mergekit users write from habit is passed over, with a line that says so."""
    recipe("ties", parameters={"density": 0.5, "int8_mask": True})
    for args in (["merge", "recipe.yaml", "--out", "out"], ["plan", "recipe.yaml"]):
        code, _, err = cli(*args)
        assert code == 0
        assert err.splitlines()[0] == "note: recipe.yaml:14:3: int8_mask: ignored, 'ties' does not take it"


def test_merge_as_json(base: Tensors, cli: Cli) -> None:
    code, out, err = cli("merge", "recipe.yaml", "--out", "out", "--json")
    assert (code, err) == (0, "")
    found = document(out)
    assert found.pop("out") == "out"
    assert found == json.loads(Path("out/mergebench.json").read_text())
    assert found["recipe"]["parameters"]["density"] == 0.5
    again = document(cli("merge", "recipe.yaml", "--out", "out", "--json", "--resume").out)
    assert again.pop("out") == "out" and again == found


def test_provenance(base: Tensors, cli: Cli) -> None:
    """Every input file with size, time and the hash of its header; with --hash, of all of it."""
    adapter(Path("lora"))
    recipe("ties", ["ft1", "ft2", "base+lora"], parameters={"density": 0.5})
    assert cli("merge", "recipe.yaml", "--out", "out", "-q", "--hash", "--sync").code == 0
    found = json.loads(Path("out/mergebench.json").read_text())
    parts = [f"ft2/model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    files = [f"base/{SINGLE}", f"ft1/{SINGLE}", *parts, "lora/adapter_model.safetensors"]
    assert [entry["file"] for entry in found["inputs"]] == files
    for entry in found["inputs"]:
        file = Path(entry["file"])
        assert entry["size"] == file.stat().st_size
        assert entry["mtime_ns"] == file.stat().st_mtime_ns
        assert entry["header_sha256"] == read_header(file).sha256
        assert entry["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found["mergebench"] == mergebench.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert (found["merged_tensors"], found["copied_tensors"]) == (6, 1)
    assert found["answers"].keys() == {name for name in base if name != "steps"}
    without = document(cli("merge", "recipe.yaml", "--out", "again", "--json").out)
    assert all("sha256" not in entry for entry in without["inputs"])


def test_the_recipe_in_the_provenance_makes_it_again(base: Tensors, cli: Cli) -> None:
    recipe("dare_ties", parameters={"density": 0.5})
    assert cli("merge", "recipe.yaml", "--out", "out", "-q", "--seed", "7", "--set", "dtype=bfloat16").code == 0
    again = mergebench.load(json.loads(Path("out/mergebench.json").read_text())["recipe"])
    mergebench.run(mergebench.plan(again), "again")
    assert Path("again", SINGLE).read_bytes() == Path("out", SINGLE).read_bytes()
    assert {value.dtype for name, value in read_model(Path("out")).items() if name != "steps"} == {torch.bfloat16}
    assert cli("merge", "recipe.yaml", "--out", "other", "-q", "--seed", "8", "--set", "dtype=bfloat16").code == 0
    assert Path("other", SINGLE).read_bytes() != Path("out", SINGLE).read_bytes()


def test_the_card(base: Tensors, cli: Cli) -> None:
    """README.md says what was merged, and holds a recipe that makes it again from the result's directory."""
    assert cli("merge", "recipe.yaml", "--out", "out", "-q").code == 0
    card = Path("out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# out: ties merge of 2 models\n" in card and "`ties` (arXiv:2306.01708)" in card
    for line in ("- base: `base`", "- model: `ft1`", "- model: `ft2`"):
        assert line in card
    (text,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    Path("out/from-card.yaml").write_text(text)
    assert cli("merge", "out/from-card.yaml", "--out", "again", "-q").code == 0
    assert Path("again", SINGLE).read_bytes() == Path("out", SINGLE).read_bytes()


def test_workers_and_memory_do_not_change_the_bits(base: Tensors, cli: Cli) -> None:
    for number, args in enumerate((["--workers", "1"], ["--workers", "3", "--memory", "100MiB"])):
        assert cli("merge", "recipe.yaml", "--out", f"out{number}", "-q", *args).code == 0
    assert Path("out0", SINGLE).read_bytes() == Path("out1", SINGLE).read_bytes()


# -- progress ----------------------------------------------------------------------------------------


def test_plain_lines_where_there_is_no_terminal(
    base: Tensors, cli: Cli, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "EVERY", 0.0)
    _, out, err = cli("merge", "recipe.yaml", "--out", "out")
    lines = err.splitlines()[1:-4]
    assert out == "out\n" and lines
    total = document(cli("plan", "recipe.yaml", "--json").out)["bytes_read"]
    for line in lines:
        assert re.fullmatch(r"merging: \d+% of [\d.]+ kB, \d+\.\d\d GB/s(, \d+ s left)?", line)
        assert human(total) in line
    shares = [int(re.findall(r"(\d+)%", line)[0]) for line in lines]
    assert shares == sorted(shares)
    assert shares[-1] == 100


def test_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One each ten seconds, with the speed since the start; nothing read yet is no error."""
    clock = [100.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: clock[0])
    with byte_bar("reading", 4_000_000_000, quiet=False) as advance:
        for seconds, done in ((9, 0), (2, 0), (5, 10**9), (4, 0), (1, 10**9), (9, 10**9)):
            clock[0] += seconds
            advance(done)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 0% of 4 GB, 0.00 GB/s",
        "reading: 50% of 4 GB, 0.10 GB/s, 21 s left",
    ]


def test_no_bar_when_quiet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "EVERY", 0.0)
    with byte_bar("reading", 10, quiet=True) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_what_takes_time(base: Tensors) -> None:
    """Torch being imported, then a bar; and stdout still holds the result alone."""
    ours, theirs = pty.openpty()
    program = "from mergebench.cli import command, lazy; lazy.AFTER = 0; command()"
    command = [sys.executable, "-c", program, "merge", "recipe.yaml", "--out", "out"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=True)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # all has been read, and the other end is closed
            break
    os.close(ours)
    assert done.stdout == b"out\n"
    assert shown.startswith(b"loading torch\r\x1b[K")  # which goes before anything else is said
    assert b"\x1b[" in shown and b"merging" in shown and b"wrote out" in shown


# -- plan --------------------------------------------------------------------------------------------

BASE, FT1, FT2 = FLOATS * 4, FLOATS * 2, FLOATS * 4  # bytes of their floats
LORA = 2 * 16 * 4  # bytes of an adapter's factors


@pytest.mark.parametrize(
    "method, more, passes, sweeps, read",
    [
        ("linear", {"base": None}, 0, 1, FT1 + FT2 + STEPS),
        ("linear", {}, 0, 1, FT1 + FT2 + STEPS),  # a base that is not listed is not read
        ("linear", {"models": ["base", "ft1"]}, 0, 1, BASE + FT1 + STEPS),
        ("slerp", {"base": None, "parameters": {"t": 0.5}}, 1, 1, FT1 + FT2 + STEPS),  # of one tile: asked in passing
        ("task_arithmetic", {}, 0, 1, BASE + FT1 + FT2 + STEPS),
        ("ties", {"parameters": {"density": 0.5}}, 1, 1, BASE + FT1 + FT2 + STEPS),
        ("ties", {"parameters": {"density": 1}}, 0, 1, BASE + FT1 + FT2 + STEPS),
        ("pcb", {}, 2, 3, 3 * (BASE + FT1 + FT2) + STEPS),
        ("pcb", {"models": ["base+lora", "ft1"]}, 2, 3, 3 * (BASE + FT1 + LORA) + STEPS),
        ("task_arithmetic", {"models": ["base+lora"]}, 0, 1, BASE + LORA + STEPS),
        ("pcb", {"models": ["base+lora"]}, 2, 3, BASE + 3 * LORA + STEPS),  # of a low-rank difference, its factors
        ("task_arithmetic", {"exclude": ["layers.*"]}, 0, 1, BASE + (FT1 + FT2) * 91 // FLOATS + STEPS),
    ],
)
def test_the_numbers_of_a_plan(
    base: Tensors, cli: Cli, method: str, more: dict[str, Any], passes: int, sweeps: int, read: int
) -> None:
    adapter(Path("lora"))
    recipe(method, **more)
    code, out, err = cli("plan", "recipe.yaml", "--json")
    assert (code, err) == (0, "")
    found = document(out)
    excluded = "exclude" in more
    size = FLOATS * (2 if method in ("linear", "slerp") and "models" not in more and "base" in more else 4) + STEPS
    assert found["method"] == method
    assert (found["sweeps"], found["passes"]) == (sweeps, passes)
    assert (found["merged_tensors"], found["copied_tensors"]) == ((2, 5) if excluded else (6, 1))
    assert found["elements"] == (91 if excluded else FLOATS)
    assert found["bytes_read"] == read
    assert found["bytes_written"] == size
    assert found["files"] == [SINGLE]
    assert not Path("merged").exists()
    assert cli("merge", "recipe.yaml", "--out", "out", "-q").code == 0
    done = json.loads(Path("out/mergebench.json").read_text())
    assert (done["bytes_read"], done["bytes_written"], done["sweeps"]) == (read, size, sweeps)
    assert Path("out", SINGLE).stat().st_size - read_header(Path("out", SINGLE)).tensors[0].offset == size


def test_the_stored_type_in_a_plan(base: Tensors, cli: Cli) -> None:
    found = document(cli("plan", "recipe.yaml", "--json", "--set", "dtype=float16", "--shard-size", "250").out)
    assert found["bytes_written"] == FLOATS * 2 + STEPS
    assert len(found["files"]) == 3
    assert cli("merge", "recipe.yaml", "--out", "out", "-q", "--set", "dtype=float16", "--shard-size", "250").code == 0
    assert [path.name for path in sorted(Path("out").glob("*.safetensors"))] == found["files"]


def test_progress_adds_up_to_the_plan(base: Tensors) -> None:
    """What the bar is told, over all threads and sweeps, is what the plan said."""
    adapter(Path("lora"))
    for method in ("linear", "ties", "pcb"):
        recipe(method, ["ft1", "base+lora"], parameters={"density": 0.5} if method == "ties" else {})
        plan = mergebench.plan(mergebench.load("recipe.yaml"))
        seen: list[int] = []
        mergebench.run(plan, f"out-{method}", progress=seen.append)
        assert sum(seen) == plan.bytes_read


def test_plan_in_words(base: Tensors, cli: Cli) -> None:
    code, out, err = cli("plan", "recipe.yaml", "--workers", "2")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "ties (arXiv:2306.01708), scope tensor"
    words = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines()[1:]}
    assert words["base"] == "base" and words["model"] == "ft2"
    assert words["merged"] == "6 tensors, 0.00 M elements"
    assert words["copied"] == "1 tensor from the base"
    assert words["passes"] == "1 question, 1 sweep"
    assert words["read"] == f"{(BASE + FT1 + FT2 + STEPS) / 1000:.3g} kB"
    assert words["write"] == f"{BASE + STEPS} B in 1 file to merged/recipe"
    assert words["disk"].endswith("GB free; staged in merged/.recipe.partial")
    assert re.fullmatch(r"[\d.]+ MB of 400 MB, plus about 300 MB for torch", words["memory"])
    assert words["workers"] == "2 on cpu" or torch.cuda.is_available()


def test_plan_tells_where_a_task_vector_is_zero(base: Tensors, cli: Cli) -> None:
    adapter(Path("lora"))
    recipe("task_arithmetic", ["base+lora", "ft2"])
    share = 1 - 64 / FLOATS
    assert document(cli("plan", "recipe.yaml", "--json").out)["zero_share"] == [pytest.approx(share), 0.0]
    out = cli("plan", "recipe.yaml").out
    assert f"base+lora  {share:.1%} of the elements are unchanged" in out


def test_plan_lists_every_mismatch(base: Tensors, cli: Cli) -> None:
    other = fine_tuned(base, 1) | {"extra.weight": torch.zeros(2), "norm.weight": torch.zeros(3).long()}
    other["embed.weight"] = torch.zeros(12, 8)
    del other["layers.0.bias"]
    write_model(Path("ft1"), other)
    code, out, err = cli("plan", "recipe.yaml")
    assert (code, out) == (3, "")
    assert err.splitlines() == [
        "embed.weight: ft1 has [12, 8], base has [11, 8]",
        "extra.weight: ft1 has [2], base does not have it",
        "layers.0.bias: ft1 does not have it, base has [8]",
        "norm.weight: ft1 has I64, base has F32",
        "error: 4 mismatches",
        "hint: only models of one architecture merge; exclude the tensor to copy the base's",
    ]
    code, out, err = cli("merge", "recipe.yaml", "-q")
    assert (code, out) == (3, "")
    assert err.splitlines()[0] == (
        "error: embed.weight: ft1 has [12, 8], base has [11, 8] (and 3 more: see mergebench plan)"
    )


# -- inspect, diff, methods --------------------------------------------------------------------------


def test_inspect(base: Tensors, cli: Cli) -> None:
    adapter(Path("lora"))
    code, out, err = cli("inspect", "ft2+lora")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert ["tensor", "dtype", "shape"] in lines
    assert ["embed.weight", "F32", "11", "x", "8"] in lines
    assert ["layers.0.weight", "F32", "8", "x", "8", "+", "low_rank", "rank", "2"] in lines
    assert out.splitlines()[0] == (
        f"LlamaForCausalLM: 7 tensors, 0.00 M elements, {BASE + STEPS} B in 2 files, 1 changed by lora"
    )
    found = document(cli("inspect", "ft2+lora", "--json").out)
    assert (found["model"], found["architecture"]) == ("ft2+lora", "LlamaForCausalLM")
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert tensors.keys() == base.keys()
    assert tensors["layers.0.weight"] == {
        "name": "layers.0.weight", "dtype": "F32", "shape": [8, 8], "bytes": 256, "deltas": ["low_rank rank 2"],
        "file": "model-00002-of-00002.safetensors",
    }  # fmt: skip


def test_experts_that_are_alike_are_one_row(base: Tensors, cli: Cli) -> None:
    names = [f"model.layers.{layer}.moe.experts.{n}.{w}.weight" for layer in (0, 1) for n in range(3) for w in "ab"]
    odd = {"model.layers.1.moe.experts.3.a.weight": torch.ones(2, 3)}
    write_model(Path("model"), {name: torch.ones(2, 3) for name in names} | odd)
    rows = [line.split()[0] for line in cli("inspect", "model").out.splitlines()[3:]]
    assert rows == [
        "model.layers.0.moe.experts.[0-2].a.weight",
        "model.layers.[0-1].moe.experts.[0-2].b.weight",
        "model.layers.1.moe.experts.[0-3].a.weight",
    ]
    assert len(cli("inspect", "model", "--tensors").out.splitlines()) == len(names) + len(odd) + 3


def test_layers_that_are_alike_are_one_row(base: Tensors, cli: Cli) -> None:
    like = {f"layers.{layer}.{what}.weight": torch.ones(2, 3) for layer in (0, 1, 2, 4) for what in ("a", "b")}
    odd = {"layers.3.a.weight": torch.ones(2, 4), "layers.2.c.weight": torch.ones(1), "norm.weight": torch.ones(3)}
    sizes = {"num_hidden_layers": 5, "text_config": {"hidden_size": 3}}
    write_model(Path("model"), like | odd, config={"architectures": ["Some"], **sizes})
    out = cli("inspect", "model").out.splitlines()
    assert out[:2] == ["Some: 11 tensors, 0.00 M elements, 240 B in 1 file", "layers 5, width 3"]
    shown = {line.split()[0] for line in out[4:]}
    assert shown == {
        "layers.[0-2,4].a.weight",
        "layers.[0-2,4].b.weight",
        "layers.3.a.weight",
        "layers.2.c.weight",
        "norm.weight",
    }
    whole = cli("inspect", "model", "--tensors").out.splitlines()
    assert {line.split()[0] for line in whole[4:]} == like.keys() | odd.keys()
    found = json.loads(cli("inspect", "model", "--json").out)
    assert (found["layers"], found["width"], len(found["tensors"])) == (5, 3, 11)


def test_names_are_shown_as_they_are(base: Tensors, cli: Cli) -> None:
    """Brackets and colons in a name are no markup."""
    odd = {"a[red]b.weight": torch.ones(2), ":smile:.weight": torch.ones(2)}
    write_model(Path("odd"), odd)
    write_model(Path("moved"), {name: 2 * values for name, values in odd.items()})
    for command in (["inspect", "odd"], ["diff", "odd", "moved"]):
        out = cli(*command).out
        for name in odd:
            assert f"{name} " in out


def test_diff_by_hand(base: Tensors, cli: Cli) -> None:
    a = {"same": torch.ones(3), "moved": torch.tensor([3.0, 4, 0, 0]), "zero": torch.zeros(2), "n": torch.arange(3)}
    b = {"same": torch.ones(3), "moved": torch.tensor([3.0, 0, 0, 4]), "zero": torch.ones(2), "n": torch.ones(3).long()}
    origin = {"same": torch.zeros(3), "moved": torch.tensor([4.0, 2, 0, 1]), "zero": torch.zeros(2), "n": a["n"]}
    for name, tensors in (("a", a), ("b", b), ("origin", origin)):
        write_model(Path(name), tensors)
    rows = {row.pop("tensor"): row for row in document(cli("diff", "a", "b", "--json").out)["tensors"]}
    equal = {"norm_ratio": 1, "cosine": 1, "relative_distance": 0, "changed": 0, "sign_conflict": 0}
    assert rows["same"] == pytest.approx(equal)
    assert rows["moved"] == pytest.approx(
        {"norm_ratio": 1, "cosine": 9 / 25, "relative_distance": 32**0.5 / 5, "changed": 0.5, "sign_conflict": 0}
    )
    infinite = {"norm_ratio": None, "cosine": 0, "relative_distance": None, "changed": 1, "sign_conflict": 0}
    assert rows["zero"] == infinite
    assert rows.keys() == {"same", "moved", "zero"}  # integers are not compared
    rows = {
        row.pop("tensor"): row for row in document(cli("diff", "a", "b", "--base", "origin", "--json").out)["tensors"]
    }
    # task vectors of `moved`: [-1, 2, 0, -1] and [-1, -2, 0, 3]
    assert rows["moved"] == pytest.approx(
        {
            "norm_ratio": (14 / 6) ** 0.5,
            "cosine": -6 / (6 * 14) ** 0.5,
            "relative_distance": (32 / 6) ** 0.5,
            "changed": 0.5,
            "sign_conflict": 2 / 3,
        }
    )


def test_diff_in_words(base: Tensors, cli: Cli) -> None:
    code, out, err = cli("diff", "base", "ft2", "--top", "2")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 5 and "sign conflict" not in lines[0]
    assert lines[3].split()[0] == "all" and len({len(line) for line in lines[:4]}) == 1  # numbers end where titles do
    assert lines[-1] == "6 tensors, 0 equal; the 2 most changed are shown"
    assert len(cli("diff", "base", "ft2", "--top", "0", "--base", "ft1").out.splitlines()) == 9
    code, out, err = cli("diff", "base", "ft2", "--top", "2", "--format", "csv")
    assert out.splitlines()[0] == "tensor,|B|/|A|,cosine,|B-A|/|A|,changed" and len(out.splitlines()) == 4
    assert code == 0 and err.endswith("the 2 most changed are shown\n")
    assert "sign conflict" in cli("diff", "base", "ft2", "--base", "ft1").out
    assert cli("diff", "base", "base").out == "6 tensors, all equal\n"


def test_diff_of_models_that_do_not_fit(base: Tensors, cli: Cli) -> None:
    """They are called by their names, and no recipe is spoken of."""
    write_model(Path("other"), {"x": torch.ones(2), "y": torch.ones(2)})
    write_model(Path("longer"), {"x": torch.ones(3), "y": torch.ones(2)})
    code, out, err = cli("diff", "longer", "other")
    assert (code, out) == (3, "")
    assert err.splitlines() == [
        "error: x: longer has F32 [3], other has F32 [2]",
        "hint: only models of one architecture and size are compared; mergebench inspect shows each",
    ]
    code, _, err = cli("diff", "other", "base")
    assert code == 3 and "has no such tensor" in err and "(and " in err


def test_diff_of_other_vocabularies(base: Tensors, cli: Cli) -> None:
    """All else is compared."""
    table, layer = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
    draw = torch.Generator().manual_seed(0)
    for name, tokens in (("few", 5), ("many", 7)):
        tensors = {table: torch.ones(tokens, 4), layer: torch.randn(6, 4, generator=draw)}
        write_model(Path(name), tensors, config={"vocab_size": tokens, "tie_word_embeddings": True})
    code, out, err = cli("diff", "few", "many")
    assert (code, err) == (0, f"not compared: {table}: F32 [5, 4] against F32 [7, 4]\n")
    assert [line.split()[0] for line in out.splitlines()] == ["tensor", layer, "all", "1"]
    found = document(cli("diff", "few", "many", "--json").out)
    assert found["left_out"] == {table: "F32 [5, 4] against F32 [7, 4]"}
    assert found["tensors"] == [{"tensor": layer, **found["total"]}]


def test_diff_in_all(base: Tensors, cli: Cli) -> None:
    """The total is the difference of all elements as one vector."""
    a, b = read_model(Path("base")), read_model(Path("ft2"))
    x, y = (torch.cat([m[n].double().flatten() for n in a if a[n].is_floating_point()]) for m in (a, b))
    total = document(cli("diff", "base", "ft2", "--json").out)["total"]
    assert total == pytest.approx(
        {
            "norm_ratio": float(y.norm() / x.norm()),
            "cosine": float(x @ y / x.norm() / y.norm()),
            "relative_distance": float((y - x).norm() / x.norm()),
            "changed": float((x != y).double().mean()),
            "sign_conflict": 0,
        }
    )


def test_diff_with_an_adapter(base: Tensors, cli: Cli) -> None:
    """The adapter's difference: alpha / r * B @ A = 2 * 2 in every element."""
    adapter(Path("lora"))
    rows = {row["tensor"]: row for row in document(cli("diff", "base", "base+lora", "--json").out)["tensors"]}
    assert [name for name, row in rows.items() if row["changed"]] == ["layers.0.weight"]
    expected = 4 * 8 / float(base["layers.0.weight"].norm())
    assert rows["layers.0.weight"]["relative_distance"] == pytest.approx(expected, rel=1e-5)


def test_methods(cli: Cli) -> None:
    code, out, err = cli("methods")
    assert (code, err) == (0, "")
    names = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert {"surgery", "pcb", "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"} <= set(names)
    found = {entry["name"]: entry for entry in document(cli("methods", "--json").out)}
    assert sorted(found) == sorted(names)
    one = document(cli("methods", "ties", "--json").out)
    assert one == found["ties"]
    assert [found[name]["cut"] for name in ("ties", "arcee_fusion", "nuslerp")] == [
        "element",
        "row",
        "by its parameters",
    ]
    assert (one["paper"], one["takes"], one["scope"]) == ("arXiv:2306.01708", "task_vectors", "tensor")
    density = next(parameter for parameter in one["parameters"] if parameter["name"] == "density")
    assert density["range"] == "above 0, at most 1" and density["per_model"] and not density["required"]
    out = cli("methods", "slerp").out
    assert "Interpolate along the arc" in out and "required" in out and "at least 0, at most 1" in out
    one = document(cli("methods", "surgery", "--json").out)
    assert one == found["surgery"] and one["kind"] == "edit"
    assert {"probe", "rows", "alpha"} <= {parameter["name"] for parameter in one["parameters"]}
    assert "lowest cosine" in cli("methods", "surgery").out
    code, out, err = cli("methods", "tise")
    assert (code, out) == (2, "") and "'tise'" in err and "did you mean 'ties'?" in err


# -- task vectors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "pcb", "dare_ties", "linear"])
@pytest.mark.parametrize("tuned", ["ft1", "ft2"])
def test_a_task_vector_is_as_good_as_its_model(base: Tensors, cli: Cli, tuned: str, method: str) -> None:
    code, out, err = cli("task-vector", tuned, "--base", "base", "--out", "tv", "-q")
    assert (code, out, err) == (0, "tv\n", "")
    parameters = {"density": 0.5} if "ties" in method else {}
    other = "ft2" if tuned == "ft1" else "ft1"
    for out, entry in (("a", {"model": tuned}), ("b", {"task_vector": "tv"})):
        recipe(method, [entry, other], parameters=parameters)
        assert cli("merge", "recipe.yaml", "--out", out, "-q", "--seed", "3").code == 0
    for name, value in read_model(Path("a")).items():
        if method == "linear":  # base + (model - base) is rounded once more
            torch.testing.assert_close(value, read_model(Path("b"))[name], rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(value, read_model(Path("b"))[name])


def test_task_vector(base: Tensors, cli: Cli) -> None:
    """It goes on where it was interrupted, within the memory and with the workers it is given."""
    how = ("--memory", "100MB", "--workers", "1", "--shard-size", "300")
    ran = cli("task-vector", "ft1", "--base", "base", "--out", "tv", *how, "--json")
    assert (ran.code, ran.err) == (0, "")
    made = document(ran.out)
    assert (made["out"], made["merged_tensors"]) == ("tv", 6)
    assert len(list(Path("tv").glob("*.safetensors"))) > 1 and not Path("tv/README.md").exists()
    again = cli("task-vector", "ft1", "--base", "base", "--out", "tv", *how, "--resume")
    assert (again.code, again.out, again.err) == (0, "tv\n", "tv: already finished, nothing to resume\n")


def test_what_a_task_vector_holds(base: Tensors, cli: Cli) -> None:
    code, _, err = cli("task-vector", "ft2", "--base", "base", "--out", "tv")
    assert code == 0 and re.fullmatch(r"wrote tv in \d+\.\d s: 6 tensors\n", err)
    tuned = read_model(Path("ft2"))
    for name, value in read_model(Path("tv")).items():
        assert torch.equal(value, tuned[name] - base[name] if name != "steps" else tuned[name])
    assert cli("task-vector", "ft2", "--base", "base", "--out", "half", "--dtype", "bfloat16").code == 0
    for name, value in read_model(Path("half")).items():
        assert torch.equal(value, (tuned[name] - base[name]).bfloat16() if name != "steps" else tuned[name])
    adapter(Path("lora"))
    assert cli("task-vector", "base+lora", "--base", "base", "--out", "low").code == 0
    low = read_model(Path("low"))
    torch.testing.assert_close(low["layers.0.weight"], torch.full((8, 8), 4.0), rtol=1e-6, atol=1e-6)
    assert not low["layers.1.weight"].any()


def test_task_vectors_that_cannot_be(base: Tensors, cli: Cli) -> None:
    def fails(code: int, *says: str, args: tuple[str, ...]) -> None:
        before = names(Path())
        ran = cli("task-vector", *args)
        assert (ran.code, ran.out) == (code, "")
        error = ran.err.splitlines()[0]
        assert error.startswith("error: ") and all(word in error for word in says)
        assert names(Path()) == before

    fails(2, "--dtype", "'int8'", args=("ft1", "--base", "base", "--out", "tv", "--dtype", "int8"))
    fails(2, "input", args=("ft1", "--base", "base", "--out", "base", "--overwrite"))
    fails(2, "input", args=("ft1", "--base", "base", "--out", "ft1/tv"))
    fails(3, "nowhere", args=("nowhere", "--base", "base", "--out", "tv"))
    write_model(Path("other"), {"x": torch.ones(2)})
    fails(3, "ft1", "base does not have it", args=("ft1", "--base", "other", "--out", "tv"))
    assert cli("task-vector", "ft1", "--base", "base", "--out", "tv", "-q").code == 0
    fails(2, "finished result", args=("ft1", "--base", "base", "--out", "tv"))
    assert cli("task-vector", "ft2", "--base", "base", "--out", "tv", "-q", "--overwrite").code == 0


# -- words -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, text",
    [
        (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (91_234, "91.2 kB"), (999_499, "999 kB"), (999_600, "1 MB"),
        (4_413_000_000, "4.41 GB"), (999_600_000, "1 GB"), (999_700_000_000, "1000 GB"), (12_345 * 10**9, "12345 GB"),
    ],
)  # fmt: skip
def test_sizes_in_words(size: int, text: str) -> None:
    assert human(size) == text


@pytest.mark.parametrize(
    "text, size",
    [
        ("4096", 4096), ("400MiB", 400 << 20), ("4GB", 4 * 10**9), ("1.5g", 15 * 10**8), ("2 Ki", 2048),
        ("1TB", 10**12), ("1kB", 1000), ("3gib", 3 << 30), ("2TiB", 2 << 40), ("100b", 100),
    ],
)  # fmt: skip
def test_sizes_as_written(text: str, size: int) -> None:
    assert parse_size(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "0GB", "1PiB", "1 2", "1e9", "GB", "1..5GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(RecipeError, match=r"--memory: .* is not a size"):
        parse_size(text, "--memory")
