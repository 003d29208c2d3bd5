"""Checkpoints of one run, written as one reference: `runs/checkpoint-{2000..6000..500}` or `runs/checkpoint-*`.

A range is that of a shell: first, last and, if given, the step between them; a first with zeros in front pads the
others. Without a step it takes what is there from first to last. Both forms may stand before or after a `+`. What they
name is taken in the order of the numbers in the names, 900 before 1000.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from mergebench.checkpoint.reference import existing, looked_in
from mergebench.errors import RecipeError
from mergebench.recipe.positions import Loc, Places

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)(?:\.\.(\d+))?\}")
MOST = 1000  # checkpoints of a range
FORMS = "write runs/checkpoint-{2000..6000..500} or runs/checkpoint-*"


def expand(data: dict[str, Any], places: Places, folders: Sequence[Path]) -> None:
    """Put the checkpoints in place of every range and glob in the recipe's lists of models."""
    _expand(data, ("models",), places, folders)
    modules = data.get("modules")
    for name, module in modules.items() if isinstance(modules, dict) else ():
        if isinstance(module, dict):
            _expand(module, ("modules", name, "models"), places, folders)


def _expand(holder: dict[str, Any], loc: Loc, places: Places, folders: Sequence[Path]) -> None:
    listed = holder.get("models")
    if isinstance(listed, str) and _is_pattern(listed, folders):
        listed = [{"model": listed}]
    if not isinstance(listed, list):
        return
    entries, origins = [], []
    for number, entry in enumerate(listed):
        text = entry.get("model") if isinstance(entry, dict) else None
        named = [entry]
        if isinstance(text, str) and _is_pattern(text, folders):
            try:
                named = [{**entry, "model": one} for one in checkpoints(text, folders)]
            except RecipeError as error:
                raise places.error((*loc, number, "model"), error.message, error.hint) from None
        entries += named
        origins += [number] * len(named)
    holder["models"] = entries
    _renumber(places, loc, origins)


def _renumber(places: Places, loc: Loc, origins: Sequence[int]) -> None:
    """Give each entry of a list the places of the entry that it was written as."""
    depth = len(loc)
    old = {one: text for one, text in places.texts.items() if one[:depth] == loc and len(one) > depth}
    for one in old:
        del places.texts[one]
    for new, origin in enumerate(origins):
        below = {(*loc, new, *one[depth + 1 :]): text for one, text in old.items() if one[depth] == origin}
        places.texts.update(below)


def _is_pattern(text: str, folders: Sequence[Path]) -> bool:
    return bool(set("*?") & set(text) or _RANGE.search(text)) and existing(text, folders) is None


def checkpoints(text: str, folders: Sequence[Path] = ()) -> list[str]:
    """The references that a range or glob names, in the order of their steps; looked for in the working directory, then
    in `folders`."""
    parts = text.split("+")
    patterns = [at for at, part in enumerate(parts) if set("*?") & set(part) or _RANGE.search(part)]
    if len(patterns) > 1 or len(_RANGE.findall(text)) > 1:
        raise RecipeError(f"'{text}': more than one range or glob", FORMS)
    at = patterns[0]
    pattern = str(Path(parts[at]).expanduser()) if parts[at].startswith("~") else parts[at]
    found = _in_range(pattern, folders) if _RANGE.search(pattern) else _by_glob(pattern, folders)
    found.sort(key=numbers_of)
    for one, other in pairwise(found):
        if numbers_of(one) == numbers_of(other):
            what = f"'{text}': {Path(one).name} and {Path(other).name} are of equal step"
            raise RecipeError(what, "leave one of them out, or list the models")
    return ["+".join([*parts[:at], one, *parts[at + 1 :]]) for one in found]


def _in_range(pattern: str, folders: Sequence[Path]) -> list[str]:
    before, first, last, step, after = _RANGE.split(pattern)
    low, high = sorted((int(first), int(last)))
    if step is None:
        return _between(pattern, before, after, low, high, folders)
    if int(step) == 0 or (high - low) // int(step) >= MOST:
        what = "a step of 0" if int(step) == 0 else f"{(high - low) // int(step) + 1:,} checkpoints"
        raise RecipeError(f"'{pattern}': {what}", FORMS)
    width = len(first) if any(one.startswith("0") and one != "0" for one in (first, last)) else 0
    direction = int(step) if int(first) <= int(last) else -int(step)
    numbers = range(int(first), int(last) + (1 if direction > 0 else -1), direction)
    names = [f"{before}{number:0{width}d}{after}" for number in numbers]
    for folder in (Path(), *folders):
        missing = [name for name in names if existing(str(folder / name)) is None]
        if not missing:
            return names
        if len(missing) < len(names):
            there = [number for number, _ in _there(folder, before, after) if low <= number <= high]
            some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
            shown = ", ".join(map(str, there[:8])) + (", ..." if there[8:] else "")
            hint = f"there are {shown}: take another step, or none: {before}{{{first}..{last}}}{after}"
            raise RecipeError(f"'{pattern}': {some}: missing", hint)
    if "@" in before and "/" in before and not Path(before).parent.is_dir():  # revisions on the hub
        return names
    raise RecipeError(f"'{pattern}': none of its {len(names)} checkpoints is there", _near(before, after, folders))


