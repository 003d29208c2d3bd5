"""The program against its pages: what it has is named there with a word on it, and what they name is there."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import mergebench
from mergebench import deltas, methods
from mergebench.cli.app import app
from mergebench.cli.declared import DeclaredCommand, option_of
from mergebench.cli.help import Group
from mergebench.deltas import formats
from mergebench.editing import edits
from mergebench.evaluation import scorers, tasks
from mergebench.training import config
from mergebench.training import declared as trained
from mergebench.training import tasks as training_tasks
from tests.conftest import Cli
from tests.editing.conftest import CONFIG, WIDTH, gated, write_probe
from tests.encoders import write_encoder
from tests.models import write_model

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
TEXT = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
GUIDE = "\n".join(text for name, text in TEXT.items() if name != "CONTRIBUTING.md")
HELP_ONLY = {"--version", "--install-completion", "--show-completion"}  # as every program has them


def spans(text: str) -> list[str]:
    """What stands between backticks in a line."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def code(text: str) -> str:
    """What a page shows as code: spans, fenced blocks, indented lines."""
    fenced = re.findall(r"^```.*?^```", text, re.DOTALL | re.MULTILINE)
    return "\n".join([*spans(text), *fenced, *re.findall(r"^ {4}.*", text, re.MULTILINE)])


def named(word: str, text: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) is not None


# -- the command line --------------------------------------------------------------------------------------


def walk(command: Any, words: str = "mergebench") -> Iterator[tuple[str, Any]]:
    """A command and those below it, by what is typed for them."""
    yield words, command
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, f"{words} {name}")


COMMANDS = dict(walk(typer.main.get_command(app)))


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_is_named_and_has_help(words: str) -> None:
    assert COMMANDS[words].help
    assert named(words, GUIDE)


@pytest.mark.parametrize("words", COMMANDS)
def test_options_are_named_and_have_help(words: str) -> None:
    for parameter in COMMANDS[words].params:
        assert parameter.help, parameter.opts
        if parameter.param_type_name == "option" and HELP_ONLY.isdisjoint(parameter.opts):
            assert any(named(option, GUIDE) for option in parameter.opts), parameter.opts


RUN = {words: one for words, one in COMMANDS.items() if not isinstance(one, Group)}


@pytest.mark.parametrize("words", RUN)
def test_help_opens_with_an_example_that_parses(words: str) -> None:
    example = (RUN[words].help or "").split("\n\n")[1]
    assert example.startswith(f"Example: {words} ") and "\n" not in example
    typed = example.removeprefix(f"Example: {words} ").split()
    assert RUN[words].make_context(words, typed).params


@pytest.mark.parametrize("words", COMMANDS)
def test_flags_do_not_look_as_if_they_took_a_value(words: str) -> None:
    flags = [
        one for one in COMMANDS[words].get_params(typer.Context(COMMANDS[words])) if getattr(one, "is_flag", False)
    ]
    assert flags and all(one.metavar == "" for one in flags if HELP_ONLY.isdisjoint(one.opts))


@pytest.mark.parametrize(
    "words", [words for words, command in COMMANDS.items() if isinstance(command, DeclaredCommand)]
)
def test_declared_options_are_named_and_have_help(words: str) -> None:
    for below in COMMANDS[words].declared([]).values():
        for option, parameter in below.items():
            assert parameter.help, option
            assert named(option, code(GUIDE)), option


def typed(text: str) -> Iterator[list[str]]:
    """The command lines of a page as a shell splits them, without what stands in brackets."""
    text = re.sub(r"\\\n\s*", " ", text)
    for line in re.findall(r"^ {4}(?:docker run .* )?(mergebench .*)", text, re.MULTILINE):
        yield shlex.split(re.sub(r"\s\[.*?\]", "", line), comments=True)


SHOWN = {
    f"{page.relative_to(ROOT)}: {shlex.join(words)}": words
    for page in [*PAGES, *sorted(ROOT.glob("recipes/*/README.md"))]
    for words in typed(page.read_text(encoding="utf-8"))
}


