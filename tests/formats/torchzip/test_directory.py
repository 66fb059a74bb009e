"""A zip's directory is read as zipfile and torch write it, and every contradiction in it is an error."""

from __future__ import annotations

import contextlib
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.formats.torchzip import directory as zip_directory
from streammerge.formats.torchzip.directory import MAX_MEMBERS, MalformedZipError, folded, read_at, read_directory

FULL = 2**32 - 1


@dataclass(frozen=True)
class Raw:
    """A member as it is written: what its own header and the directory say may differ."""

    name: bytes = b"a/b"
    data: bytes = b"12345678"
    flags: int = 0
    method: int = 0
    disk: int = 0
    nbytes: int | None = None
    packed: int | None = None
    start: int | None = None
    extra: bytes = b""
    comment: bytes = b""
    local_name: bytes | None = None
    local_flags: int | None = None
    local_method: int | None = None
    local_nbytes: int | None = None
    local_extra: bytes = b""
    local_signature: bytes = b"PK\3\4"
    signature: bytes = b"PK\1\2"

    def local(self) -> bytes:
        """Its own header and its data."""
        name = self.name if self.local_name is None else self.local_name
        nbytes = len(self.data) if self.local_nbytes is None else self.local_nbytes
        flags = self.flags if self.local_flags is None else self.local_flags
        method = self.method if self.local_method is None else self.local_method
        sizes = (nbytes, nbytes, len(name), len(self.local_extra))
        header = struct.pack("<4s5H3L2H", self.local_signature, 20, flags, method, 0, 0, 0, *sizes)
        return header + name + self.local_extra + self.data

    def entry(self, start: int) -> bytes:
        """What the directory says of it."""
        nbytes = len(self.data) if self.nbytes is None else self.nbytes
        packed = nbytes if self.packed is None else self.packed
        start = start if self.start is None else self.start
        lengths = (len(self.name), len(self.extra), len(self.comment))
        fixed = struct.pack(
            "<4s6H3L5H2L", self.signature, 20, 20, self.flags, self.method, 0, 0, 0, packed, nbytes, *lengths,
            self.disk, 0, 0, start,
        )  # fmt: skip
        return fixed + self.name + self.extra + self.comment


