"""Read the user's input, a YAML file or a mapping, into plain data and the place of every part.

YAML is walked node by node instead of loaded. This gives positions, finds duplicate keys, and rejects values that JSON
cannot hold (dates, sets, tags), since recipes are stored as JSON.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode
from ruamel.yaml.reader import ReaderError

from mergebench.checkpoint.documents import read_bytes
from mergebench.checkpoint.reference import neighbour
from mergebench.errors import RecipeError, first_line
from mergebench.recipe.positions import Loc, Places, show

DEEPEST, MOST = 32, 20_000  # limits on levels and values, because aliases can make a small file endless
TAG = "tag:yaml.org,2002:"
TOO_LARGE = "too large or nested too deep"
PROVENANCE = "mergekit_config.yml"  # the file mergekit writes beside a merged model
STRAY_STAR = "quote a glob that starts with *, a bare one is a YAML alias"


class Document(NamedTuple):
    """One recipe as written: plain data, the place of each part, and the file when it comes from one."""

    data: dict[str, Any]
    places: Places
    path: Path | None
    folders: tuple[Path, ...] = ()  # where its relative paths are looked up after the working directory
    given: bool = True  # the user named this file, and not a directory that holds it


def read(source: str | os.PathLike[str] | Mapping[str, Any]) -> list[Document]:
    """The documents of a YAML file (`-`: of stdin), or a mapping as one document; of a directory, the recipe that a
    result of ours or of mergekit was made by."""
    path: Path | None = None
    folders: tuple[Path, ...] = ()
    given = True
    if isinstance(source, Mapping):
        places = Places()
        found = [(plain(source, (), places), places)]
    elif os.fspath(source) == "-":
        found = parse_all(decoded(sys.stdin.buffer.read(), "stdin"), "stdin")
    else:
        if "\n" in os.fspath(source):
            raise RecipeError("a recipe is given as a path or a mapping, got text", "load the YAML text first")
        path = Path(source)
        given, result = not path.is_dir(), None
        if (path / PROVENANCE).is_file():
            path = path / PROVENANCE
        elif not given:
            result = recorded(path)
        if result is not None:
            places = Places({(): str(path)})
            found, folders = [(plain(result[0], (), places), places)], result[1]
        else:
            found, folders = parse_all(text_of(path), str(path)), (path.parent,)
    for data, places in found:
        if data is None or data == {}:
            raise places.error((), "empty", "a recipe names at least a merge_method and models")
        if not isinstance(data, dict):
            raise places.error((), f"a recipe is a mapping, got {show(data)}", "begin with merge_method: and models:")
    return [Document(data, places, path, folders, given) for data, places in found]


def recorded(directory: Path) -> tuple[dict[str, Any], tuple[Path, ...]] | None:
    """The recipe that a result of ours was made by, and where its relative paths were looked up; None if there is no
    result."""
    from mergebench.checkpoint.target import finished  # torch comes with it

    found = finished(directory)
    if found is None:
        return None
    recipe, folders = found.get("recipe", {}), found.get("folders", [])
    if "merge_method" not in recipe or (found.get("edits") and "edits" not in recipe):
        raise RecipeError(f"{directory}: it was not made by a recipe alone", "name the file of a recipe")
    return recipe, tuple(Path(one) for one in folders if isinstance(one, str))


def parse(text: str, name: str, places: Places) -> Any:
    """The value of a text's one YAML document; its positions go into `places`."""
    (data, found), *more = parse_all(text, name)
    if more:
        where = more[0][1].where(())
        raise RecipeError(f"{where}: several documents: not supported yet", "write one document a file")
    places.texts.update(found.texts)
    return data


def parse_all(text: str, name: str) -> list[tuple[Any, Places]]:
    """The value of every YAML document that is not empty, each with its positions; at least one."""
    try:
        with warnings.catch_warnings(action="ignore"):  # the warning about an anchor defined twice, which YAML allows
            nodes = [node for node in YAML(typ="safe", pure=True).compose_all(text) if node is not None]
            found = [(Walk(name, places := Places({(): name})).value(node, ()), places) for node in nodes]
        return [one for one in found if one[0] is not None] or found[:1] or [(None, Places({(): name}))]
    except ReaderError as error:
        raise RecipeError(f"{spot(name, text[: error.position])}: not valid YAML: control character") from None
    except MarkedYAMLError as error:
        at, problem = error.problem_mark or error.context_mark, error.problem or error.context
        where = name if at is None else f"{name}:{at.line + 1}:{at.column + 1}"
        hint = STRAY_STAR if problem and "undefined alias" in problem else None
        raise RecipeError(f"{where}: not valid YAML: {problem}", hint) from None
    except YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML: {first_line(error)}") from None
    except RecursionError:
        raise RecipeError(f"{name}: {TOO_LARGE}") from None