@pytest.mark.parametrize("label", SHOWN)
def test_a_shown_command_parses(label: str) -> None:
    words = SHOWN[label]
    name = max((one for one in RUN if words[: len(one.split())] == one.split()), key=len, default=None)
    assert name is not None
    RUN[name].make_context(name, words[len(name.split()) :])


# -- what recipes, suites and files name -------------------------------------------------------------------

PAGE_OF = {methods: "recipes.md", edits: "surgery.md", tasks: "evaluation.md", scorers: "evaluation.md"}
DECLARED = {f"{room.__name__.split('.')[-1]}: {name}": (room, name) for room in PAGE_OF for name in room.names()}


@pytest.mark.parametrize("label", DECLARED)
def test_what_is_declared_has_help_and_is_named(label: str) -> None:
    room, name = DECLARED[label]
    declared, page = room.get(name), code(TEXT[PAGE_OF[room]])
    assert declared.summary
    assert named(name, page)
    for key, parameter in declared.parameters.items():
        assert parameter.help, key
        assert named(option_of(key) if room is edits else key, page), key


def table(page: str, heading: str) -> dict[str, list[str]]:
    """The rows of the tables that have this first column: by each name there, the other cells."""
    rows: dict[str, list[str]] = {}
    for text in TEXT[page].split(f"| {heading} |")[1:]:
        for line in text.splitlines()[2:]:
            if not line.startswith("|"):
                break
            first, *cells = (cell.strip() for cell in line.strip("|").replace("\\|", "/").split("|"))
            for name in spans(first):
                assert name not in rows, name
                rows[name] = cells
    return rows


def test_the_table_of_parameters_is_complete() -> None:
    """No method is left out, no parameter of another method or of an earlier version stands there."""
    listed = {name: set(spans(cells[-1])) for name, cells in table("recipes.md", "method").items()}
    assert listed == {name: set(methods.get(name).parameters) for name in methods.names()}


def test_the_readme_counts_right() -> None:
    """Methods, PEFT types besides the three that are named, and how much faster than mergekit."""
    text = TEXT["README.md"]
    assert re.findall(r"(\d+) merge methods", text) == [str(len(list(methods.names())))]
    types = set(re.findall(r"[A-Z][A-Z0-9_]+", formats.peft_types())) - {"LORA", "IA3", "OFT"}
    assert re.findall(r"(\d+) other PEFT types", text) == [str(len(types))]
    speed = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8").split("## Speed")[1].split("\n\n")[2]
    ratios = [float(one) for one in re.findall(r"\| \*\*([\d.]+)\*\* \|", speed)]
    assert f"{min(ratios):.0f} to {max(ratios):.0f} times faster" in text


def test_the_page_of_methods_has_every_method() -> None:
    rows = table("methods.md", "method")
    assert rows.keys() == set(methods.names())
    for name, (_, paper) in rows.items():
        assert set(re.findall(r"arXiv:[\d.]+", methods.get(name).paper)) <= set(re.findall(r"arXiv:[\d.]+", paper)), (
            name
        )


def test_the_table_of_kinds_is_complete() -> None:
    rows = table("plugins.md", "kind")
    assert rows.keys() == set(deltas.names())
    for name, (_, parts, settings) in rows.items():
        kind = deltas.get(name)
        assert kind.summary and inspect.getdoc(kind.parts)
        listed = {**dict.fromkeys(spans(parts), False), **dict.fromkeys(spans(settings), True)}
        assert listed == {field.name: field.sort == "setting" for field in kind.fields.values()}


def test_the_table_of_formats_is_complete() -> None:
    rows = table("adapters.md", "format")
    assert rows.keys() == set(formats.names())
    for name, (_, kinds) in rows.items():
        assert inspect.getdoc(formats.get(name).read)
        assert set(spans(kinds)) <= set(deltas.names())


# -- what the pages name -----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", TEXT)
def test_paths_are_there(page: str) -> None:
    folder = next(path.parent for path in PAGES if path.name == page)
    for path in re.findall(r"`((?:mergebench|tests|benchmarks|docs|recipes)/[\w./-]*)`", TEXT[page]):
        assert (ROOT / path).exists() or "/cache/" in path, path  # what a recipe fetches
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", TEXT[page]):
        assert (folder / link).exists(), link


