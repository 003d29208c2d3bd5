"""The keys about tokens: the vocabulary of the output, and rows for single tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergebench.recipe.positions import Loc, Places, show

_SOURCE = "write {source: MODEL}, {source: {kind: zero}} or {source: {kind: model_token, model: MODEL, token: TEXT}}"
_ROWS = {"zero": set(), "model_token": {"model", "token", "token_id"}}


@dataclass(frozen=True)
class TokenSource:
    """The row of one token in models that lack it, or, with `force`, in all of them: a model's, or zeros."""

    model: str | None = None  # None: zeros
    token: str | None = None  # of that model; if neither is given, the token itself
    token_id: int | None = None
    force: bool = False

    def to_plain(self) -> dict[str, Any]:
        row: Any = self.model if self.model is not None else {"kind": "zero"}
        if self.token is not None:
            row = {"kind": "model_token", "model": self.model, "token": self.token}
        elif self.token_id is not None:
            row = {"kind": "model_token", "model": self.model, "token_id": self.token_id}
        return {"source": row, "force": self.force}


@dataclass(frozen=True)
class Vocabulary:
    """The output's tokens: `base`, `union` or those of a model; tokens with a given row; padding."""

    source: str
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    def to_plain(self) -> dict[str, Any]:
        found: dict[str, Any] = {"source": self.source}
        if self.tokens:
            found["tokens"] = {token: source.to_plain() for token, source in self.tokens.items()}
        if self.pad_to_multiple_of is not None:
            found["pad_to_multiple_of"] = self.pad_to_multiple_of
        return found


def vocabulary(found: Mapping[str, Any], places: Places) -> Vocabulary | None:
    """The vocabulary that a checked recipe asks for; None if the models share the base's."""
    if "tokenizer_source" in found and "tokenizer" in found:
        raise places.error(("tokenizer_source",), "cannot be given with tokenizer", "give one of them")
    if "tokenizer_source" in found:
        return Vocabulary(found["tokenizer_source"].removeprefix("model:"))  # mergekit's mark of a model
    if "tokenizer" not in found:
        return None
    given = found["tokenizer"]
    tokens = {}
    for token, written in (given.get("tokens") or {}).items():
        tokens[token] = _token(written, ("tokenizer", "tokens", token), places)
    return Vocabulary(given.get("source", "union").removeprefix("model:"), tokens, given.get("pad_to_multiple_of"))


def _token(written: Any, loc: Loc, places: Places) -> TokenSource:
    if not isinstance(written, dict) or not written.get("source") or written.keys() - {"source", "force"}:
        raise places.error(loc, f"must be a mapping with a source, got {show(written)}", _SOURCE)
    source, force = written["source"], written.get("force", False)
    if not isinstance(force, bool):
        raise places.error((*loc, "force"), f"must be true or false, got {show(force)}")
    if isinstance(source, str):
        return TokenSource(source, force=force)
    here = (*loc, "source")
    kind = source.get("kind") if isinstance(source, dict) else None
    if not isinstance(kind, str) or kind not in _ROWS or source.keys() - {"kind"} - _ROWS[kind]:
        raise places.error(here, f"must be a model, or of kind zero or model_token, got {show(source)}", _SOURCE)
    if kind == "zero":
        return TokenSource(force=force)
    model, token, number = source.get("model"), source.get("token"), source.get("token_id")
    if not isinstance(model, str) or (token is None) == (number is None):
        raise places.error(here, "must name a model, and either a token or a token_id", _SOURCE)
    if token is not None and not isinstance(token, str):
        raise places.error((*here, "token"), f"must be text, got {show(token)}", "put it in quotes")
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 0):
        raise places.error((*here, "token_id"), f"must be a whole number, at least 0, got {show(number)}")
    return TokenSource(model, token, number, force)
