"""Text, JSON and CSV files are read back the same, and are written completely or not at all."""

import pytest
from stored import files_in

from rnp.errors import UserError
from rnp.io.files import (
    atomic_write,
    read_json,
    read_rows,
    sha256,
    upsert_rows,
    write_json,
    write_rows,
    write_text,
)


def test_rows_and_text(path):
    write_rows(path, [{"x": 1, "y": "a,b"}, {"x": 2, "y": 'c"'}])
    assert read_rows(path) == [{"x": "1", "y": "a,b"}, {"x": "2", "y": 'c"'}]
    write_json(path, {"é": [1, None]})
    assert read_json(path) == {"é": [1, None]}


def test_sha256_of_a_known_text(path):
    write_text(path, "abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(path) == digest


def test_an_exception_leaves_the_old_file_and_no_draft(tmp_path):
    file = tmp_path / "file"
    write_text(file, "old")
    with pytest.raises(KeyboardInterrupt), atomic_write(file) as draft:
        draft.write_text("half of the n")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    assert files_in(tmp_path) == ["file"]


def test_a_missing_json_file_has_a_default_if_one_is_given(path):
    assert read_json(path, {"x": 1}) == {"x": 1}
    with pytest.raises(UserError, match="does not exist; run the stage that writes it"):
        read_json(path)


@pytest.mark.parametrize(
    "text, message", [("{", "is no valid JSON"), ("[1]", "holds a list, not a JSON object")]
)
def test_a_file_that_is_no_json_object_is_refused(text, message, path):
    write_text(path, text)
    with pytest.raises(UserError, match=message):
        read_json(path, {})


def test_new_rows_replace_those_with_the_same_key(path):
    columns = ("model", "seed", "ca")
    key = ("model", "seed")
    upsert_rows(path, [{"model": "b", "seed": 0, "ca": 1}], columns, key)
    rows = [{"model": "b", "seed": 0, "ca": 2}, {"model": "a", "seed": 1, "ca": 3}]
    upsert_rows(path, rows, columns, key)
    assert [tuple(row.values()) for row in read_rows(path)] == [("a", "1", "3"), ("b", "0", "2")]


def test_rows_with_other_columns_are_refused(path):
    write_rows(path, [{"x": 1, "y": 2}])
    with pytest.raises(UserError, match="has other columns than rows of this version"):
        upsert_rows(path, [{"x": 1}], ("x",), ("x",))
    assert read_rows(path) == [{"x": "1", "y": "2"}]
