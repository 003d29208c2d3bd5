"""What the commands print in a narrow terminal, in a pipe and where all is ASCII."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from models import fine_tuned, tiny_tensors, write_model, write_recipe
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table

import mergebench
from mergebench.cli import main
from mergebench.cli.app import app
from mergebench.cli.help import Group
from mergebench.cli.merge import _sweeps
from mergebench.cli.output import wrapped
from mergebench.evaluation.tables.fitted import fitted
from tests.conftest import Cli
from tests.editing.conftest import CONFIG, WIDTH, gated, write_probe
from tests.encoders import write_encoder
from tests.evaluation.conftest import write_data, write_head
from tests.training.trainable import classify

ONE, OTHER = "a-fine-tune-of-the-first-task", "a-fine-tune-of-the-second-task"
LORAS = "a-lora-of-the-first-task a-lora-of-the-second-task"
# What is typed, each after those above it; the second part takes its time.
QUICK = f"""
plan recipe.yaml
explain recipe.yaml
merge recipe.yaml --no-eval
merge recipe.yaml --no-eval --resume
compare old.jsonl new.jsonl --max-nfr 1
task-vector {ONE} --base base --out vector
inspect base
inspect base+vector
diff {ONE} {OTHER} --base base
methods
methods pcb
edit model --probe p.safetensors --rows 30 --alpha 1 --dry-run
edit model --probe p.safetensors --rows 30 --alpha 1 --out edited
patch show edited/patch.safetensors
patch revert edited/patch.safetensors --model edited --out back
adapters extract {ONE} --base base --rank 2 --out a-lora-of-the-first-task
adapters extract {OTHER} --base base --rank 2 --out a-lora-of-the-second-task
adapters inspect {LORAS}
adapters drift {LORAS} {LORAS}
adapters merge {LORAS} --method svd --out both
mask magnitude base --smallest 1% --out mask.safetensors
mask overlap mask.safetensors mask.safetensors
compress base --ratio 2 --out compressed
"""
SLOW = f"""
merge recipe.yaml --overwrite
report merged/recipe
eval suite.yaml base {ONE} {OTHER}
compare {ONE} {OTHER} --in evaluations/suite --max-nfr 1
compare base merged/recipe --suite suite.yaml
search recipe.yaml --over lambda --budget 3
search recipe.yaml --over lambda --budget 3 --resume
results
methods surgery
doctor
patch apply edited/patch.safetensors --model back --out again
patch to-lora edited/patch.safetensors --model model --out switch
probe fit base --data train.jsonl --layer all --undesired first --out q.safetensors
adapters extract {ONE} --base base --dry-run --as all
adapters extract {ONE} --base base --as subspace --dimension 40 --out packed.safetensors
adapters merge {LORAS} --method ema --out sequence
adapters fold both --base base --out folded
adapters convert both --base base --to dense --out changes.safetensors
adapters truncate both --budget 50% --out smaller
mask magnitude {ONE} --smallest 1% --out other.safetensors
mask overlap mask.safetensors other.safetensors
compress expand compressed --out dense
side init base --reduction 4 --out side
train train.yaml
dimension dimension.yaml --share 0.01
port {ONE} --old base --new {OTHER} --check
port {ONE} --old base --new {OTHER} --out ported --suite suite.yaml
cil run sequence.yaml
cil eval banks/sequence
adapters retrieve banks/sequence/seed-0/merged test.jsonl --trace
"""
NO_TRIAL = {"mask fisher", "generate", "init"}  # whose output is that of another, a model's, or a file

Terminal = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Run a command in a terminal so many columns wide; its code, and the lines that were to be seen in it.

    A bar's states stand in one line, with a \\r between them.
    """

    def run(columns: int, *args: str) -> tuple[int, list[str]]:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        for name in ("COLUMNS", "LINES", "GITHUB_ACTIONS"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "argv", ["mergebench", *args])
        seen = bytearray()

        def read() -> None:
            while True:
                try:
                    seen.extend(os.read(ours, 65536))
                except OSError:  # all has been read, and the other end is closed
                    return

        reading = threading.Thread(target=read)
        reading.start()
        with os.fdopen(theirs, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            with pytest.raises(SystemExit) as end:
                main()
        reading.join()
        os.close(ours)
        plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", seen.decode())
        return int(end.value.code or 0), re.split(r"\r?\n", plain)

    return run


def write_all(place: Path) -> None:
    """Models, data and configs for every command, in `place`."""
    tasks = []
    for number, name in enumerate((ONE, OTHER)):
        write_encoder(place / name, seed=number + 1)
        write_head(place / name, seed=number + 5)
        for split in ("test", "validation"):
            file = f"task-{number}-{split}.jsonl"
            write_data(place / file, count=12, seed=number * 2 + (split == "test"))
            head = f"{name}/head.safetensors"
            label = f"the-{('first', 'second')[number]}-task"
            tasks.append({"name": label, "kind": "text-classification", "data": file, "head": head, "split": split})
    (place / "suite.yaml").write_text(json.dumps({"tasks": tasks}))
    recipe = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": ONE, "parameters": {"weight": 0.3}}, {"model": OTHER}],
        "evaluate": {"suite": "suite.yaml", "baselines": [{"task_arithmetic": {"lambda": 0.5}}]},
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    write_model(place / "model", gated(torch.float32), config=CONFIG)
    write_probe(place / "p.safetensors", torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(7)))
    config = classify(place, delta="hut", max_steps=2)  # writes base, train.jsonl, validation.jsonl, test.jsonl
    config["model"] = "base"
    (place / "train.yaml").write_text(yaml.safe_dump(config))
    (place / "dimension.yaml").write_text(yaml.safe_dump({**config, "delta": {"kind": "subspace"}, "max_steps": 1}))
    small = {"seeds": [0], "epochs": 1, "batch": 8, "bottleneck": 2, "align_epochs": 1, "lr": 0.1}
    data = {"backbone": "base", "train": "train.jsonl", "test": "test.jsonl", "text": "text", "tasks": 2}
    (place / "sequence.yaml").write_text(json.dumps({**data, **small}))
    for name, step in (("old", 2), ("new", 3)):
        rows = [{"id": n, "pred": str(n % step), "gold": str(n % 2)} for n in range(20)]
        (place / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def fits(run: Terminal, columns: int, words: str) -> None:
    code, lines = run(columns, *words.split())
    states = [state.rstrip() for line in lines for state in line.split("\r")]
    assert code == 0, (words, lines)
    assert [state for state in states if cell_len(state) > columns] == [], words


@pytest.mark.usefixtures("one_thread")
def test_commands_fit_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    monkeypatch.chdir(tmp_path)
    write_all(tmp_path)
    for words in QUICK.strip().splitlines():
        fits(terminal, 80, words)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.usefixtures("one_thread")
def test_all_commands_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: Terminal, columns: int) -> None:
    monkeypatch.chdir(tmp_path)
    write_all(tmp_path)
    typed = (QUICK.strip() + SLOW.rstrip()).splitlines()
    tried = {name for line in typed for name in RUN if f"{line} ".startswith(f"{name} ")}
    assert tried == RUN.keys() - NO_TRIAL
    for words in typed:
        fits(terminal, columns, words)


