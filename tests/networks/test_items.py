"""A task's items: which lines are read, and in which order."""

from __future__ import annotations

import csv
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


# -- items without ids, and tables -------------------------------------------------------------------


def test_an_item_without_an_id_is_known_by_what_it_says(tmp_path: Path) -> None:
    """Wherever its line stands; the same text twice is two items; another label is another item."""
    a, b, c = ({"text": text, "label": "x"} for text in "abc")
    first = read_rows(written(tmp_path / "1", a, b, a), "id", ["text", "label"])
    moved = read_rows(written(tmp_path / "2", c, a, b, a), "id", ["text", "label"])
    assert len({row.id for row in first}) == 3 and first[2].id == f"{first[0].id}#2"
    assert {row.id: row.values[0] for row in moved}.items() >= {row.id: row.values[0] for row in first}.items()
    (other,) = read_rows(written(tmp_path / "3", a | {"label": "y"}), "id", ["text", "label"])
    assert other.id not in {row.id for row in first}


def test_a_leak_between_splits_is_seen_without_ids(tmp_path: Path) -> None:
    test = read_rows(written(tmp_path / "1", {"text": "a"}, {"text": "b"}), "id", ["text"])
    validation = read_rows(written(tmp_path / "2", {"text": "c"}, {"text": "b"}), "id", ["text"])
    assert len(contents(test).keys() & contents(validation).keys()) == 1


@pytest.mark.parametrize(
    ("lines", "column", "says"),
    [
        ([{"x": 1}, {"id": 2, "x": 2}], "id", "f:2: it has an id, the rows before it have none"),
        ([{"id": 1, "x": 1}, {"x": 2}], "id", "f:2: no column 'id', it has x"),
        ([{"x": 1}], "key", "f:1: no column 'key', it has x"),  # what was asked for by name
    ],
)
def test_ids_are_there_or_not(tmp_path: Path, lines: list[object], column: str, says: str) -> None:
    with pytest.raises(RunError, match=says):
        read_rows(written(tmp_path / "f", *lines), column, ["x"])


def test_a_table_is_the_same_items(tmp_path: Path) -> None:
    """Python's own writer: quotes, commas, line ends and other alphabets in cells; a mark at the beginning."""
    rows = [{"id": "1", "text": 'a, "b"\nc', "label": "x"}, {"id": "2", "text": "ö 文 '", "label": "y"}]
    with open(tmp_path / "t.csv", "w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, ["label", "text", "id"])
        writer.writeheader()
        writer.writerows(rows)
    lines = read_rows(written(tmp_path / "t.jsonl", *rows), "id", ["text", "label"])
    table = read_rows(tmp_path / "t.csv", "id", ["text", "label"])
    assert [row[1:] for row in table] == [row[1:] for row in lines]
    assert [row.where.rpartition("/")[2] for row in table] == ["t.csv:2", "t.csv:4"]
    assert contents(table).keys() == contents(lines).keys()


def test_a_long_cell(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"id,text\n1,{'x' * 200_000}\n\n")
    assert len(read_rows(tmp_path / "t.csv", "id", ["text"])[0].values[0]) == 200_000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("id,text\n1,a,b\n", r"t.csv:2: 3 cells, the heads are 2"),
        ("id,text\n1,a\n2\n", r"t.csv:3: 1 cell, the heads are 2"),
        ("id,id\n1,2\n", r"t.csv:1: two columns have one name"),
        ("id,\n1,2\n", r"t.csv:1: two columns have one name, or one has none"),
        ('id,text\n1,"a\n', r"t.csv:2: not valid CSV"),
        ("id,text\n", r"t.csv: it holds no items"),
        ("", r"t.csv: it holds no items"),
        ("id;text\n1;a\n", r"t.csv:2: no column 'text', it has id;text"),
        ("id,text\n1,\xff\n", r"t.csv: not UTF-8 text"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "t.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=says):
        read_rows(tmp_path / "t.csv", "id", ["text"])


def test_a_table_under_another_name_is_told_its_name(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        read_rows(written(tmp_path / "t.txt", "id,text", "1,a"), "id", ["text"])
    assert ".csv" in (caught.value.hint or "")
