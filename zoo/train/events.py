"""TensorBoard scalars, written without TensorBoard or TensorFlow.

An event file is a row of records `length, crc(length), data, crc(data)` (TFRecord), each holding
an `Event` protocol buffer; four fields of it are enough for scalars. Written here because the
writer of the tensorboard package imports TensorFlow wherever it is installed.
"""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

_CASTAGNOLI = 0x82F63B78


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (_CASTAGNOLI if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc_table()


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C, rotated and shifted as TFRecord wants it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _bytes_field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _event(step: int, field: bytes) -> bytes:
    wall_time = _varint(1 << 3 | 1) + struct.pack("<d", time.time())
    return wall_time + _varint(2 << 3) + _varint(step) + field


class EventWriter:
    """Appends scalars to a new event file in `folder`.

    Args:
      step: where the run begins; later steps of older files in the folder become invalid.
    """

    def __init__(self, folder: str | Path, step: int = 0):
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self.path = Path(folder) / f"{name}.{time.time_ns()}"
        self._file = open(self.path, "wb")
        self._record(_event(0, _bytes_field(3, b"brain.Event:2")))
        # SessionLog with status START.
        self._record(_event(step, _bytes_field(7, _varint(1 << 3) + _varint(1))))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes `values` by tag."""
        summary = b"".join(
            _bytes_field(1, _bytes_field(1, tag.encode()) + b"\x15" + struct.pack("<f", value))
            for tag, value in values.items()
        )
        self._record(_event(step, _bytes_field(5, summary)))

    def _record(self, data: bytes) -> None:
        length = struct.pack("<Q", len(data))
        self._file.write(length + _masked_crc(length) + data + _masked_crc(data))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
