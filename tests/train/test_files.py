"""A file is whole or as it was."""

import errno
import os
from pathlib import Path

import pytest

from regard.train.files import write_whole


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_writes_text_and_bytes(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.txt", "größer")
    write_whole(tmp_path / "a.txt", b"\0\1")
    assert (tmp_path / "a.txt").read_bytes() == b"\0\1"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    file = tmp_path / "a.json"
    write_whole(file, "old")
    monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(OSError, match=r"No space left on device; .*a\.json is left as it was") as caught:
        write_whole(file, "new" * 1000)
    assert caught.value.errno == errno.ENOSPC
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="left as it was"):
        write_whole(tmp_path / "nowhere" / "a", "x")
