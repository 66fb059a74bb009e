"""The directory of a zip whose members are stored as they are, read strictly enough to map the members in place.

Format: PKWARE's APPNOTE.TXT, as far as `torch.save` and Python's `zipfile` write it: one disk, no compression, no
encryption, no comment, zip64 where a number is too big for its field. Whatever two readers might understand
differently (duplicate names, overlapping members, headers that contradict each other) is an error.
"""

from __future__ import annotations

import string
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO, Final

from streammerge.formats.bounds import bound

MAX_DIRECTORY: Final = 4 * 2**20
"""The longest directory that is read of a small file, in bytes. A member takes about 70."""

MAX_MEMBERS: Final = 2**15
"""The most members that are read of a small file."""

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_LOCATOR64 = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")

_FULL16, _FULL32 = 2**16 - 1, 2**32 - 1  # what a field holds whose number is too big for it
_NEWEST: Final = 63  # the format's version 6.3, beyond which other readers refuse; torch asks for less
_SIZES_LATER, _UTF8 = 0x8, 0x800  # flags: the local header doesn't know the sizes; the name is UTF-8
_SMALL_LETTERS: Final = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


class MalformedZipError(Exception):
    """What is wrong with a zip."""


@dataclass(frozen=True, slots=True)
class Member:
    """What the directory says of a member. A `crc` of 0 may mean that none was computed."""

    raw_name: bytes
    flags: int
    crc: int
    nbytes: int
    header_start: int
    packed: int
    is_stored: bool

    def check_stored(self) -> None:
        """MalformedZipError if its bytes are not in the file as they are."""
        if not self.is_stored:
            raise MalformedZipError(
                f"{self.raw_name!r}: it is compressed; torch.save stores, so another program has packed it"
            )


@dataclass(frozen=True, slots=True)
class Directory:
    """The members by name, and by a header's start where the member has to end: the next one's start, or the end.

    Names are in small letters, because torch finds members whatever the case of their names: see `folded`.
    """

    members: Mapping[str, Member]
    limits: Mapping[int, int]

    def find(self, name: str) -> Member | None:
        """The member that torch finds under this name."""
        return self.members.get(folded(name))

    def locate(self, file: BinaryIO, name: str) -> int:
        """The absolute position of the member's first byte, its own header having been checked."""
        member = self.members[folded(name)]
        member.check_stored()
        header = read_at(file, member.header_start, _LOCAL.size + len(member.raw_name))
        signature, _, flags, method, _, _, _, packed, nbytes, name_length, extra_length = _LOCAL.unpack_from(header)
        start: int = member.header_start + _LOCAL.size + name_length + extra_length
        if (signature, flags, method, header[_LOCAL.size :]) != (b"PK\3\4", member.flags, 0, member.raw_name):
            raise MalformedZipError(f"{name}: its own header contradicts the directory")
        if not flags & _SIZES_LATER:
            extra = read_at(file, start - extra_length, extra_length)
            if _widened(extra, nbytes, packed) != [member.nbytes] * 2:
                raise MalformedZipError(f"{name}: its own header gives another size than the directory")
        if name_length != len(member.raw_name) or start + member.nbytes > self.limits[member.header_start]:
            raise MalformedZipError(f"{name}: its {member.nbytes} bytes reach into what follows it")
        return start


def read_at(file: BinaryIO, start: int, length: int) -> bytes:
    """These bytes of the file, which are all there."""
    file.seek(start)
    data = file.read(length)
    if len(data) < length:
        raise MalformedZipError(f"it ends before its byte {start + length}: it is cut short")
    return data


def read_directory(file: BinaryIO, file_bytes: int) -> Directory:
    """Read a zip's directory; the members are in its order. A deviation from the format is a MalformedZipError."""
    start, length, count = _find_directory(file, file_bytes)
    most_bytes, most_members = bound(MAX_DIRECTORY, file_bytes, 200), bound(MAX_MEMBERS, file_bytes, 1)
    if length > most_bytes or count > most_members:
        raise MalformedZipError(
            f"its directory has {count} members in {length} bytes; {most_members} in {most_bytes} are allowed in a "
            f"file of {file_bytes} bytes"
        )
    members = _parse_directory(read_at(file, start, length), count)
    return Directory(members, _limits(members.values(), start))