# -- help ----------------------------------------------------------------------------------------------------


def walk(command: Any, words: str = "") -> Iterator[tuple[str, Any]]:
    """A command and those below it, by what is typed for them."""
    yield words.strip(), command
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, f"{words} {name}")


COMMANDS = dict(walk(typer.main.get_command(app)))
RUN = {words: command for words, command in COMMANDS.items() if not isinstance(command, Group)}


@pytest.mark.parametrize("columns", [60, 80])
def test_help_fits_and_flows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """A line ends where the next word has no room, or where its paragraph ends."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in COMMANDS:
        COMMANDS[""].main([*words.split(), "-h"], "mergebench", standalone_mode=False)
        lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert max(map(cell_len, lines)) <= columns, words
        usage = next(line for line in lines if "Usage:" in line)
        assert f"mergebench {words}".strip() in usage and not re.search(r"[{}<>]", usage)
        prose = lines[: next(at for at, line in enumerate(lines) if line.startswith("╭"))]
        for line, after in pairwise(prose):
            if line and after:
                assert cell_len(line) + 1 + cell_len(after.split()[0]) > columns - 2, (words, line)


NOUN = re.compile(r"[A-Z]+|KEY=VALUE|W,W,\.\.\.|\[SHELL\]|")  # of a value; of a flag nothing


@pytest.mark.parametrize("words", COMMANDS)
def test_values_are_called_by_nouns(words: str) -> None:
    command = COMMANDS[words]
    for parameter in command.get_params(typer.Context(command)):
        assert NOUN.fullmatch(parameter.metavar), parameter.opts
        assert (parameter.metavar == "") == (
            getattr(parameter, "is_flag", False) and "completion" not in parameter.name
        )


def options(words: str) -> dict[str, Any]:
    parameters = RUN[words].get_params(typer.Context(RUN[words]))
    return {option: one for one in parameters for option in one.opts if option.startswith("-")}


def test_shared_options_are_everywhere_and_mean_one_thing() -> None:
    assert [words for words in RUN if "--json" not in options(words)] == ["init"]  # which prints a recipe
    without = {words for words in RUN if "--quiet" not in options(words)}
    shown = {"adapters drift", "adapters inspect", "init", "mask overlap", "methods", "patch show"}
    assert without == shown  # which print their results and nothing else
    for option in ("--memory", "--workers", "--device", "--shard-size", "--split", "--results", "--json", "--quiet"):
        found = {(one.help, one.metavar, str(one.default)) for one in (options(w).get(option) for w in RUN) if one}
        assert len(found) == 1, found
    bounded = {words for words in RUN if "--memory" in options(words)}
    assert bounded | {"eval"} == {words for words in RUN if "--workers" in options(words)}  # which holds whole models
    assert bounded >= {"merge", "plan", "search", "edit", "patch apply", "patch revert", "adapters fold", "task-vector"}


def test_groups_are_in_order(cli: Cli) -> None:
    listed = re.findall(r"^│ (\S+)  ", cli("adapters", "-h").out.split("Commands")[1], re.MULTILINE)
    assert listed[0] == "merge" and len(listed) == 8


def test_what_was_an_option_is_still_taken() -> None:
    for words, old in {
        "edit": "--model M --probe p",
        "probe fit": "--model=M --data d --out o",
        "adapters extract": "--base b --model M --out o",
        "patch apply": "--model m --patch M --out o",
        "patch revert": "--patch M --model m --out o",
        "side init": "--base M --out o",
    }.items():
        context = RUN[words].make_context(words, old.split())
        name = next(one.name for one in RUN[words].params if one.param_type_name == "argument")
        assert str(context.params[name]) == "M"


@pytest.mark.parametrize(
    "device, says",
    [
        ("mps", "not supported"),
        ("cuda:x", "is not possible"),
        pytest.param("cuda:0", "no CUDA", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")),
    ],
)
def test_devices(cli: Cli, tmp_path: Path, device: str, says: str) -> None:
    write_model(tmp_path / "model", {"x": torch.ones(2, 2)})
    (tmp_path / "r.json").write_text(json.dumps({"merge_method": "passthrough", "models": [{"model": "model"}]}))
    ran = cli("plan", tmp_path / "r.json", "--device", device)
    assert (ran.code == 2 and f"--device: '{device}' {says}" in ran.err) or f"--device {device}: " in ran.err
    assert says in ran.err and "cpu" in ran.err


def test_prose_wraps_in_its_column(terminal: Terminal) -> None:
    """A long path or explanation makes no second line of a name's other cells."""
    _, lines = terminal(60, "doctor", "install")
    assert any(re.match(r" working directory  +ok  ", line) for line in lines)
    _, lines = terminal(60, "doctor", "linear")
    assert any(re.match(r" sign tie  +Values that", line) for line in lines)


