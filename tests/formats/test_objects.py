"""Small files of JSON: what is an object, and what is said of all else."""

from __future__ import annotations

import pytest

from streammerge.formats.objects import UnreadableError, object_of, read_object


def test_an_object_is_read(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": [1, 2.5], "b": "\xc3\xa9"}')
    assert read_object(tmp_path / "x.json", 40) == {"a": [1, 2.5], "b": "é"}
    assert object_of(b'{"a": 7}', parse_int=lambda digits: -int(digits)) == {"a": -7}


@pytest.mark.parametrize(
    ("encoded", "told"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[]", "it is no map"),
        (b"7", "it is no map"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "it names 'c' twice"),
        (b'{"a": "\xff"}', "can't decode byte 0xff"),
        ('{"a": "\ud800"}'.encode("utf-8", "surrogatepass"), "can't decode byte 0xed"),
        (b"[" * 200_000, "recursion"),
        (b'{"a": ' + b"7" * 5000 + b"}", "Exceeds the limit"),
    ],
)
def test_what_is_no_object_is_told(encoded, told):
    with pytest.raises(UnreadableError, match=told):
        object_of(encoded)


def test_a_file_that_can_not_be_read_is_told(tmp_path):
    (tmp_path / "x.json").write_bytes(b'{"a": 1}')
    with pytest.raises(UnreadableError, match="longer than 7 bytes"):
        read_object(tmp_path / "x.json", 7)
    with pytest.raises(UnreadableError, match="No such file"):
        read_object(tmp_path / "y.json", 7)