def _find_directory(file: BinaryIO, file_bytes: int) -> tuple[int, int, int]:
    """The directory's start, length and number of members, from the record with which the file ends."""
    end_start = file_bytes - _END.size
    if end_start < 0:
        raise MalformedZipError(f"it has {file_bytes} bytes, fewer than an empty zip")
    signature, *disks, count_here, count, length, start, comment = _END.unpack(read_at(file, end_start, _END.size))
    if signature != b"PK\5\6" or comment:
        raise MalformedZipError("it does not end with the directory of a zip: it is cut short, or something follows it")
    end_start, wide = _end64(file, end_start)
    fields = (disks[0], disks[1], count_here, count, length, start)
    expected = wide or (0, 0, count, count, length, start)
    if any(field not in (real, full) for field, real, full in zip(fields, expected, _FULL, strict=True)):
        raise MalformedZipError("it is split over several disks, or its two end records contradict each other")
    _, _, _, count, length, start = expected
    if start + length != end_start:
        raise MalformedZipError(f"its directory ends at byte {start + length}, expected {end_start}")
    return start, length, count


_FULL = (_FULL16, _FULL16, _FULL16, _FULL16, _FULL32, _FULL32)


def _end64(file: BinaryIO, end_start: int) -> tuple[int, tuple[int, ...] | None]:
    """Where the end records start, and the fields of the zip64 one if there is one."""
    locator_start = end_start - _LOCATOR64.size
    if locator_start < _END64.size:
        return end_start, None
    signature, disk, start, disks = _LOCATOR64.unpack(read_at(file, locator_start, _LOCATOR64.size))
    if signature != b"PK\6\7":
        return end_start, None
    if disk != 0 or disks > 1:
        raise MalformedZipError("it is split over several disks")
    if start != locator_start - _END64.size:
        raise MalformedZipError("its zip64 end record is not where it should be")
    signature, _, _, _, *fields = _END64.unpack(read_at(file, start, _END64.size))
    if signature != b"PK\6\6" or fields[:2] != [0, 0] or fields[2] != fields[3]:
        raise MalformedZipError("its zip64 end record is damaged")
    return start, tuple(fields)


def _parse_directory(data: bytes, count: int) -> dict[str, Member]:
    members: dict[str, Member] = {}
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(data):
            break
        fields = _CENTRAL.unpack_from(data, at)
        name_start = at + _CENTRAL.size
        extra_start = name_start + fields[10]
        comment_start = extra_start + fields[11]
        at = comment_start + fields[12]
        member = _member(fields, data[name_start:extra_start], data[extra_start:comment_start])
        name = member.raw_name.decode("utf-8", "surrogateescape")
        if folded(name) in members:
            raise MalformedZipError(f"{name}: it is there twice, as torch tells no capital from small letters")
        members[folded(name)] = member
    if len(members) != count or at != len(data):
        raise MalformedZipError(f"its directory does not hold the {count} members that it claims")
    return members


def _member(fields: tuple[Any, ...], raw_name: bytes, extra: bytes) -> Member:
    signature, _, version, flags, method, _, _, crc, packed, nbytes, _, _, _, disk, _, _, start = fields
    if signature != b"PK\1\2" or disk != 0:
        raise MalformedZipError("its directory is damaged")
    if version > _NEWEST:
        raise MalformedZipError(f"{raw_name!r}: it needs version {version} of the format; up to {_NEWEST} is known")
    if flags & ~(_SIZES_LATER | _UTF8):
        raise MalformedZipError(f"{raw_name!r}: it is encrypted, or stored in another way that torch.save never does")
    nbytes, packed, start = _widened(extra, nbytes, packed, start)
    return Member(raw_name, flags, crc, nbytes, start, packed, method == 0 and packed == nbytes)


def folded(name: str) -> str:
    """The name with the capital letters of ASCII made small, as torch compares names."""
    return name.translate(_SMALL_LETTERS)


def _widened(extra: bytes, *numbers: int) -> list[int]:
    """These numbers, those that were too big for their fields replaced by those of the zip64 extra field, in order."""
    if _FULL32 not in numbers:
        return list(numbers)
    wide = iter(_zip64_numbers(extra))
    try:
        return [next(wide) if number == _FULL32 else number for number in numbers]
    except StopIteration:
        raise MalformedZipError("a number is too big for its field, and not given elsewhere") from None


def _zip64_numbers(extra: bytes) -> tuple[int, ...]:
    """The 8-byte numbers of the extra field with the tag 1."""
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if tag == 1:
            return struct.unpack_from(f"<{min(length, len(extra) - at) // 8}Q", extra, at)
        at += length
    return ()


def _limits(members: Iterable[Member], end: int) -> dict[int, int]:
    """Where the member whose header starts at a place has to end; members that overlap are an error."""
    by_place = sorted(members, key=lambda member: member.header_start)
    starts = [member.header_start for member in by_place] + [end]
    for member, limit in zip(by_place, starts[1:], strict=True):
        if member.header_start + _LOCAL.size + len(member.raw_name) + member.packed > limit:
            raise MalformedZipError(f"{member.raw_name!r}: its {member.packed} bytes reach into what follows it")
    return dict(pairwise(starts))
