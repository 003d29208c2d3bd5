"""Names and settings come from files: no command lets a terminal or a Markdown reader obey them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from markdown_it import MarkdownIt
from models import CONFIG, fine_tuned, write_model, write_recipe
from safetensors.torch import save_file
from torch import Tensor

from mergebench.checkpoint.card import code, escape, fence
from mergebench.cli import output
from mergebench.cli.app import app
from mergebench.errors import MergebenchError, escaped, shown
from tests.conftest import Cli
from tests.editing.conftest import write_probe
from tests.evaluation.conftest import write_encoder, write_head

# a colour, a window's title, C1's clear, a line break of either kind, text turned round, one byte that is no UTF-8
CODES = "\x1b[31m\x1b]0;title\x07\x9b2J\r\n\x85\u2028\u202e"
HTML = "\n\n# Title\n\n| a |\n|---|\n<script>`x`</script>\n```\n"
ONE_LINE = CODES.translate({ord(c): None for c in "\r\n\x85\u2028"})
BASE, ONE, TWO, LORA = f"base{CODES}", f"one{CODES}", f"two{CODES}", f"lora{CODES}"
PROBE = f"probe{CODES}.safetensors"
CHECK = ["--old", BASE, "--new", ONE, "--check"]
OBEYED = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command, by the words that are typed for it."""
    below = getattr(command, "commands", {})
    if not isinstance(command, typer.core.TyperGroup):
        yield words
    for name, one in below.items():
        yield from commands(one, (*words, name))


