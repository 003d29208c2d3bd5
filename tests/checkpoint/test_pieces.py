"""Tensors made of pieces of others, and the deltas on them, by hand: sizes at which each rule shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_model
from torch import Tensor

from mergebench.checkpoint.assembled import assemble
from mergebench.checkpoint.boxes import Box, Laid, joined, whole
from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.files import TORCH_DTYPE, Files
from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.kind import Part
from mergebench.checkpoint.layouts import build, quiet, read_as
from mergebench.checkpoint.moved import Deltas, move
from mergebench.deltas.dense import dense
from mergebench.deltas.open import open_model
from mergebench.deltas.scaled import scaled
from mergebench.errors import ModelError

Made = tuple[dict[str, Tensor], dict[str, TensorInfo], Files]


def laid(source: str, *shape: int) -> Laid:
    return Laid(shape, tuple(whole(source, shape)))


def values(info: TensorInfo, files: Files) -> Tensor:
    out = torch.empty(info.numel, dtype=TORCH_DTYPE[info.dtype])
    files.read_elements(info, 0, out)
    return out.view(info.shape)


def test_only_what_is_complete_is_read_as_anothers() -> None:
    shapes = {"a": (2, 3), "b": (4, 3), "c": (3,)}
    wanted = {"ab": joined([laid("a", 2, 3), laid("b", 4, 3)], 0), "rest": laid("c", 3)}
    mine = {"ab": laid("mine", 6, 3)}
    found = read_as(wanted, mine, shapes)
    assert {name: one.shape for name, one in found.items()} == {"a": (2, 3), "b": (4, 3)}
    assert [box.with_fewest_axes() for box in found["b"].boxes] == [Box((12,), 0, (1,), "mine", 6, (1,))]
    half = {"ab": Laid((6, 3), laid("mine", 4, 3).boxes)}  # its last rows are nowhere
    assert read_as(wanted, half, shapes).keys() == {"a"}
    assert read_as(wanted, {"ab": laid("mine", 5, 3)}, shapes) == {}  # of another shape, cut into parts
    # nothing but the name and shape differs: an embedding may have other rows
    assert read_as({"x": laid("c", 3)}, {"x": laid("mine", 5)}, shapes)["c"].shape == (5,)
    assert read_as({"x": laid("b", 4, 3).reshaped((12,))}, {"x": laid("mine", 12)}, shapes)["b"].shape == (4, 3)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    tensors = {
        "f": torch.randn(4, 6), "g": torch.randn(4, 6), "half": torch.randn(4, 6).half(),
        "i": torch.arange(24).view(4, 6), "fp8": torch.randn(4, 6).to(torch.float8_e4m3fn),
        "fp8_scale": torch.rand(4, 1) + 0.5,
    }  # fmt: skip
    model = open_model(str(write_model(tmp_path / "m", tensors, config=None)))
    with Files() as files:
        yield tensors, dict(model.tensors), files


def test_pieces_are_of_the_type_that_holds_them_all(made: Made) -> None:
    tensors, infos, files = made
    turned = {name: laid(name, 4, 6).permuted([1, 0]) for name in tensors}
    real = tensors | {"fp8": tensors["fp8"].float() * tensors["fp8_scale"]}
    types = {"f g": "F32", "half": "F16", "f half": "F32", "fp8": "F32", "i": "I64"}
    for names, dtype in ((several.split(), dtype) for several, dtype in types.items()):
        info = assemble("x", joined([turned[name] for name in names], 1), infos)
        assert info.dtype == dtype
        assert torch.equal(values(info, files), torch.cat([real[name].to(TORCH_DTYPE[dtype]).T for name in names], 1))
    rows = assemble("x", laid("fp8", 4, 6).cut(0, 1, 3), infos)  # its scales are those of the rows
    assert torch.equal(values(rows, files).float(), real["fp8"][1:3])
    with pytest.raises(ModelError, match="x: f and i are joined, of other types"):
        assemble("x", joined([turned["f"], turned["i"]], 0), infos)


def test_the_last_piece_in_memory_is_not_taken_for_another(made: Made) -> None:
    """Of the same tensor: other rows, and in another type."""
    tensors, infos, files = made
    pieces = [laid("half", 4, 6).cut(0, first, first + 2).permuted([1, 0]) for first in (0, 2)]
    for first, piece in zip((0, 2), pieces, strict=True):
        assert torch.equal(values(assemble("x", piece, infos), files), tensors["half"][first : first + 2].T)
    mixed = assemble("x", joined([pieces[1], laid("f", 4, 6).cut(0, 0, 2).permuted([1, 0])], 0), infos)
    assert torch.equal(values(mixed, files), torch.cat([tensors["half"][2:].float().T, tensors["f"][:2].T]))


def change(info: TensorInfo, kind: str = "") -> Delta:
    if kind == "scaled":
        return scaled.on((4, 6), {"factors": Part(info._replace(shape=(4,), nbytes=16))})
    return dense.on((4, 6), {"values": Part(info)}, replace=kind == "whole")


def folded(made: Made, wanted: Laid, deltas: Deltas, base: Tensor) -> Tensor:
    """A tensor of these pieces with the deltas on it, in tiles of two rows."""
    _, infos, files = made
    for delta in move(deltas, {"x": wanted}, infos)["x"]:
        opened = delta.open(files, torch.device("cpu"), Held(base))
        starts = range(0, len(base), opened.rows)
        base = torch.cat([opened.fold(first, base[first : first + opened.rows]) for first in starts])
    return base


class Held:
    def __init__(self, value: Tensor) -> None:
        self._flat = value.reshape(-1)

    def read(self, start: int, out: Tensor) -> None:
        out.copy_(self._flat[start : start + len(out)])


def test_deltas_on_pieces(made: Made) -> None:
    """Each where its piece lies, one read for all of it; elsewhere no bit changes."""
    tensors, infos, _ = made
    f, g = tensors["f"], tensors["g"]
    turned = joined([laid(name, 4, 6).permuted([1, 0]) for name in ("f", "g", "half")], 0)
    base = torch.full((18, 4), -0.0)
    found = folded(made, turned, {"f": (change(infos["g"]),), "g": (change(infos["f"]),)}, base)
    assert torch.equal(found, torch.cat([g.T, f.T, torch.zeros(6, 4)]))
    assert torch.signbit(found[12:]).all()
    rows = joined([laid("f", 4, 6).cut(0, 2, 4), laid("g", 4, 6).cut(0, 0, 2), laid("f", 4, 6).cut(0, 0, 2)], 0)
    found = folded(made, rows, {"f": (change(infos["g"]),), "g": (change(infos["f"]),)}, torch.zeros(6, 6))
    assert torch.equal(found, torch.cat([g[2:], f[:2], g[:2]]))


def test_where_the_pieces_lie_is_part_of_what_a_delta_is(made: Made) -> None:
    _, infos, _ = made
    both = {"f": (change(infos["g"]),), "g": (change(infos["g"]),)}
    ways = [joined([laid("f", 4, 6), laid("g", 4, 6).permuted(dims).reshaped((4, 6))], 0) for dims in ([0, 1], [1, 0])]
    assert len({move(both, {"x": way}, infos)["x"][0].digest for way in ways}) == 2


def test_pieces_saved_whole(made: Made) -> None:
    """One replaces its part of the base, if nothing else changes the tensor."""
    tensors, infos, _ = made
    both, base = joined([laid("f", 4, 6), laid("half", 4, 6)], 0), torch.cat([tensors["f"], tensors["half"].float()])
    whole_f = change(infos["g"], "whole")
    assert torch.equal(folded(made, both, {"f": (whole_f,)}, base), torch.cat([tensors["g"], tensors["half"].float()]))
    more = change(infos["f"])
    for deltas in ({"f": (whole_f,), "half": (more,)}, {"f": (more, whole_f), "half": (more,)}):
        with pytest.raises(ModelError, match="x: an adapter saves a part of it whole"):
            folded(made, both, deltas, base)


def test_a_delta_that_needs_the_base_has_all_of_it(made: Made) -> None:
    tensors, infos, _ = made
    factor = change(infos["g"], "scaled")
    halves = {"x": laid("f", 4, 6).cut(0, 0, 2), "y": laid("f", 4, 6).cut(0, 2, 4)}
    with pytest.raises(ModelError, match="'f', which has parts in other tensors"):
        move({"f": (factor,)}, halves, infos)
    turned = laid("f", 4, 6).permuted([1, 0])
    found = folded(made, turned, {"f": (factor,)}, tensors["f"].T.contiguous())
    torch.testing.assert_close(found, (tensors["g"][0, :4, None] * tensors["f"]).T)


def test_a_number_that_json_cannot_hold() -> None:
    config: dict[str, Any] = {
        "model_type": "mamba2", "architectures": ["Mamba2Model"], "hidden_size": 8, "num_heads": 4, "head_dim": 4,
        "num_hidden_layers": 1, "vocab_size": 9, "state_size": 4, "n_groups": 1,
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
    }  # fmt: skip
    assert list(build(config).config.time_step_limit) == [0.0, float("inf")]


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_as_they_were(shown: bool) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        with quiet():
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled() == shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