@pytest.mark.parametrize("page", TEXT)
def test_links_lead_to_headings(page: str) -> None:
    folder = next(path.parent for path in PAGES if path.name == page)
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([\w-]+)\)", TEXT[page]):
        lines = (folder / target if target else folder / page).read_text(encoding="utf-8").splitlines()
        headings = [line.lstrip("# ").lower() for line in lines if line.startswith("#")]
        assert anchor in {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}, anchor


GROUPS = {  # of entry points
    "mergebench.edits", "mergebench.scorers", "mergebench.tasks", "mergebench.formats", "mergebench.targets",
    "mergebench.trained", "mergebench.objectives", "mergebench.training_tasks",
    "mergebench.modules",
}  # fmt: skip


@pytest.mark.parametrize("page", TEXT)
def test_python_names_are_there(page: str) -> None:
    text = TEXT[page]
    dotted = set(re.findall(r"(?<![\w./-])mergebench(?:\.\w+)+", text)) - GROUPS
    for module, names in re.findall(r"from (mergebench[\w.]*) import ([\w, ]+)", text):
        dotted |= {f"{module}.{name.strip()}" for name in names.split(",")}
    for name in dotted:
        if name != "mergebench.json":
            found: Any = mergebench
            for at, part in enumerate(name.split(".")[1:], 1):
                if not hasattr(found, part):
                    importlib.import_module(".".join(name.split(".")[: at + 1]))
                found = getattr(found, part)


def test_the_tree_has_every_room() -> None:
    """The tree in docs/architecture.md: every room and top-level file of the package, and what it names in a room."""
    package = ROOT / "mergebench"
    (tree,) = re.findall(r"```\nmergebench/\n(.*?)```", TEXT["architecture.md"], re.DOTALL)
    lines = dict(line.split(maxsplit=1) for line in tree.splitlines())
    wanted = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    assert lines.keys() == wanted | {path.name for path in package.glob("[!_]*.py")}
    for place, words in lines.items():
        for inner in re.findall(r"\b\w+/", words):
            assert (package / place / inner).is_dir(), inner


# -- --json ------------------------------------------------------------------------------------------------

# Where a command's document is read already.
ELSEWHERE = {
    "merge": "tests/cli/test_cli.py::test_merge_as_json",
    "plan": "tests/cli/test_cli.py::test_the_numbers_of_a_plan",
    "explain": "tests/recipe/test_gradients.py::test_explain_names_the_sources_of_slices",
    "eval": "tests/cli/test_evaluate.py::test_what_a_merge_measured_is_known",
    "compare": "tests/cli/test_compare.py::test_files_and_rows_say_the_same",
    "results": "tests/cli/test_results_command.py::test_a_look",
    "report": "tests/evaluation/page/test_page.py::test_the_command",
    "task-vector": "tests/cli/test_cli.py::test_task_vector",
    "auto": "tests/evaluation/search/test_auto.py::test_from_end_to_end",
    "search": "tests/evaluation/search/test_search.py::test_the_test_table_has_everything_and_says_who_wins",
    "inspect": "tests/cli/test_cli.py::test_inspect",
    "diff": "tests/cli/test_cli.py::test_diff_by_hand",
    "generate": "tests/networks/test_generation.py::test_the_likeliest_token_each_time",
    "statistics": "tests/systems/on_data/test_statistics_of_models.py::test_the_command",
    "methods": "tests/cli/test_cli.py::test_methods",
    "doctor": "tests/testing/test_doctor.py::test_json",
    "probe fit": "tests/editing/test_fit.py::test_equal_to_a_fit_by_hand",
    "port": "tests/systems/test_port_checked.py::test_the_check_is_numpys",
    "adapters drift": "tests/adapters/test_sequence.py::test_drift_on_the_command_line",
    "adapters inspect": "tests/adapters/test_describe.py::test_the_command",
    "adapters retrieve": "tests/systems/mos/test_inference.py::test_the_summary_is_counted_from_the_lines",
    "adapters merge": "tests/adapters/test_merge.py::test_what_the_command_leaves",
    "adapters fold": "tests/adapters/test_fold.py::test_it_is_the_engines_work",
    "adapters convert": "tests/adapters/test_convert.py::test_from_the_command_line",
    "adapters truncate": "tests/adapters/test_truncate.py::test_from_the_command_line",
    "dimension": "tests/systems/test_dimension.py::test_the_command",
    "train": "tests/training/test_training_run.py::test_the_command_prints_the_table_and_what_to_name",
    "side init": "tests/systems/test_lst.py::test_the_command",
    "compress": "tests/systems/pela/test_factoring.py::test_from_the_command_line",
    "compress expand": "tests/systems/pela/test_factoring.py::test_from_the_command_line",
    "mask magnitude": "tests/systems/test_pafi.py::test_the_command",
    "mask fisher": "tests/systems/test_pafi.py::test_fisher",
    "mask overlap": "tests/systems/test_pafi.py::test_overlap_by_hand",
    "adapters extract": "tests/adapters/test_extract.py::test_what_the_command_says",
}
# The others, each after those above it: what is typed, and a key of the document.
HERE: Mapping[str, tuple[str, str]] = {
    "edit": ("edit model --probe p.safetensors --rows 3 --alpha 1 --out edited", "edits"),
    "patch show": ("patch show edited/patch.safetensors", "tensors"),
    "patch revert": ("patch revert edited/patch.safetensors --model edited --out back", "edits"),
    "patch apply": ("patch apply edited/patch.safetensors --model back --out again", "edits"),
    "patch to-lora": ("patch to-lora edited/patch.safetensors --model model --out lora", "modules"),
    "cil run": ("cil run config.yaml --out banks --device cpu", "records"),
    "cil eval": ("cil eval banks --device cpu", "records"),
}