def tensors() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(30, 16, generator=random),
        "model.layers.0.mlp.gate_proj.weight": torch.randn(24, 16, generator=random),
        "model.layers.0.mlp.up_proj.weight": torch.randn(24, 16, generator=random),
        "model.layers.0.mlp.down_proj.weight": torch.randn(16, 24, generator=random),
        f"model.layers.0.{ONE_LINE}.weight": torch.randn(16, 16, generator=random),
        f"extra{CODES}": torch.randn(16, generator=random),
    }


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models, adapters, a probe, recipes, a suite and predictions, whose every text holds terminal codes."""
    monkeypatch.chdir(tmp_path)
    base = tensors()
    config = CONFIG | {"architectures": [f"Llama{CODES}"], "hidden_size": 16, "num_hidden_layers": 1, CODES: CODES}
    write_model(Path(BASE), base, config=config)
    write_model(Path(ONE), fine_tuned(base, 1), config=config)
    write_model(Path(TWO), fine_tuned(base, 2), config=config | {"model_type": f"x{CODES}"})
    write_model(Path("strange"), {CODES: torch.ones(3)}, config=config)
    for number, name in enumerate((LORA, "lora2")):
        Path(name).mkdir()
        peft = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": BASE + HTML}
        (Path(name) / "adapter_config.json").write_text(json.dumps(peft | {"target_modules": ["gate_proj", CODES]}))
        modules = {"model.layers.0.mlp.gate_proj": (24, 16), f"model.layers.0.{ONE_LINE}": (16, 16)}
        factors = {
            f"base_model.model.{module}.lora_{side}.weight": torch.randn(*shape)
            for module, (rows, columns) in modules.items()
            for side, shape in (("A", (2, columns)), ("B", (rows, 2)))
        }
        save_file(factors, Path(name) / "adapter_model.safetensors", metadata={CODES: CODES + str(number)})
    write_probe(Path(PROBE), torch.randn(2, 16), layer=0, norm="pre", pool="mean", classes=[CODES, HTML])
    write_recipe(Path("recipe.yaml"), "linear", [ONE, TWO], BASE)
    write_recipe(Path("lora.yaml"), "ties", [f"{BASE}+{LORA}", ONE], BASE, parameters={"density": 0.5})
    write_recipe(Path("strange.yaml"), "linear", [ONE, "strange"], BASE)
    write_recipe(Path("wrong.yaml"), "linear", [ONE, TWO], BASE, parameters={CODES: 1})
    items = [{"id": f"{CODES}{number}", "pred": CODES + "x" * (number % 2), "gold": CODES} for number in range(8)]
    for name, turned in ((f"old{CODES}.jsonl", items), (f"new{CODES}.jsonl", items[1:] + items[:1])):
        answers = [item | {"id": f"{CODES}{number}"} for number, item in enumerate(turned)]
        Path(name).write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    write_encoder(Path(f"enc{CODES}"))
    write_head(Path(f"enc{CODES}"), labels=("good", CODES, HTML))
    rows = [{"id": f"{CODES}{number}", "text": f"w1 {CODES} w2", "label": CODES} for number in range(4)]
    Path("items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "name": "own",
        "kind": "text-classification",
        "data": "items.jsonl",
        "head": f"enc{CODES}/head.safetensors",
    }
    Path("suite.yaml").write_text(json.dumps({"tasks": [task]}))
    rows = [row | {"label": (CODES, HTML)[number % 2]} for number, row in enumerate(rows)]
    Path("some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {"kind": "text-classification", "train": "some.jsonl"}
    Path("train.yaml").write_text(json.dumps({"model": f"enc{CODES}", "delta": "head", "task": training, "lr": 0.1}))
    Path("cil.yaml").write_text(json.dumps({"backbone": CODES, CODES: 1}))
    save_file({name: one.abs() for name, one in base.items()}, Path("fisher.safetensors"))
    return tmp_path


def lines() -> dict[tuple[str, ...], list[list[str]]]:
    """What is typed for every command; made in this order, a later one may use what an earlier one wrote."""
    edited, patch = f"edited{CODES}", f"edited{CODES}/patch.safetensors"
    probe = ["--model", BASE, "--probe", PROBE, "--rows", "2"]
    old, new = f"old{CODES}.jsonl", f"new{CODES}.jsonl"
    mask = f"mask{CODES}.safetensors"
    return {
        ("inspect",): [[BASE], [f"{BASE}+{LORA}"], [LORA], ["strange"], [BASE, "--json"], [f"no{CODES}"]],
        ("plan",): [["recipe.yaml"], ["lora.yaml"], ["strange.yaml"], ["wrong.yaml"], [f"no{CODES}"]],
        ("explain",): [["recipe.yaml"], ["lora.yaml"], ["strange.yaml"]],
        ("merge",): [["recipe.yaml", "--out", f"merged{CODES}"], ["lora.yaml"], ["strange.yaml"], ["lora.yaml", CODES]],
        ("diff",): [[BASE, ONE], [ONE, TWO, "--base", BASE], [BASE, "strange"]],
        ("task-vector",): [[ONE, "--base", BASE, "--out", f"tv{CODES}"]],
        ("edit",): [[*probe, "--dry-run"], [*probe, "--out", edited], [*probe, "--out", edited]],
        ("patch", "show"): [[patch]],
        ("patch", "revert"): [["--model", edited, "--patch", patch, "--out", f"reverted{CODES}"]],
        ("patch", "apply"): [["--model", BASE, "--patch", patch, "--out", f"applied{CODES}"]],
        ("patch", "to-lora"): [[patch, "--model", BASE, "--out", f"switch{CODES}"]],
        ("adapters", "inspect"): [[LORA, "lora2"]],
        ("adapters", "drift"): [[LORA, "lora2"]],
        ("adapters", "merge"): [[LORA, "lora2", "--out", f"both{CODES}"], [LORA, "--out", f"copy{CODES}"]],
        ("adapters", "fold"): [[LORA, "--base", BASE, "--out", f"folded{CODES}"]],
        ("adapters", "extract"): [["--model", ONE, "--base", BASE, "--out", f"extracted{CODES}", "--rank", "2"]],
        ("adapters", "convert"): [[LORA, "--base", BASE, "--out", f"converted{CODES}.safetensors", "--to", "delta"]],
        ("adapters", "truncate"): [[LORA, "--budget", "50%", "--out", f"cut{CODES}"]],
        ("adapters", "retrieve"): [[f"bank{CODES}", "items.jsonl"]],
        ("mask", "magnitude"): [[BASE, "--smallest", "5%", "--out", mask]],
        ("mask", "fisher"): [[BASE, "--smallest", "5%", "--from", "fisher.safetensors", "--out", "f.safetensors"]],
        ("mask", "overlap"): [[mask, "f.safetensors"]],
        ("compress",): [[BASE, "--ratio", "2", "--out", f"small{CODES}"]],
        ("compress", "expand"): [[f"small{CODES}", "--out", f"large{CODES}"]],
        ("port",): [[LORA, "--old", BASE, "--new", ONE, "--out", f"ported{CODES}"], [LORA, *CHECK]],
        ("eval",): [["suite.yaml", f"enc{CODES}", "--out", f"scores{CODES}"], ["suite.yaml", f"no{CODES}"]],
        ("train",): [["train.yaml", "--out", f"trained{CODES}"], ["strange.yaml"], [f"no{CODES}"]],
        ("dimension",): [["train.yaml", "--out", f"trained{CODES}"], [f"no{CODES}"]],
        ("side", "init"): [["--base", f"no{CODES}", "--out", f"side{CODES}"], ["--base", BASE, "--out", "side"]],
        ("compare",): [[old, new], [old, f"no{CODES}"]],
        ("search",): [["recipe.yaml", "--over", CODES]],
        ("auto",): [[BASE, ONE, TWO, "--suite", f"no{CODES}"], [BASE, f"no{CODES}", TWO, "--suite", "suite.yaml"]],
        ("statistics",): [[f"no{CODES}", "--data", f"no{CODES}", "--kind", "gram", "--out", f"gram{CODES}"]],
        ("report",): [[f"scores{CODES}"], [f"merged{CODES}"]],
        ("probe", "fit"): [["--model", f"no{CODES}", "--data", "items.jsonl", "--out", f"{CODES}.safetensors"]],
        ("cil", "run"): [["cil.yaml"]],
        ("cil", "eval"): [[f"bank{CODES}"]],
        ("generate",): [[f"no{CODES}", "--prompt", CODES], [BASE, "--prompt", CODES]],
        ("results",): [[], [f"no{CODES}"]],
        ("init",): [["ties", CODES, CODES]],
        ("methods",): [[CODES], []],
        ("doctor",): [[CODES]],
    }  # fmt: skip


# these need a bank, a search, texts that a model was run on, or time; what they print goes through the same functions
ONLY_ERRORS = {
    ("adapters", "retrieve"), ("search",), ("probe", "fit"), ("cil", "run"), ("cil", "eval"), ("doctor",),
    ("dimension",), ("side", "init"), ("generate",), ("auto",), ("statistics",),
}  # fmt: skip


def test_no_command_prints_a_control_character(place: Path, cli: Cli) -> None:
    """Successes, notes, warnings, tables and errors of every command, with names from files."""
    typed = lines()
    assert set(typed) == set(commands(typer.main.get_command(app)))
    done = set()
    for words, each in typed.items():
        for args in each:
            ran = cli(*words, *args)
            assert not OBEYED.findall(ran.out + ran.err), (words, args)
            assert "Traceback" not in ran.err
            done |= {words} if ran.code == 0 else set()
    assert set(typed) - done == ONLY_ERRORS
    for file in place.rglob("*.md"):
        check_markdown(file.read_text())


def check_markdown(text: str) -> None:
    """What a Markdown reader takes from it: no heading, table or element of a file's text."""
    assert not OBEYED.findall(text.replace("\u202e", ""))  # which YAML, in the card's recipe, may hold as it is
    body = text.partition("\n---\n")[2] or text
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    inner = [child for token in tokens for child in token.children or ()]
    inner = [
        token for token in inner if token.type != "image" or token.attrs.get("src") not in ("scores.png", "curves.png")
    ]  # our own
    tokens = [
        token for token in tokens if not re.fullmatch(r"<!-- To publish it[^<>]*-->\s*", token.content)
    ]  # so is this
    assert not {token.type for token in [*tokens, *inner]} & {"html_block", "html_inline", "image"}
    for opening, content in pairwise(tokens):
        if opening.type in ("heading_open", "th_open"):
            assert content.content not in ("Title", "a")


