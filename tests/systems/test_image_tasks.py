"""What recipes/systems/fetch_images.py makes of what it fetches: series together, images turned, parts apart."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

RECIPES = Path(__file__).parents[2] / "recipes"
CACHE = RECIPES / "systems" / "cache" / "images"
PARTS = ("train", "validation", "test")
pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def fetch() -> Any:
    sys.path.insert(0, str(RECIPES / "systems"))
    try:
        import fetch_images

        return fetch_images
    finally:
        sys.path.remove(str(RECIPES / "systems"))


def test_a_series_has_one_name(fetch: Any) -> None:
    same = ["led_circle_red", "led_circle_Green_02", "led_circle-2"]
    assert {fetch.series(f"signs.led.{name}") for name in same} == {"signs.led.ledcircle"}
    assert fetch.series("food.apple_bw") == fetch.series("food.apple1") != fetch.series("food.redapple")
    assert fetch.series("food.apple") != fetch.series("office.apple")


def test_images_are_turned_by_their_labels(fetch: Any) -> None:
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:8, :4] = 255
    disc = np.full((16, 16), 9, np.uint8)
    items = [fetch.continual.Item(str(n), "x", "", Image.fromarray(pixels)) for n in range(40)]
    parts = fetch.turned({"train": items, "test": [fetch.continual.Item("disc", "x", "", Image.fromarray(disc))]})

    assert parts["test"] == []
    assert {item.label for item in parts["train"]} == {"0", "90", "180", "270"}
    for item in parts["train"]:
        assert np.array_equal(np.asarray(item.content), np.rot90(pixels, int(item.label) // 90))


@pytest.mark.real
@pytest.mark.skipif(not CACHE.is_dir(), reason="python recipes/systems/fetch_images.py fetches it")
def test_the_page_counts_right_and_no_image_is_in_two_parts(fetch: Any) -> None:
    page, seen = (RECIPES / "images" / "README.md").read_text(encoding="utf-8"), {}
    for task in ("digits", "turned-digits", "small-digits", *fetch.THEMES, "turned-clip-art"):
        rows = {
            part: [json.loads(line) for line in (CACHE / task / f"{part}.jsonl").read_text().splitlines()]
            for part in PARTS
        }
        labels = {part: {row["label"] for row in several} for part, several in rows.items()}
        assert labels["train"] == labels["validation"] == labels["test"]
        counts = ", ".join(f"{len(several):,}" for several in rows.values())
        assert re.search(rf"^\| `{task}` \|.* \| {len(labels['train'])} \| {counts} \|$", page, re.MULTILINE), task
        for part, several in rows.items():
            for row in several:
                assert seen.setdefault(row["id"], part) == part
                assert not task.startswith("turned") or seen.setdefault(fetch.series(row["id"]), part)
            if task in fetch.THEMES:
                for row in several:
                    assert seen.setdefault(fetch.series(row["id"]), part) == part