def build(
    members: Sequence[Raw],
    *,
    count: int | None = None,
    length: int | None = None,
    start: int | None = None,
    disks: tuple[int, int] = (0, 0),
    wide: tuple[int, ...] | None = None,
    before_end: bytes = b"",
    comment: bytes = b"",
) -> bytes:
    """A zip of these members, with an end record that may lie; `wide` are the fields of a zip64 end record."""
    body, directory = b"", b""
    for member in members:
        directory += member.entry(len(body))
        body += member.local()
    place = len(body) if start is None else start
    size = len(directory) if length is None else length
    number = len(members) if count is None else count
    wide_end = b""
    if wide is not None:
        wide_end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, *wide)
        wide_end += struct.pack("<4sLQL", b"PK\6\7", 0, len(body) + len(directory) + len(before_end), 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", *disks, number, number, size, place, len(comment))
    return body + directory + before_end + wide_end + end + comment


def read(data: bytes) -> dict[str, bytes]:
    """Every member's bytes, by what the directory says."""
    file = BytesIO(data)
    directory = read_directory(file, len(data))
    return {
        name: read_at(file, directory.locate(file, name), member.nbytes) for name, member in directory.members.items()
    }


def refused(data: bytes, match: str) -> None:
    with pytest.raises(MalformedZipError, match=match):
        read(data)


PAIR = (Raw(b"a/data.pkl", b"pickle"), Raw(b"a/data/0", b"\0" * 64))


def test_a_zip_is_read() -> None:
    assert read(build(PAIR)) == {"a/data.pkl": b"pickle", "a/data/0": bytes(64)}
    assert read(build([])) == {}


@settings(max_examples=50)
@given(st.dictionaries(st.text(min_size=1, max_size=20), st.binary(max_size=99), max_size=5), st.booleans())
def test_what_zipfile_writes_is_read(contents: dict[str, bytes], seekable: bool) -> None:
    contents = {folded(name.replace("\0", "_").encode("utf-8", "replace").decode()): d for name, d in contents.items()}
    file = BytesIO() if seekable else Unseekable()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in contents.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    assert read(file.getvalue()) == contents


class Unseekable(BytesIO):
    """What makes zipfile write sizes after the data."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_: object) -> int:
        raise OSError

    def tell(self) -> int:
        raise OSError


def test_zip64_in_small() -> None:
    """As zipfile writes it when it is told that a member may be huge."""
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive, archive.open("a/b", "w", force_zip64=True) as member:
        member.write(b"12345")
    assert read(file.getvalue()) == {"a/b": b"12345"}


def test_the_wide_end_record_decides() -> None:
    (member,) = [Raw()]
    place, length = len(member.local()), len(member.entry(0))
    fields = (0, 0, 1, 1, length, place)
    assert read(build([member], wide=fields)) == {"a/b": b"12345678"}
    assert read(build([member], wide=fields, count=2**16 - 1, length=FULL, start=FULL)) == {"a/b": b"12345678"}
    refused(build([member], wide=fields, count=2), "contradict")
    refused(build([member], wide=fields, start=place + 1), "contradict")
    refused(build([member], wide=fields, disks=(1, 0)), "several disks")
    refused(build([member], wide=(0, 0, 2, 1, length, place)), "zip64 end record is damaged")
    refused(build([member], wide=(1, 0, 1, 1, length, place)), "zip64 end record is damaged")
    refused(build([member], wide=(0, 0, 1, 1, 2**63, place), length=FULL), "expected")
    broken = build([member], wide=fields)
    refused(broken.replace(b"PK\6\6", b"PK\6\5"), "zip64 end record is damaged")
    moved = broken.index(b"PK\6\7") + 8
    refused(broken[:moved] + b"\1" + broken[moved + 1 :], "not where it should be")


def wide_extra(*numbers: int) -> bytes:
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers)


def test_wide_numbers_of_a_member() -> None:
    other = struct.pack("<2H3s", 0x4246, 3, b"ZZZ")  # torch's padding
    second = Raw(b"b", b"xyz")
    start = len(Raw().local())
    for entry in (
        replace(second, start=FULL, extra=wide_extra(start)),
        replace(second, nbytes=FULL, packed=FULL, start=FULL, extra=wide_extra(3, 3, start)),
        replace(second, nbytes=FULL, packed=3, extra=other + wide_extra(3)),
        replace(second, local_nbytes=FULL, local_extra=other + wide_extra(3, 3)),
        replace(second, flags=8, local_nbytes=0),
        replace(second, flags=8, local_nbytes=FULL),
    ):
        assert read(build([Raw(), entry])) == {"a/b": b"12345678", "b": b"xyz"}
    for entry in (
        replace(second, start=FULL),
        replace(second, start=FULL, extra=other),
        replace(second, start=FULL, extra=wide_extra(start)[:-1]),
        replace(second, nbytes=FULL, packed=FULL, start=FULL, extra=wide_extra(3, 3)),
        replace(second, local_nbytes=FULL, local_extra=other),
        replace(second, local_nbytes=FULL, local_extra=wide_extra(3)),
    ):
        refused(build([Raw(), entry]), "too big for its field")
    refused(build([Raw(), replace(second, local_nbytes=FULL, local_extra=wide_extra(4, 4))]), "another size")
    refused(build([Raw(), replace(second, start=FULL, extra=wide_extra(2**63))]), "reach into what follows")


@pytest.mark.parametrize(
    ("member", "match"),
    [
        (Raw(method=8), "is compressed"),
        (Raw(method=99), "is compressed"),
        (Raw(nbytes=9, packed=8), "is compressed"),
        (Raw(nbytes=7, packed=8), "is compressed"),
        (Raw(flags=1), "encrypted"),
        (Raw(flags=0x40), "encrypted"),
        (Raw(flags=0x20), "encrypted"),
        (Raw(flags=0x2000), "encrypted"),
        (Raw(disk=1), "directory is damaged"),
        (Raw(signature=b"PK\1\1"), "directory is damaged"),
        (Raw(nbytes=9), "reach into what follows"),
        (Raw(nbytes=2**31), "reach into what follows"),
        (Raw(nbytes=7), "another size"),
        (Raw(local_nbytes=7), "another size"),
        (Raw(local_nbytes=0), "another size"),
        (Raw(start=2**31), "reach into what follows"),
        (Raw(start=1), "contradicts|reach into"),
        (Raw(local_name=b"a/c"), "contradicts the directory"),
        (Raw(local_name=b"a/bc", data=b"1234567"), "contradicts|another size|reach into"),
        (Raw(local_name=b"a/"), "contradicts|reach into"),
        (Raw(local_flags=8), "contradicts the directory"),
        (Raw(local_flags=1), "contradicts the directory"),
        (Raw(local_method=8), "contradicts the directory"),
        (Raw(local_signature=b"PK\3\3"), "contradicts the directory"),
        (Raw(flags=8, local_extra=b"x" * 9, data=b"", nbytes=8), "reach into what follows"),
    ],
)
def test_members_that_lie_are_refused(member: Raw, match: str) -> None:
    refused(build([member]), match)
    refused(build([Raw(b"first"), member]), match)


def test_a_version_that_does_not_exist_is_refused() -> None:
    """Found by fuzzing: Python's zipfile refuses it."""
    data = bytearray(build(PAIR))
    place = data.index(b"PK\1\2") + 6
    data[place] = 63
    read(bytes(data))
    data[place] = 64
    refused(bytes(data), "needs version 64 of the format; up to 63")


@pytest.mark.parametrize(("field", "value"), [(4, 1), (16, 2)])
def test_a_locator_of_several_disks_is_refused(field: int, value: int) -> None:
    """Found by fuzzing: Python's zipfile refuses it."""
    whole = build(PAIR)
    count, length, start = struct.unpack_from("<H2L", whole, len(whole) - 12)
    data = bytearray(build(PAIR, wide=(0, 0, count, count, length, start)))
    read(bytes(data))
    data[data.index(b"PK\6\7") + field] = value
    refused(bytes(data), "split over several disks")


def test_overlapping_members_are_refused() -> None:
    first, second = PAIR
    refused(build([first, replace(second, start=0)]), "reach into what follows|contradicts")
    refused(build([first, replace(first, name=b"a/data/7", start=0)]), "reach into what follows")
    inner = Raw(b"in", b"inner")
    outer = Raw(b"out", inner.local())
    hidden = build([outer, replace(inner, start=len(Raw(b"out", b"").local()))])
    refused(hidden, "reach into what follows")


def test_a_header_grown_over_its_neighbour_is_refused() -> None:
    """The directory doesn't know how long a member's own header is: only the header tells."""
    data = bytearray(build(PAIR))
    struct.pack_into("<H", data, 28, 60)
    refused(bytes(data), "another size|reach into what follows")


def test_names_twice_are_refused() -> None:
    refused(build([Raw(), Raw()]), "it is there twice")
    refused(build([Raw(b"\xff"), Raw(b"\xff")]), "it is there twice")


@pytest.mark.parametrize("names", [(b"a/data/0", b"a/DATA/0"), (b"a/data.pkl", b"A/data.pkl"), (b"x", b"y", b"X")])
def test_names_that_differ_in_case_alone_are_refused(names: tuple[bytes, ...]) -> None:
    """Torch finds members whatever the case of the letters of ASCII: either of the two."""
    refused(build([Raw(name) for name in names]), "it is there twice, as torch tells no capital from small letters")


def test_letters_beyond_ascii_differ_in_case() -> None:
    assert len(read(build([Raw("é".encode()), Raw("É".encode())]))) == 2


def test_a_member_is_found_as_torch_finds_it() -> None:
    assert read(build([Raw(b"A/Data/0")])) == {"a/data/0": b"12345678"}


def test_the_bounds_of_a_directory_grow_with_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_directory, "MAX_MEMBERS", 10)
    for count in (10, 11, 40):
        members = [Raw(b"m/%d" % number, b"") for number in range(count)]
        small = build(members)
        large = build([Raw(b"data", bytes(2**10 * count)), *members[1:]])
        assert len(read_directory(BytesIO(large), len(large)).members) == count
        if count == 10:
            read(small)
        else:
            refused(small, f"has {count} members in .*; 10 in 4194304 are allowed in a file of {len(small)} bytes")


