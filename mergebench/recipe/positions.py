"""Where each part of a recipe is written, so that a message can point at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergebench.errors import RecipeError

Loc = tuple[str | int, ...]  # ("models", 1, "model"): keys and list positions from the top


@dataclass
class Places:
    """Map locations in a recipe to places that a user can find, such as `recipe.yaml:7:5`."""

    texts: dict[Loc, str] = field(default_factory=lambda: {(): "recipe"})

    def where(self, loc: Loc) -> str:
        """The place of `loc`, or of the nearest enclosing part that is written in the file."""
        while loc not in self.texts:
            loc = loc[:-1]
        return self.texts[loc]

    def move(self, loc: Loc, text: str) -> None:
        """Set the place of `loc` and all below it to `text`, because a value from the command line replaced them."""
        for old in [old for old in self.texts if old[: len(loc)] == loc]:
            del self.texts[old]
        self.texts[loc] = text

    def error(self, loc: Loc, what: str, hint: str | None = None) -> RecipeError:
        """The exception for an error at `loc`."""
        place = self.where(loc)
        names_loc = not loc or (loc in self.texts and place.startswith("--"))  # `--set a.b=1` says `a.b` already
        return RecipeError(": ".join([place, *([] if names_loc else [dotted(loc)]), what]), hint)


def dotted(loc: Loc) -> str:
    """`models.1.parameters.weight`: the way `--set` spells it."""
    parts = (str(part) for part in loc)
    return ".".join(part if part.isprintable() else repr(part) for part in parts)


def show(value: Any) -> str:
    """A value as it looks in a recipe, short enough for one line."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        numbers = 0 < len(value) <= 4 and all(type(one) in (int, float) for one in value)
        return str(list(value)) if numbers else "a list"  # such as a range
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
