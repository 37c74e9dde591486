"""W&B's own files of runs, read without a server: `run-<id>.wandb`, of offline runs and of those that were online.

A file is a header of seven bytes and then a log as LevelDB writes it: blocks of 32 KiB; in them records with a
checksum, a length and a kind that says whether one is whole or the first, a middle or the last part of one. What a
record holds is a protobuf message, and W&B's Python package has its definition. (W&B reads such files in its own
program, which sends them to a server; its Python package has no reader.)

A file may end in the middle of a record, because its writer was killed or is still at work, and it may be damaged. What
is whole is read, and `Reading.torn` says what is not.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADER = b":W&B\xe1\xbe\x00"
"""Name, magic number and version."""
BLOCK = 1 << 15
_PART = struct.Struct("<IHB")
DAMAGED, WHOLE, FIRST, LAST = 0, 1, 2, 4
"""Kinds of parts; 3 is one in the middle."""


@dataclass
class Reading:
    """How reading a file went: `torn` says where its first damage lies, and is None for a file that is whole."""

    path: Path
    torn: str | None = field(default=None, init=False)

    def records(self) -> Iterator[Any]:
        """The messages (`wandb_internal_pb2.Record`) in their order; what is damaged is passed over, to the next block
        in which a record begins."""
        from google.protobuf.message import DecodeError
        from wandb.proto.wandb_internal_pb2 import Record

        data = self.path.read_bytes()
        if not data.startswith(HEADER):
            self._tear("does not begin as a file of W&B does")
            return
        for place, message in self._messages(data):
            try:
                yield Record.FromString(message)
            except DecodeError:
                self._tear(f"is damaged at byte {place}")

    def _messages(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Where each record begins, and its bytes."""
        begin = 0
        parts: list[bytes] = []
        for place, kind, part in self._parts(data):
            if kind in (WHOLE, FIRST):
                begin, parts = place, []
            elif kind == DAMAGED or not parts:  # of a record that lacks a part nothing is read
                parts = []
                continue
            parts.append(part)
            if kind in (WHOLE, LAST):
                yield begin, b"".join(parts)
                parts = []
        if parts:
            self._tear(f"ends within a record, at byte {begin}")

    def _parts(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """(place, kind, content) of every part; behind one whose checksum is wrong the next block follows."""
        place = len(HEADER)
        while place < len(data):
            left = BLOCK - place % BLOCK
            if left < _PART.size:  # filled with zeros
                place += left
                continue
            if place + _PART.size > len(data):
                self._tear(f"ends within a record, at byte {place}")
                return
            checksum, length, kind = _PART.unpack_from(data, place)
            content = data[place + _PART.size : place + _PART.size + length]
            if len(content) == length and zlib.crc32(content, zlib.crc32(bytes([kind]))) == checksum:
                yield place, kind, content
                place += _PART.size + length
                continue
            is_cut = len(content) < length <= left - _PART.size
            self._tear(f"ends within a record, at byte {place}" if is_cut else f"is damaged at byte {place}")
            yield place, DAMAGED, b""
            place += left

    def _tear(self, said: str) -> None:
        self.torn = self.torn or said