class Walk:
    """One pass over a YAML tree: builds the plain value and records the place of every part."""

    def __init__(self, name: str, places: Places) -> None:
        self.name, self.places = name, places
        self.scalars = YAML(typ="safe", pure=True).constructor
        self.count = 0

    def value(self, node: Node, loc: Loc) -> Any:
        self.count += 1
        if self.count > MOST or len(loc) > DEEPEST:
            raise RecipeError(f"{self.name}: {TOO_LARGE}")
        if not loc or loc not in self.places.texts:  # the place of a mapping's entry is its key, recorded before
            self.places.texts[loc] = self.at(node)
        if node.tag == TAG + "map" and isinstance(node, MappingNode):
            return self.mapping(node, loc)
        if node.tag == TAG + "seq" and isinstance(node, SequenceNode):
            return [self.value(item, (*loc, i)) for i, item in enumerate(node.value)]
        if node.tag not in {TAG + tag for tag in ("str", "int", "float", "bool", "null")}:
            tag = str(node.tag).removeprefix(TAG)
            raise RecipeError(f"{self.at(node)}: no place for a YAML {tag} here", "quote it if it is text")
        try:
            return plain(self.scalars.construct_object(node), loc, self.places)
        except (ValueError, KeyError):  # `!!int x`, or more digits than Python converts
            tag = node.tag.removeprefix(TAG)
            raise RecipeError(f"{self.at(node)}: not valid YAML: {show(node.value)} is no {tag}") from None

    def mapping(self, node: MappingNode, loc: Loc) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            if key.tag == TAG + "merge":
                for one in value.value if isinstance(value, SequenceNode) else [value]:
                    more = self.value(one, (*loc, "<<"))
                    if not isinstance(more, dict):
                        raise RecipeError(f"{self.at(key)}: not valid YAML: << takes a mapping")
                    merged = {**more, **merged}
                continue
            if key.tag != TAG + "str":
                raise RecipeError(f"{self.at(key)}: a key must be text, got {show(key.value)}", "quote it")
            here = (*loc, key.value)
            self.places.texts[here] = self.at(key)
            if key.value in found:
                raise self.places.error(here, "given twice", f"it is in line {lines[key.value]} already")
            lines[key.value] = key.start_mark.line + 1
            found[key.value] = self.value(value, here)
        return {**merged, **found}

    def at(self, node: Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def plain(value: Any, loc: Loc, places: Places) -> Any:
    """A copy made of dict, list, str, int, float, bool and None alone, as JSON has them."""
    if len(loc) > DEEPEST:
        raise RecipeError(f"{places.where(())}: {TOO_LARGE}")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (str, os.PathLike)):
        return str(os.fspath(value))
    if isinstance(value, int):
        if abs(value) >= 2**63:
            raise places.error(loc, "too large a number")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise places.error(loc, f"must be finite, got {float(value)}")
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise places.error(loc, f"a key must be text, got {show(key)}")
        return {str(key): plain(item, (*loc, key), places) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, (*loc, i), places) for i, item in enumerate(value)]
    raise places.error(loc, f"no place for a Python {type(value).__name__} here")


def spot(name: str, before: str) -> str:
    """The place right after the text `before`."""
    return f"{name}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"


def text_of(path: Path) -> str:
    try:
        raw = read_bytes(path)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file", neighbour(str(path))) from None
    except IsADirectoryError:
        hint = f"name the file itself, or a directory with a result or mergekit's {PROVENANCE}"
        raise RecipeError(f"{path}: a directory, not a YAML file", hint) from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return decoded(raw, str(path))


def decoded(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode()
        raise RecipeError(f"{spot(name, before)}: not UTF-8 text", "save the file as UTF-8") from None


def find(source: str | os.PathLike[str], folders: Sequence[Path], folder: bool = False) -> Path | None:
    """A file, or a `folder`, from the working directory, then from `folders`; None where it is in none of them."""
    try:
        path = Path(source).expanduser()
        fits = Path.is_dir if folder else Path.is_file
        return next((place for place in [path, *(above / path for above in folders)] if fits(place)), None)
    except (OSError, RuntimeError, ValueError):  # too long for a path, or the home of an unknown user
        return None