# -- completion ----------------------------------------------------------------------------------------------


@pytest.fixture
def completed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[str]]:
    """What a shell offers after these words, in the form that its script takes."""

    def run(typed: str, shell: str = "bash") -> set[str]:
        monkeypatch.setenv("_MERGEBENCH_COMPLETE", f"complete_{shell}")
        words = ["mergebench", *typed.split(" ")]
        monkeypatch.setenv("COMP_WORDS", "\n".join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", " ".join(words))
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        out = cli().out
        return (
            set(re.findall(r'"([^"]+)"(?=[:\n)])', out))
            if shell == "zsh"
            else {w.split("\t")[0] for w in out.split("\n")}
        )

    return run


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_names_complete(completed: Callable[..., set[str]], shell: str) -> None:
    assert completed("methods ti", shell) >= {"ties"}


def test_every_kind_of_name_completes(
    completed: Callable[..., set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evaluation.json").write_text(json.dumps({"records": [{"model": "base"}, {"model": "ties 0.2"}]}))
    for typed, offered in {
        "methods sur": "surgery",
        "doctor ties wu": "wudi",
        "edit m --edit s": "surgery",
        "adapters merge a --method e": "ema",
        "adapters merge a --method ti": "ties",
        "adapters convert a --to de": "delta",
        "adapters extract m --as su": "subspace",
        "eval s.yaml m --split v": "validation",
        "merge r.yaml --device c": "cuda",
        "search r.yaml --strategy c": "cmaes",
        "compare --in . b": "base",
        "ad": "adapters",
        "merge --work": "--workers",
    }.items():
        assert offered in completed(typed), typed
    assert completed("merge r") - {""} == set()  # files are for the shell


def test_the_keys_of_a_recipe_complete(
    completed: Callable[..., set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As --set and --over take them: what is written, and what its method declares beside that."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("raise SystemExit('run on TAB')")
    Path("own.yaml").write_text("merge_method: mine.py:mine\nmodels: [{model: a}]\n")
    Path("broken.yaml").write_text("merge_method: [")
    Path("r.yaml").write_text(
        "merge_method: dare_ties\nmodels: [{model: a}, {model: b, parameters: {weight: 0.3}}]\n"
        "parameters: {lambda: 0.5, density: [0.1, 0.2]}\n"
    )
    written = {"models.1.parameters.weight=0.3", "parameters.lambda=0.5", "parameters.density.1=0.2"}
    for command in ("merge", "plan", "explain", "search"):
        offered = completed(f"{command} r.yaml --set ")
        assert offered >= written | {"parameters.rescale=true", "merge_method=dare_ties"}, command
        assert not any(one.startswith("parameters.density=") for one in offered)
    assert completed("merge r.yaml --quiet --set parameters.l") - {""} == {"parameters.lambda=0.5"}
    assert completed("search r.yaml --over w") - {""} == {"weight", "weight.*"}
    assert completed("search r.yaml --over lambda,d") - {""} == {"lambda,density", "lambda,density.*"}
    for recipe in ("own.yaml", "broken.yaml", "absent.yaml", "-"):
        assert not [one for one in completed(f"merge {recipe} --set p") if one.startswith("parameters")]


def test_a_real_shell_completes(tmp_path: Path, cli: Cli) -> None:
    program = tmp_path / "mergebench"
    start = "import sys; sys.argv[0] = 'mergebench'; from mergebench.cli import command; command()"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{start}" "$@"\n')
    program.chmod(0o755)
    script = cli("--show-completion", "bash").out
    typed = "COMP_WORDS=(mergebench methods ti); COMP_CWORD=2; _mergebench_completion mergebench; echo ${COMPREPLY[@]}"
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{typed}"],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path},
        check=True,
    )
    assert done.stdout.split() == ["ties"]


def test_the_shell_of_a_completion(cli: Cli) -> None:
    assert cli("--show-completion", "zsh").out.startswith("#compdef mergebench")
    assert cli("--show-completion", "fish").out.startswith("complete --command mergebench")
    ran = cli("--show-completion", "tcsh")
    assert (ran.code, ran.out) == (2, "") and "'tcsh'" in ran.err and "zsh" in ran.err


# -- lines and tables ----------------------------------------------------------------------------------------


def test_lines_break_at_words() -> None:
    text = "note: one two three four five six seven eight, in 12.5 s and 3 kB"
    for most in range(1, 80):
        lines = wrapped(text, most).splitlines()
        assert " ".join(line.strip() for line in lines) == text
        assert all(cell_len(line) <= most or len(line.split()) < 3 for line in lines)
        assert all(line.startswith("  ") for line in lines[1:])
        assert not any(line.endswith(("12.5", "3")) for line in lines)
    assert wrapped(text, None) == text
    assert wrapped("  model     " + "word " * 12, 40).splitlines()[1].startswith(" " * 12 + "word")
    assert wrapped("日本語 " * 10, 20).splitlines()[0] == "日本語 日本語 日本語"


def test_a_table_has_all_its_cells_at_any_width() -> None:
    """And is as wide as it likes where there is room."""
    heads = ["tensor", "norm", "energy kept", "stores", "paper"]
    rows = [[f"layer.{i}.self_attn.q_proj.weight", f"{i}.{i}", f"{i}%", "values and places in a word", f"arXiv:{i}"]
            for i in range(1, 4)]  # fmt: skip
    for width in range(38, 140, 3):
        table = Table("tensor", "norm", "energy kept", Column("stores", ratio=1), "paper", box=None)
        for row in rows:
            table.add_row(*row)
        console = Console(width=width, file=io.StringIO(), color_system=None)
        for part in fitted(table, console, optional=("paper",)):
            console.print(part)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        lines = [line.rstrip() for line in text.splitlines()]
        assert max(map(cell_len, lines)) <= width
        dropped = "arXiv:1" not in text
        wanted = [cell.split() for row in [heads, *rows] for cell in (row[:-1] if dropped else row)]
        assert sorted(text.split()) == sorted(word for words in wanted for word in words), width
        if width >= 104:
            assert not dropped and len(lines) == 4


def test_a_pipe_is_no_terminal(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record is a line, however long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    name = "x" * 250
    write_model(Path("model"), {name: torch.ones(2, 2)})
    write_model(Path("other"), {name: 2 * torch.ones(2, 2)})
    lines = cli("diff", "model", "other").out.splitlines()
    assert any(re.fullmatch(rf" ?{name} +2\.0000 .*100\.0% *", line) for line in lines)
    (said,) = cli("methods", "y" * 100).err.splitlines()[:1]
    assert len(said) > 100


@pytest.mark.parametrize("method, more", [("linear", {}), ("ties", {"parameters": {"density": 0.5}}), ("pcb", {})])
def test_the_sweeps_of_a_merge_read_all_its_bytes(tmp_path: Path, method: str, more: dict[str, Any]) -> None:
    base = tiny_tensors()
    for name, tensors in {"base": base, "a": fine_tuned(base, 1), "b": fine_tuned(base, 2)}.items():
        write_model(tmp_path / name, tensors)
    recipe = write_recipe(tmp_path / "r.yaml", method, ["a", "b"], "base", **more)
    plan = mergebench.plan(mergebench.load(recipe))
    sweeps = _sweeps(plan)
    assert sum(size for _, size in sweeps) == (plan.bytes_read if plan.sweeps > 1 else 0)
    assert [label for label, _ in sweeps] == [f"sweep {n + 1} of {plan.sweeps}" for n in range(len(sweeps))]


def test_signs_where_all_is_ascii(shell: Cli, tmp_path: Path) -> None:
    for name, wrong in (("old", 4), ("new", 8)):
        rows = [{"id": n, "pred": "é" if n < wrong else "b", "gold": "b"} for n in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    ran = shell("compare", "old.jsonl", "new.jsonl", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert ran.code == 0 and ran.out.isascii()
    assert "-33.3 [" in ran.out and "\\xe9" in ran.out and "\\u2212" not in ran.out


def test_a_name_whatever_its_case(cli: Cli) -> None:
    assert "did you mean 'ties'?" in cli("methods", "TIES").err
    assert "did you mean 'surgery'?" in cli("methods", "surgry").err
    ran = cli("methods", "nope")
    assert ran.code == 2 and "known: adamerging, " in ran.err and "FILE.py:NAME" in ran.err