def _between(pattern: str, before: str, after: str, low: int, high: int, folders: Sequence[Path]) -> list[str]:
    """What there is from one number to another."""
    for folder in (Path(), *folders):
        there = dict(_there(folder, before, after))
        inside = [name for number, name in there.items() if low <= number <= high]
        missing = [end for end in (low, high) if end not in there]
        if inside and missing:
            hint = f"there are {', '.join(map(str, sorted(there)[:8]))}{', ...' if len(there) > 8 else ''}"
            raise RecipeError(f"'{pattern}': {before}{missing[0]}{after}: missing", hint)
        if inside:
            return inside
    raise RecipeError(f"'{pattern}': no checkpoint from {low} to {high} is there", _near(before, after, folders))


def _there(folder: Path, before: str, after: str) -> list[tuple[int, str]]:
    """The checkpoints of any number in a folder."""
    found = _matches(f"{glob.escape(before)}*{glob.escape(after)}", folder)
    parts = ((name[len(before) : len(name) - len(after)], name) for name in found)
    return sorted((int(number), name) for number, name in parts if number.isdecimal())


def _near(before: str, after: str, folders: Sequence[Path]) -> str | None:
    """A hint with the numbers that there are, or where it was looked for."""
    there = next((found for folder in (Path(), *folders) if (found := _there(folder, before, after))), [])
    numbers = [number for number, _ in there]
    if not numbers:
        return looked_in(before + "0" + after, folders)
    return f"there are {', '.join(map(str, numbers[:8]))}{', ...' if numbers[8:] else ''}"


def _by_glob(pattern: str, folders: Sequence[Path]) -> list[str]:
    found = next((named for folder in (Path(), *folders) if (named := _matches(pattern, folder))), [])
    if not found:
        raise RecipeError(f"'{pattern}': no directory or .safetensors file fits", looked_in(pattern, folders))
    if len(found) > MOST:
        raise RecipeError(f"'{pattern}': {len(found):,} models fit", FORMS)
    return found


def _matches(pattern: str, folder: Path) -> list[str]:
    """Models by a glob: directories and .safetensors files."""
    if "\0" in pattern:
        return []
    found = glob.glob(pattern, root_dir=folder)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    return [name for name in found if name.endswith(".safetensors") or (folder / name).is_dir()]


def numbers_of(reference: str) -> tuple[tuple[int, str, int], ...]:
    """A key to sort names by: numbers in them as numbers."""
    words = re.split(r"(\d+)", reference)
    return tuple((1, "", int(word)) if at % 2 else (0, word, 0) for at, word in enumerate(words))


def steps_of(references: Iterable[str]) -> list[int]:
    """The step of each checkpoint: the first number in the names that is different in all of them.

    `RecipeError` if the names have no such number, or are not in its order.
    """
    names = list(references)
    found = [[int(word) for word in re.findall(r"\d+", name)] for name in names]
    bare = next((name for name, numbers in zip(names, found, strict=True) if not numbers), None)
    if bare is not None:
        raise RecipeError(f"'{bare}': its name has no step", "a schedule averages checkpoints of one run: " + FORMS)
    if len(names) == 1:
        return [found[0][-1]]
    columns = list(zip(*found, strict=False))
    steps = next((list(one) for one in columns if len(set(one)) == len(one)), None)
    if steps is None:
        varying = next((one for one in columns if len(set(one)) > 1), columns[0])
        step = next(step for step in varying if varying.count(step) > 1)
        one, other, *_ = (name for name, own in zip(names, varying, strict=True) if own == step)
        what = f"'{one}' and '{other}' are both of step {step}"
        raise RecipeError(what, "a schedule averages checkpoints of one run, each with a step of its own")
    for (one, before), (other, step) in pairwise(zip(names, steps, strict=True)):
        if step < before:
            raise RecipeError(f"'{other}' stands after '{one}'", "list the checkpoints by their steps: " + FORMS)
    return steps
