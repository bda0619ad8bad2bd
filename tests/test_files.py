"""Files that never come, files that are written, and text that would move a terminal's cursor."""

import os
import socket
import stat

import pytest

from convmixer_fast.files import open_regular, printable, replacing


def test_opens_a_regular_file_and_a_link_to_one(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"content"


def test_refuses_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    descriptors = len(os.listdir("/proc/self/fd"))
    for path, message in {
        tmp_path / "fifo": "fifo is a FIFO, accepted: a regular file",
        "/dev/zero": "/dev/zero is a character device, accepted: a regular file",
        tmp_path / "socket": "No such device or address",
        tmp_path: "Is a directory",
        tmp_path / "missing": "No such file",
        tmp_path / ("x" * 300): "File name too long",
    }.items():
        with pytest.raises(OSError, match=message):
            open_regular(path)
    with pytest.raises(ValueError, match=r"^a\\x00b holds a null character, which no file's name does"):
        open_regular("a\0b")
    os.mkfifo(tmp_path / "\x1b[2J")
    with pytest.raises(OSError, match=r"\\x1b\[2J is a FIFO"):
        open_regular(tmp_path / "\x1b[2J")
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_replaces_a_file_once_its_content_is_on_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    synced = []

    def fsync(descriptor):
        status = os.fstat(descriptor)
        synced.append((stat.S_ISDIR(status.st_mode), path.read_text()))

    monkeypatch.setattr(os, "fsync", fsync)
    with replacing(path) as partial:
        partial.write_text("new")
    assert synced == [(False, "old"), (True, "new")]
    assert os.listdir(tmp_path) == ["file"]


def test_keeps_the_old_file_where_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "text, shown",
    [
        ("Grüße 图", "Grüße 图"),
        ("a\tb\nc\x1b[2J\x07", "a\\tb\\nc\\x1b[2J\\x07"),
        ("\x9b2J\u202edcba\u2028", "\\x9b2J\\u202edcba\\u2028"),
        (os.fsdecode(b"\xff.png"), "\\udcff.png"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


def test_printable_leaves_out_the_middle():
    assert printable("k" * 1000 + "end", 21) == "kkkkkkkk ... kkkkkend"
    assert printable("k" * 21, 21) == "k" * 21
    assert printable("\x1b" * 1000, 25) == r"\x1b\x1b\x ... 1b\x1b\x1b"  # escaped, a character takes the place of four
