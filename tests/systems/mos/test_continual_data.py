"""What recipes/continual/fetch.py makes of what it fetches: parts without a common item, packages read and refused."""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mergebench.systems.mos.config import load_config
from mergebench.systems.mos.split import read_data, split

RECIPES = Path(__file__).parents[3] / "recipes"
CACHE = RECIPES / "continual" / "cache"
pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def fetch() -> Any:
    sys.path.insert(0, str(RECIPES))
    try:
        from continual import fetch

        return fetch
    finally:
        sys.path.remove(str(RECIPES))


def deb(file: Path, files: dict[str, bytes]) -> Path:
    """A Debian package: an odd member in front shows whether padding is read."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    out = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n!"), ("data.tar.xz", inner.getvalue())):
        out += f"{name:<16}{'0':<12}{'0':<6}{'0':<6}{'100644':<8}{len(content):<10}`\n".encode()
        out += content + b"\n" * (len(content) % 2)
    file.write_bytes(out)
    return file


def png(size: tuple[int, int], mark: tuple[int, int, int, int]) -> bytes:
    """Transparent, with black where nothing is seen; of the middle half two quarters that touch are of a colour."""
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    for start in (1, 2):
        (left, upper), (right, lower) = ([side * at // 4 for side in size] for at in (start, start + 1))
        image.paste(mark, (left, upper, right, lower))
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


def test_parts_share_nothing_and_keep_their_shares(fetch: Any) -> None:
    items = [fetch.Item(f"{label}{n}", label, f"{label}{n // 2}", "") for label in "ab" for n in range(40)]
    items += [fetch.Item("x", "a", "same", ""), fetch.Item("y", "b", "same", "")]  # nobody could tell
    parts = fetch.split(items, 10, (0.3, 0.2))

    keys = [item.key for part in parts.values() for item in part]
    assert len(set(keys)) == len(keys) and "same" not in keys
    assert {name: Counter(item.label for item in part) for name, part in parts.items()} == {
        "test": {"a": 3, "b": 3}, "validation": {"a": 2, "b": 2}, "train": {"a": 5, "b": 5},
    }  # fmt: skip
    assert fetch.split(items[::-1], 10, (0.3, 0.2)) == parts


def test_a_group_is_in_one_part(fetch: Any) -> None:
    items = [fetch.Item(f"{n}", "a", f"{n}", "", f"g{n // 3}") for n in range(40)]
    parts = fetch.split(items, 30, (0.3, 0.2))

    groups = {name: {item.group for item in part} for name, part in parts.items()}
    assert sum(map(len, groups.values())) == len(set().union(*groups.values()))
    assert sum(map(len, parts.values())) == 30 and len(parts["test"]) in range(9, 12)


def test_pictures_come_out_of_a_package_whole_and_once(
    fetch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "LARGEST", 10_000)
    place = "./usr/share/openclipart/png/"
    red = png((60, 120), (255, 0, 0, 255))
    files = {
        f"{place}animals/birds/red.png": red,
        f"{place}office/desk/blue.png": png((50, 50), (0, 0, 255, 255)),
        f"{place}office/empty.png": png((8, 8), (0, 0, 0, 0)),
        f"{place}office/damaged.png": red[:80],
        f"{place}office/huge.png": png((101, 100), (1, 1, 1, 255)),
        f"{place}unsorted/other.png": red,
    }
    with fetch.open_debian(deb(tmp_path / "one.deb", files)) as archive:
        found = {item.id: item for item in fetch.read_pictures(archive)}

    assert {name: item.label for name, item in found.items()} == {
        "animals.birds.red": "birds", "office.desk.blue": "office",
    }  # fmt: skip
    bird = found["animals.birds.red"].content  # 30 x 60 are drawn: the sides are filled up with white
    assert bird.size == (112, 112)
    assert [bird.getpixel(at) for at in ((35, 5), (75, 105))] == [(255, 0, 0)] * 2
    assert [bird.getpixel(at) for at in ((75, 5), (35, 105), (3, 56))] == [(255, 255, 255)] * 3


def test_a_package_of_another_content_is_refused(fetch: Any, tmp_path: Path) -> None:
    file = deb(tmp_path / "thing_1%3a2.0-1_all.deb", {"./a": b"a"})
    right = hashlib.sha256(file.read_bytes()).hexdigest()

    assert fetch.download_debian("thing", "1:2.0-1", right, tmp_path, tmp_path) == file
    with pytest.raises(SystemExit, match="its SHA-256 is another"):
        fetch.download_debian("thing", "1:2.0-1", "0" * 64, tmp_path, tmp_path)


@pytest.mark.real
@pytest.mark.skipif(not (CACHE / "nouns").is_dir(), reason="python recipes/continual/fetch.py fetches it")
@pytest.mark.parametrize("name", ["pictures", "nouns"])
def test_the_page_counts_right_and_no_item_is_on_two_sides(name: str) -> None:
    parts, seen = {}, {}
    for part in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (CACHE / name / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        parts[part] = rows
        for row in rows:
            if name == "nouns":
                key = re.sub(r"[\W_]+", "", row["text"].lower())
            else:
                with Image.open(CACHE / name / row["image"]) as image:
                    key = hashlib.sha256(image.tobytes()).hexdigest()
            assert seen.setdefault(key, row["id"]) == row["id"]
    page = (RECIPES / "continual" / "README.md").read_text(encoding="utf-8")
    assert f"`{name}.yaml` | {', '.join(str(len(rows)) for rows in parts.values())} " in page
    assert len({frozenset(row["label"] for row in rows) for rows in parts.values()}) == 1


@pytest.mark.real
@pytest.mark.skipif(not (CACHE / "nouns").is_dir(), reason="python recipes/continual/fetch.py fetches it")
@pytest.mark.parametrize("file", sorted((RECIPES / "continual").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_reads_and_divides(file: Path) -> None:
    config = load_config(file)
    data = read_data(config)
    tasks = split(config, data, 0)

    assert len(tasks) == 5 and len({len(task) for task in tasks}) == 1
    assert {name for task in tasks for name in task} == set(data.test.labels)