def test_only_one_file_prints() -> None:
    """A new command has no other way to the terminal than the functions that show foreign text as text."""
    for file in Path(output.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if file.name not in ("output.py", "streams.py", "__init__.py"):
                assert called not in ("print", "typer.echo", "Console")
                assert "stdout.write" not in called and "stderr.write" not in called


def test_what_is_too_long_to_read_loses_its_middle() -> None:
    assert shown("a" * 300) == "a" * 300
    assert shown(f"x: '{'a' * 10_000}' has no y") == f"x: '{'a' * 58}…{'a' * 58}' has no y"
    assert len(shown("a " * 10_000)) == 3999
    error = MergebenchError("a\nb", "c\x1b")
    assert (error.message, error.hint, str(error)) == ("a\\nb", "c\\x1b", "a\\nb")


PLAIN = [
    "# x", "- x", "+ x", "1. x", "2) x", "> x", "===", "~~~", "```x", "` `` ```", "`", " `x` ", "a|b", "<b>&lt;", "-",
    "![x](y)", "[x](y)", "**x** _y_", "\\", "\\`", "1.", "3.5 x", "0.5", "+0.3 [1, 2]", "~~x~~", "a\x1b[2Jb\x07", HTML,
]  # fmt: skip


@pytest.mark.parametrize("text", PLAIN)
def test_markdown_shows_text_as_it_is(text: str) -> None:
    """What a reader of Markdown shows of an escaped text, of code and of a block is the text."""
    reader = MarkdownIt("commonmark").enable("strikethrough")
    line = " ".join(text.split())
    for begin in ("", "- ", "# "):
        tokens = [token for token in reader.parse(begin + escape(text)) if token.type == "inline"]
        shown_text = "".join(child.content for token in tokens for child in token.children or ())
        assert all(child.type in ("text", "text_special") for token in tokens for child in token.children or ())
        assert shown_text == escaped(line)
    (inline,) = (token for token in reader.parse(f"x {code(text)} y") if token.type == "inline")
    spans = [child for child in inline.children or () if child.type == "code_inline"]
    assert [span.content for span in spans] == [escaped(text)]
    blocks = [token for token in reader.parse(fence(text, "yaml") + "\n\nafter") if token.type == "fence"]
    assert [block.content.strip() for block in blocks] == [text.strip()]
