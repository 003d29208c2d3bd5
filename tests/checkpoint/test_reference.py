"""References to models: what cannot be one."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergebench.checkpoint.reference import locate
from mergebench.errors import ModelError


def test_a_pattern_is_no_reference_and_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoint-10", "checkpoint-20", "[x]*"):
        Path("out", name).mkdir(parents=True)
    with pytest.raises(ModelError, match=r"model 'out/checkpoint-\*': no such file or directory") as caught:
        locate("out/checkpoint-*")
    assert caught.value.hint == "name one model; here are out/checkpoint-10, out/checkpoint-20"
    with pytest.raises(ModelError) as caught:
        locate("org/model-?")
    assert caught.value.hint == "a reference names one model, no pattern"
    assert locate("out/[x]*").checkpoint == Path("out/[x]*")


def test_a_directory_called_tilde_is_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("~", "home"):
        Path(name).mkdir()
    assert [locate(text).checkpoint.resolve() for text in ("./~", "~")] == [tmp_path / "~", tmp_path / "home"]


def test_where_a_path_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path of several parts is no name on the hub."""
    monkeypatch.chdir(tmp_path)
    cases = {
        "one/two/three": "looked for in the working directory, then in recipes",
        "one": "a hub model is written org/name",
        "/one/two": None,
    }
    for text, hint in cases.items():
        with pytest.raises(ModelError, match="no such file or directory") as caught:
            locate(text, [Path("recipes")])
        assert caught.value.hint == hint
