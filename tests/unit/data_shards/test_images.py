"""Images as they are in a folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from pictures import picture

from data_shards.errors import DataError, StorageError
from data_shards.images import open_images, read_photo


def test_name_that_is_not_utf_8_is_refused(tmp_path):
    picture(tmp_path / os.fsdecode(b"caf\xe9.jpg"), 1)
    with pytest.raises(DataError, match=r"caf.*\.jpg' under .*: rename this file; .* not UTF-8"):
        open_images(str(tmp_path))


def test_folder_that_may_not_be_entered_is_one_line(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for method in ("is_file", "is_dir", "read_bytes"):
        monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(StorageError, match=r"manifest\.json: Permission denied"):
        open_images(str(tmp_path))
    with pytest.raises(StorageError, match=r"photo\.jpg: Permission denied"):
        read_photo(str(tmp_path / "photo.jpg"))