def test_every_document_is_read() -> None:
    documents = {words.removeprefix("mergebench ") for words, command in COMMANDS.items()
                 if any("--json" in parameter.opts for parameter in command.params)}  # fmt: skip
    assert documents == ELSEWHERE.keys() | HERE.keys()
    assert not ELSEWHERE.keys() & HERE.keys()
    for words, place in ELSEWHERE.items():
        file, name = place.split("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        (test,) = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == name)
        body = ast.get_source_segment(text, test) or ""
        assert '"--json"' in body and all(f'"{word}"' in text for word in words.split()), place


@pytest.mark.usefixtures("one_thread")
def test_one_document_on_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model", gated(torch.float32), config=CONFIG)
    write_probe(Path("p.safetensors"), torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(7)))
    write_encoder(tmp_path / "base")
    rows = [{"id": f"{kind}-{n}", "text": f"w{kind} w{n}", "label": kind} for kind in "ab" for n in range(8)]
    for name, every in (("train", rows[0::2]), ("test", rows[1::2])):
        Path(f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in every))
    settings = {"backbone": "base", "train": "train.jsonl", "test": "test.jsonl", "text": "text", "tasks": 2}
    small = {"seeds": [0], "epochs": 1, "batch": 4, "bottleneck": 2, "align_epochs": 1, "lr": 0.1}
    Path("config.yaml").write_text(json.dumps({**settings, **small}))
    for words, (typed, key) in HERE.items():
        ran = cli(*typed.split(), "--json")
        assert (ran.code, ran.err) == (0, ""), words
        assert ran.out.count("\n") == 1 and key in json.loads(ran.out), words


# -- training ----------------------------------------------------------------------------------------------

SORTS = {"kind": trained.kinds, "objective": trained.objectives, "task": training_tasks}
TRAINED = {f"{sort}: {name}": (room, name) for sort, room in SORTS.items() for name in room.names()}


@pytest.mark.parametrize("label", TRAINED)
def test_what_can_be_trained_has_help_and_is_named(label: str) -> None:
    room, name = TRAINED[label]
    declared, page = room.get(name), code(TEXT["training.md"])
    assert declared.summary
    assert named(name, page)
    for key, parameter in declared.parameters.items():
        assert parameter.help, key
        assert named(key, page), key


def test_every_key_of_a_training_config_is_named() -> None:
    for key in (*config.SPECIAL, *config.PARAMETERS):
        assert named(key, code(TEXT["training.md"])), key
