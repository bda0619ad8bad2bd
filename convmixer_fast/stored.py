"""Reads the files of torch.save and safetensors, by the libraries that write them.

Neither runs code of the file. What they leave open is checked here: torch.load does not compare the checksums of the
zip, and unpacks entries however large they become.
"""

import os
import struct
import threading
import zipfile
from typing import Any, BinaryIO

import safetensors.torch
import torch

MAX_PICKLE = 64 << 20  # bytes; it has about 150 for each tensor

_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_IGNORED = [f"{module}.{path}" for module in ("pathlib", "pathlib._local") for path in _PATHS]
_IGNORED += ["argparse.Namespace", "numpy.dtype", "numpy.ndarray"]
_IGNORED += [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")]
_IGNORED += [f"builtins.{factory}" for factory in ("int", "float", "list", "dict")]


class Ignored:
    """Stands for what trainers store beside the weights, whose own class is not called.

    Objects of NumPy must not be made: a dtype with forged flags lets bytes of the file pass for pointers.
    """

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _empty(*arguments: object) -> dict[Any, Any]:
    """A dict in place of a defaultdict, which torch.load cannot fill."""
    return {}


_STAND_INS: list[Any] = [(_empty, "collections.defaultdict"), *((Ignored, name) for name in _IGNORED)]
_STAND_INS_LOCK = threading.Lock()  # torch keeps one list of them for all threads

# The records at the end of a zip: its directory's length and offset, last of all in 32 bits; before it those in 64 bits
# and the offset of that record.
_END = struct.Struct("<4s 8x 2I H")  # the last number is the length of a comment
_LOCATOR = struct.Struct("<4s 4x Q 4x")
_END64 = struct.Struct("<4s 36x 2Q")
_FOLDER = 0x10  # among the attributes of an entry; zipfile goes by names alone


def read_content(file: BinaryIO) -> object:
    """What was saved, with its tensors on the CPU. They need no more memory than the file has bytes. The objects beside
    them need some more; in a zip, they are at most MAX_PICKLE bytes of the file.

    Args:
        file: open at its start.

    Raises:
        Exception: of nearly every type, as the libraries that read the file raise them; its bytes are damaged, or of
            another format.
    """
    head = file.read(9)
    file.seek(0)
    if head.endswith(b"{"):  # after the header's length
        mapped = safetensors.torch.load_file(f"/dev/fd/{file.fileno()}")
        return {key: tensor.clone() for key, tensor in mapped.items()}  # the file may change later
    size = os.fstat(file.fileno()).st_size
    if head.startswith(b"PK\3\4"):
        _check_zip(file, size)
    elif not head.startswith(b"\x80"):
        raise ValueError("it begins like no file of torch.save or safetensors")
    needed = 0

    def on_cpu(storage: Any, location: str) -> Any:
        nonlocal needed
        needed += storage.nbytes()
        if needed > size:  # a pickle can name the bytes of one tensor in several ways
            raise ValueError(f"it has {size} bytes, but {needed} or more of tensors")
        return storage

    with _STAND_INS_LOCK, torch.serialization.safe_globals(_STAND_INS):
        return torch.load(file, map_location=on_cpu, weights_only=True, mmap=False)


def _check_zip(file: BinaryIO, size: int) -> None:
    """Raises ValueError for a zip that is damaged, that grows when it is read, or that torch.save does not write."""
    _check_directory(file, size)
    archive = zipfile.ZipFile(file)
    entries = archive.infolist()
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"its entry {entry.filename} is compressed, which torch.save does not do")
        if entry.is_dir() or entry.external_attr & _FOLDER:
            raise ValueError(f"its entry {entry.filename} is marked as a folder, of which torch.load reads nothing")
        if entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE:
            raise ValueError(f"its entry {entry.filename} has more than {MAX_PICKLE} bytes")
    if len(set(archive.namelist())) < len(entries) or sum(entry.file_size for entry in entries) > size:
        raise ValueError("entries of the zip have the same name or share bytes")
    checksums = any(entry.CRC for entry in entries)  # unless torch.serialization.set_crc32_options(False)
    if checksums and (damaged := archive.testzip()):
        raise ValueError(f"the checksum of its entry {damaged} is wrong")
    file.seek(0)


def _check_directory(file: BinaryIO, size: int) -> None:
    """Raises ValueError unless the zip ends with one directory and its records, so that zipfile, which compares the
    checksums, reads the same one as torch.load.
    """
    file.seek(max(0, size - _END.size - _LOCATOR.size - _END64.size))
    tail = file.read().rjust(_END.size + _LOCATOR.size + _END64.size, b"\0")
    signature, length, offset, comment = _END.unpack(tail[-_END.size :])
    after = size - _END.size
    locator, offset64 = _LOCATOR.unpack_from(tail, _END64.size)
    if locator == b"PK\6\7":
        after -= _LOCATOR.size + _END64.size
        _, length, offset = _END64.unpack_from(tail)
        if offset64 != after:
            raise ValueError("its zip has two ends")
    if signature != b"PK\5\6" or comment or offset + length != after:
        raise ValueError("its zip does not end with its directory")
