"""TensorBoard event files, written without TensorBoard.

`tensorboardX` imports torch wherever that is installed, and TensorBoard's own writer comes with a
web server and gRPC. What they write is small and has not changed in years: TFRecord frames around
`Event` protocol buffers. Scalars, images and session starts need a dozen of their fields. The tests
read the files back with TensorBoard itself.
"""

from __future__ import annotations

import os
import pathlib
import socket
import struct
import time
from collections.abc import Mapping

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), bits reversed
_RGBA = 4
_SESSION_START = 1


def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


_TABLE = _crc_table()


def _checksum(data: bytes) -> bytes:
    """CRC-32C of `data`, rotated and shifted as TFRecord wants it, 4 bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


class EventFile:
    """One event file. Records are in the file when a method returns.

    Args:
      directory: where it is made, with parents.
      start: steps done before. TensorBoard forgets what earlier files in `directory` say of later
        steps.
    """

    def __init__(self, directory: pathlib.Path, start: int):
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names. One of the same second and start
        # holds only steps that are forgotten anyway.
        path = (
            directory
            / f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{start:010d}"
        )
        self._file = path.open("wb")
        self._event(0, _bytes(3, b"brain.Event:2"))
        self._event(start + 1, _bytes(7, _int(1, _SESSION_START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point (float32) to the curve of every name."""
        self._summary(
            step, *(_bytes(1, name.encode()) + _float(2, value) for name, value in values.items())
        )

    def image(self, step: int, name: str, png: bytes) -> None:
        """Adds a PNG image."""
        width, height = struct.unpack(">II", png[16:24])  # where PNG's first chunk has them
        self._summary(
            step,
            _bytes(1, name.encode())
            + _bytes(4, _int(1, height) + _int(2, width) + _int(3, _RGBA) + _bytes(4, png)),
        )

    def sync(self) -> None:
        """Returns once the records survive a power cut too."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _summary(self, step: int, *values: bytes) -> None:
        self._event(step, _bytes(5, b"".join(_bytes(1, value) for value in values)))

    def _event(self, step: int, content: bytes) -> None:
        event = _double(1, time.time()) + _int(2, step) + content
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))
        self._file.flush()
