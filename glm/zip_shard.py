"""Looks into a `.bin` file of the zip format before torch reads it: parts are stored as they are, the pickle is small.

Torch packs nothing, but unpacks what others packed: a file of a megabyte may hold a pickle of gigabytes.
"""

import struct
import zipfile
from pathlib import Path

MOST_PICKLE_BYTES = 16 << 20
"""It has the names and shapes of tensors alone: some 100 bytes for each."""
MOST_DIRECTORY_BYTES = 4 << 20
_END_BYTES = 22 + 65535  # the end record with the longest comment
_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_IN_END64 = 0xFFFFFFFF


def is_zip(shard: Path) -> bool:
    """Whether the file begins as one of the zip format does. Raises OSError."""
    with shard.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def zip_fault(shard: Path) -> str | None:
    """What is wrong with a file of the zip format, as far as its directory tells; None where nothing is.

    Raises:
        OSError: it cannot be read.
    """
    num_bytes = _directory_bytes(shard)
    if num_bytes is None:
        return "its end is missing"
    if num_bytes > MOST_DIRECTORY_BYTES:
        return f"its directory has {num_bytes} bytes"
    try:
        with zipfile.ZipFile(shard) as file:
            parts = file.infolist()
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError) as error:
        return f"its directory is unreadable: {error}"
    for part in parts:
        if part.compress_type != zipfile.ZIP_STORED:
            return f"{part.filename:.80} is packed, which torch never does"
        if part.filename.endswith(".pkl") and part.file_size > MOST_PICKLE_BYTES:
            return f"{part.filename:.80} has {part.file_size} bytes"
    return None


def _directory_bytes(shard: Path) -> int | None:
    """Bytes of the directory, as the record at the file's end says; None without such a record."""
    with shard.open("rb") as file:
        start = file.seek(max(0, shard.stat().st_size - _END_BYTES))
        tail = file.read()
        place = tail.rfind(_END)
        if place < 0 or len(tail) < place + 22:
            return None
        (num_bytes,) = struct.unpack_from("<I", tail, place + 12)
        if num_bytes != _IN_END64:
            return int(num_bytes)
        file.seek(max(0, start + place - 20))
        locator = file.read(20)
        if not locator.startswith(_LOCATOR64):
            return None
        file.seek(struct.unpack_from("<Q", locator, 8)[0] & (1 << 62) - 1)
        record = file.read(56)
        return int(struct.unpack_from("<Q", record, 40)[0]) if record.startswith(_END64) and len(record) == 56 else None
