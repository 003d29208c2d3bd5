"""References to models: what cannot be one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergebench.checkpoint.reference import locate, name_of, reference_of
from mergebench.deltas.open import open_model
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


def test_a_component_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached pipeline has weights in folders alone; a folder of it is a reference of its own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    commit, repository = "0" * 40, tmp_path / "hub/models--org--pipe"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    (snapshot / "unet").mkdir(parents=True)
    save_file({"w": torch.ones(2)}, snapshot / "unet/diffusion_pytorch_model.safetensors")
    (snapshot / "model_index.json").write_text('{"unet": ["diffusers", "A"]}')
    assert locate("org/pipe").checkpoint == snapshot
    assert locate("org/pipe/unet").checkpoint == snapshot / "unet"
    assert reference_of(snapshot / "unet") == f"org/pipe/unet@{commit}"
    assert locate(f"org/pipe/unet@{commit}").checkpoint == snapshot / "unet"
    assert list(open_model("org/pipe").tensors) == ["unet/w"] and name_of(snapshot / "unet") == "unet"
    with pytest.raises(ModelError):
        locate("org/pipe/vae")
    Path("org").mkdir()
    with pytest.raises(ModelError, match="no such file or directory"):
        locate("org/pipe/unet")


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
