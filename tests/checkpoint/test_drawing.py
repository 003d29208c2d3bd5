"""The palette as eyes see it: every pair of series tells apart, everything stands out from the paper."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mergebench.checkpoint import drawing
from mergebench.checkpoint.drawing import COLOURS, SERIES

Rgb = NDArray[np.float64]
# Machado, Oliveira and Fernandes 2009, severity 1: protanopia, deuteranopia, tritanopia; on linear light
EYES = {
    "all": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def light(colour: str) -> Rgb:
    """Linear light of a hex colour."""
    value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    found: Rgb = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return found


def oklab(rgb: Rgb) -> Rgb:
    """Ottosson 2020."""
    cones = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
             [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
    lab = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
           [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip
    found: Rgb = np.array(lab) @ np.cbrt(np.array(cones) @ rgb)
    return found


def contrast(one: Rgb, other: Rgb) -> float:
    """WCAG 2.2."""
    low, high = sorted(float(np.dot([0.2126, 0.7152, 0.0722], rgb)) for rgb in (one, other))
    return (high + 0.05) / (low + 0.05)


def test_the_oracles() -> None:
    assert contrast(light("#000000"), light("#ffffff")) == pytest.approx(21)
    assert oklab(light("#ffffff")) == pytest.approx([1, 0, 0], abs=1e-3)


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("theme", [0, 1])
def test_any_two_series_tell_apart(theme: int, eyes: str) -> None:
    names = [name for name, (day, _) in COLOURS.items() if day in SERIES or name == "grey"]
    assert len(names) == 8
    seen = {name: oklab(np.clip(np.array(EYES[eyes]) @ light(COLOURS[name][theme]), 0, 1)) for name in names}
    for one, other in combinations(names, 2):
        assert np.linalg.norm(seen[one] - seen[other]) >= 0.07, (one, other)


@pytest.mark.parametrize("theme", [0, 1])
def test_all_stands_out_from_the_paper(theme: int) -> None:
    paper, shade, ink = (light(COLOURS[name][theme]) for name in ("paper", "shade", "ink"))
    for name in ("ink", "soft", "link"):
        assert contrast(light(COLOURS[name][theme]), paper) >= 4.5, name
    assert contrast(ink, shade) >= 4.5
    for name, colours in COLOURS.items():
        if colours[0] in SERIES or name == "grey":
            assert contrast(light(colours[theme]), paper) >= 3, name


@pytest.mark.parametrize("theme", [0, 1])
def test_ink_is_legible_on_every_heat(theme: int) -> None:
    def value(name: str) -> Rgb:
        return np.array([int(COLOURS[name][theme][i : i + 2], 16) for i in (1, 3, 5)], float)

    ink = light(COLOURS["ink"][theme])
    for share in np.linspace(0, 1, 21):
        blend = np.round(share * value("heat") + (1 - share) * value("paper")).astype(int)
        assert contrast(ink, light("#" + "".join(f"{one:02x}" for one in blend))) >= 4.5, share


def test_no_two_of_many_series_look_alike() -> None:
    looks = [drawing.look(place) for place in range(21)]
    assert len(set(looks)) == 21
    assert len({one.colour for one in looks[:7]}) == 7


def test_names_keep_what_tells_them_apart() -> None:
    names = [f"task_arithmetic {end}" for end in ("as given", "chosen")]
    assert [drawing.short(name) for name in names] == ["task_arith…ic as given", "task_arithmetic chosen"]
    assert drawing.short("a\x00b") == "a·b"


def test_a_map_has_the_palettes_colours(tmp_path: Path) -> None:
    """All of the most is the colour, none of it the paper, as painted."""
    with drawing.plots(200, 100) as (canvas, (axes,)):
        drawing.heat(axes, [[4.0, 0.0, float("nan")]], 4.0)
        drawing.write(canvas, tmp_path / "a.png")
    colours = Image.open(tmp_path / "a.png").convert("RGB").getcolors(1 << 20)
    assert colours is not None
    counts = {f"#{r:02x}{g:02x}{b:02x}": count for count, (r, g, b) in colours}  # type: ignore[misc]
    assert counts[drawing.HEAT] > 1000
    assert max(counts, key=lambda one: counts[one]) == drawing.PAPER
