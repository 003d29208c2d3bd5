"""Files of deltas: what their metadata say is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_model
from safetensors.torch import save_file

from mergebench.deltas.open import open_model
from mergebench.errors import RunError


def written(folder: Path, **settings: Any) -> str:
    """A base of zeros and a file that adds a product of ones to it."""
    write_model(folder / "base", {"w": torch.zeros(2, 3)}, config=None)
    parts = {"b": "w.b", "a": "w.a"}
    entry = {"kind": "low_rank", "settings": settings, "parts": parts}
    about = {"base": None, "shared": [], "made": {}, "tensors": {"w": entry}}
    file = folder / "d.safetensors"
    save_file({"w.b": torch.ones(2, 1), "w.a": torch.ones(1, 3)}, file, metadata={"delta": json.dumps(about)})
    return f"{folder / 'base'}+{file}"


def test_a_whole_number_is_a_number(tmp_path: Path) -> None:
    found = open_model(written(tmp_path, scale=10**30)).state_dict()["w"]
    assert torch.equal(found, torch.full((2, 3), 1e30))


@pytest.mark.parametrize("scale", ["2", None, [1], True])
def test_a_setting_of_another_type_is_named(tmp_path: Path, scale: Any) -> None:
    with pytest.raises(RunError, match="w: scale: must be a finite number, got"):
        open_model(written(tmp_path, scale=scale))
