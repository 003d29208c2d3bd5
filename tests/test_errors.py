"""An error is one line and a hint, whatever the names and texts in it are."""

from __future__ import annotations

import pickle

import pytest

from mergebench.errors import LONGEST, ModelError, first_line


@pytest.mark.parametrize("text, line", [
    ("a.safetensors: no such file", "a.safetensors: no such file"),
    ("two\nlines\tand \x1b[31mred", r"two\nlines\tand \x1b[31mred"),
    ("half \ud83d, turned \u202e, null \0", r"half \ud83d, turned \u202e, null \x00"),
    ("/a/" + "b" * 400 + ": missing", "/a/" + "b" * 400 + ": missing"),
])  # fmt: skip
def test_a_message_is_one_printable_line(text: str, line: str) -> None:
    for error in (ModelError(text, text), pickle.loads(pickle.dumps(ModelError(text, text)))):
        assert error.message == str(error) == error.hint == line


def test_long_names_are_cut_in_the_middle() -> None:
    error = ModelError(f"/models/{'x' * 9000}.safetensors: tensor '{'y' * 9000}.weight' is missing")
    assert len(error.message) <= LONGEST < 500
    parts = ("/models/xxx", "xx.safetensors: tensor 'yyy", "yy.weight' is missing")
    assert [error.message.find(part) >= 0 for part in parts] == [True] * 3
    assert len(ModelError("many short words " * 900).message) <= LONGEST


def test_another_librarys_error_gives_its_first_line() -> None:
    assert first_line(ValueError("  one\ntwo")) == "one"
    assert (
        first_line(ValueError("the server says:\nTrace\n  ValueError: three\n")) == "the server says: ValueError: three"
    )
    try:
        assert not [1]
    except AssertionError as error:
        assert first_line(error)
