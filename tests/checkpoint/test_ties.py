"""Which tensor is an alias of which: by the ends of their names, against a search of all names for each."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mergebench.checkpoint.align import _TIED, Ties
from mergebench.checkpoint.format import Base
from mergebench.checkpoint.header import TensorInfo


def searched(name: str, names: list[str]) -> str | None:
    """By brute force."""
    for end, targets in _TIED.items():
        if f".{name}".endswith(f".{end}"):
            for target in targets:
                matches = [known for known in names if f".{known}".endswith(f".{target}")]
                if len(matches) == 1 and matches[0] != name:
                    return matches[0]
    return None


@pytest.mark.parametrize("seed", range(40))
def test_against_brute_force(seed: int) -> None:
    draw = random.Random(seed)
    ends = sorted({*_TIED, *(target for targets in _TIED.values() for target in targets)})
    stems = ("", "model.", "a.b.", "x", "encoder.")
    pool = [stem + end for stem in stems for end in ends]
    names = draw.sample(pool, draw.randint(1, 9))
    tensors = {name: TensorInfo(name, "F32", (1,), Path(name), 0, 4) for name in names}
    ties = Ties(Base("base", tensors, {}))
    for name in pool:
        expected = searched(name, names)
        assert ties.target(name) == expected
        assert ties.tensor(name) == (None if expected is None else tensors[expected])
    assert Ties(Base("base", tensors, {"tie_word_embeddings": False})).target(names[0]) is None