def test_names_that_are_no_text_stay_apart() -> None:
    assert len(read(build([Raw(b"\xff"), Raw(b"\xfe"), Raw("é".encode())]))) == 3


def test_lies_about_the_directory_are_refused() -> None:
    for count in (0, 1, 3, 1000):
        refused(build(PAIR, count=count), "does not hold the")
    refused(build(PAIR, length=10), "directory ends at byte")
    refused(build(PAIR, start=0), "directory ends at byte")
    refused(build(PAIR, start=FULL), "directory ends at byte")
    refused(build(PAIR, disks=(1, 1)), "several disks")
    refused(build(PAIR, before_end=b"x"), "directory ends at byte")
    refused(build([Raw(comment=b"a comment")], count=2), "does not hold the")


def test_nothing_may_follow() -> None:
    refused(build(PAIR) + b"\0", "cut short, or something follows")
    refused(build(PAIR, comment=b"a comment"), "cut short, or something follows")
    data = build(PAIR)
    refused(data[:-2] + b"\1\0", "cut short, or something follows")
    refused(b"", "has 0 bytes, fewer than an empty zip")


def test_a_cut_is_noticed_wherever_it_is() -> None:
    data = build(PAIR, wide=(0, 0, 2, 2, sum(len(raw.entry(0)) for raw in PAIR), sum(len(raw.local()) for raw in PAIR)))
    assert len(read(data)) == 2
    for length in range(len(data)):
        with pytest.raises(MalformedZipError):
            read(data[:length])
        with pytest.raises(MalformedZipError):
            read(data[len(data) - length :])


def test_the_directory_is_bounded() -> None:
    refused(huge(count=2**40), "are allowed")
    refused(huge(count=MAX_MEMBERS + 1), "are allowed")
    refused(huge(count=2, length=9 * 2**20), "are allowed")


def huge(count: int, length: int = 92) -> bytes:
    """A zip that is only the end of one with this many members."""
    fields = (0, 0, count, count, length, 0)
    wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, *fields) + struct.pack("<4sLQL", b"PK\6\7", 0, length, 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2**16 - 1, 2**16 - 1, FULL, FULL, 0)
    return bytes(length) + wide + end


def test_long_extra_fields_are_passed_over() -> None:
    members = [Raw(b"%d" % i, b"", start=FULL, extra=bytes(65_532)) for i in range(60)]
    refused(build(members), "too big for its field")
    refused(build([replace(member, start=None) for member in members[:1]], count=2), "does not hold")


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_mutations_are_read_or_refused(data: st.DataObject) -> None:
    mutated = bytearray(build(PAIR))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(mutated) - 1))
        mutated[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    with contextlib.suppress(MalformedZipError):
        found = read(bytes(mutated))
        assert sum(map(len, found.values())) <= len(mutated)
