"""A task's items: which lines are read, and in which order."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from mergebench.errors import RunError
from mergebench.networks.items import contents, read_rows


def written(place: Path, *lines: object) -> Path:
    place.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return place


def test_the_first_lines_are_read_and_no_more(tmp_path: Path) -> None:
    file = written(tmp_path / "a", {"id": 1, "x": "a"}, {"id": "2", "x": "b"}, "not JSON")
    assert [row.id for row in read_rows(file, "id", ["x"], 2)] == ["1", "2"]
    with pytest.raises(RunError, match=r"a:3:1: not valid JSON"):
        read_rows(file, "id", ["x"], 3)
    with pytest.raises(RunError, match=r"a:3:1: not valid JSON"):
        read_rows(file, "id", ["x"], 1, seed=0)


def test_drawn_lines_are_in_the_files_order(tmp_path: Path) -> None:
    file = written(tmp_path / "a", *({"id": number} for number in range(50)))
    drawn = [int(row.id) for row in read_rows(file, "id", [], 20, seed=3)]
    assert drawn == sorted(random.Random(3).sample(range(50), 20))


@pytest.mark.parametrize("wrong", [True, "", None, 1.5, [1]])
def test_what_is_no_id(tmp_path: Path, wrong: object) -> None:
    with pytest.raises(RunError, match="a:1: id must be text or a whole number"):
        read_rows(written(tmp_path / "a", {"id": wrong}), "id", [])


@pytest.mark.parametrize("listed", [True, False])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, listed: bool) -> None:
    text = '[{"id": 1}]' if listed else '{"id": 1}\n'
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [row.id for row in read_rows(tmp_path / "a", "id", [])] == ["1"]


def test_the_line_of_a_list_that_is_broken(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"a:3:3: not valid JSON"):
        read_rows(written(tmp_path / "a", '[{"id": 1},', "", "  oops]"), "id", [])


def test_an_item_is_its_id_and_its_columns(tmp_path: Path) -> None:
    one, other = (read_rows(written(tmp_path / name, {"id": 1, "x": name}), "id", ["x"]) for name in "ab")
    assert contents(one).keys() != contents(other).keys()
    same = read_rows(written(tmp_path / "c", "", {"x": "a", "id": 1}), "id", ["x"])
    assert contents(one).keys() == contents(same).keys()
    assert [place.rpartition("/")[2] for place in contents(same).values()] == ["c:2"]
