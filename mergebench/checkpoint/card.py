"""Markdown beside a result: its card, README.md. Names and settings come from files; in Markdown they stay text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from mergebench.checkpoint.lineage import as_from, parents
from mergebench.errors import escaped


def escape(text: str) -> str:
    """Text that is no Markdown and no HTML, on one line: for a paragraph, an item of a list, a cell."""
    line = re.sub(r"([\\|*_`<\[\]&~$])", r"\\\1", escaped(" ".join(text.split())))
    return re.sub(r"^(#|>|=|[-+](?=\s|-|$)|\d+[.)](?=\s|$))", lambda found: f"{found[0][:-1]}\\{found[0][-1]}", line)


def code(text: object) -> str:
    """Text as a span of code, with more backticks around it than it has in a row."""
    line = escaped(str(text))
    ticks = "`" * (1 + _longest(line))
    room = " " if "`" in line else ""
    return f"{ticks}{room}{line}{room}{ticks}"


def fence(text: str, language: str) -> str:
    """Lines of code as a block, likewise."""
    ticks = "`" * max(3, 1 + _longest(text))
    return f"{ticks}{language}\n{text.strip()}\n{ticks}"


def _longest(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def card(
    name: str,
    parts: Iterable[str],
    *,
    tags: Sequence[str],
    library: str | None = None,
    relation: str | None = None,
    models: Iterable[object] = (),
    inputs: Iterable[object] = (),
    pipeline: str | None = None,
    folders: Sequence[Path] = (),
    title: str | None = None,
) -> str:
    """README.md of a result called `name`: what the hub reads, a title, then paragraphs of Markdown.

    relation: of the result to the models it was made of, in the hub's terms: merge, adapter or finetune. Of `models`,
    references as in recipes, those are named that the hub knows; a licence where all agree on it, `inputs` too.
    """
    models = list(models)
    ids = list(dict.fromkeys(one.id for one in parents(models, folders) if one.id is not None))
    family = parents([*models, *inputs], folders)
    licences = {one.licence for one in family}
    licence = licences.pop() if len(licences) == 1 else None
    head = {
        "library_name": library,
        "pipeline_tag": pipeline,
        "license": licence,
        "base_model": ids,
        "base_model_relation": relation if ids else None,
        "tags": list(tags),
    }
    lines = []
    for key, value in head.items():
        if isinstance(value, list) and value:
            lines += [f"{key}:", *(f"- {one}" for one in value)]
        elif value:
            lines.append(f"{key}: {value}")
    if family and licence is None and any(one.licence for one in family):
        names = {one.name: Path(one.name).name if Path(one.name).is_absolute() else one.name for one in family}
        said = [f"{code(names[one.name])}: {escape(one.licence or 'not stated here')}" for one in family]
        parts = [*parts, "The models that this was made of have these licences:", listed(said)]
    comment = "\n".join(["<!-- To publish it, from this directory:", *publishing(name, "."), "-->"])
    head_lines = "\n".join(["---", *lines, "---", f"# {escape(title or name)}"])
    return "\n\n".join([head_lines, *filter(None, parts), comment]) + "\n"


def publishing(name: str, directory: object) -> list[str]:
    """The commands that put a directory on the hub, under a result's name with what the hub allows in one."""
    allowed = re.sub(r"[^\w.-]+|-{2,}|\.{2,}", "-", name, flags=re.ASCII).strip("-.") or "merge"
    return [f"hf repos create {allowed}", f"hf upload {allowed} {shlex.quote(str(directory))}"]


def linked(reference: object, out: Path, folders: Sequence[Path] = ()) -> str:
    """A reference in the card of `out`: as code, its parts that are on the hub as links, without absolute paths."""
    reference, shown = as_from(reference, out), []
    for one in parents([reference], folders):
        on_hub = one.id is not None and one.name.partition("@")[0] == one.id
        shown.append(f"[{code(one.name)}](https://huggingface.co/{one.id})" if on_hub else code(one.name))
    return " + ".join(shown) if any("](" in one for one in shown) else code(reference)


def listed(items: Iterable[str]) -> str:
    """Items, each Markdown already, as a list; empty for none."""
    return "\n".join(f"- {item}" for item in items)
