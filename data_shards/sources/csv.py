"""Any images, listed in a CSV file with the columns `path,pid,camid,split`; camid is optional."""

import csv
import io
import logging
from pathlib import Path

from data_shards.errors import DataError
from data_shards.records import NO_CAMERA, SPLITS, ImageRecord
from data_shards.sources.layout import is_of_macos, normalized, numbered, require_folder
from data_shards.storage.object_path import Place, object_at

log = logging.getLogger(__name__)

COLUMNS = ("path", "pid", "camid", "split")
OPTIONAL = "camid"


def read(root: Place, *, images: Place | None = None) -> list[ImageRecord]:
    """Read a CSV file with a header.

    `pid` and `camid` are integers from 0 up, or all of them are names, which are then numbered in
    sorted order. If the column `camid` is missing, or empty on all lines, the cameras are not
    known. `split` is one of `SPLITS`. Files of macOS (`._name`, `.DS_Store`) are skipped.

    Args:
        root: the CSV file.
        images: the folder that its paths are relative to; by default the CSV file's. A path may
            also be a URL, `s3://bucket/KEY`. Missing objects are found by the scan.

    Raises:
        DataError: a missing column or file, a wrong value, a path outside the folder, or an image
            that is listed twice; the message has the number of the line.
    """
    if not root.is_file():
        there = "a folder" if isinstance(root, Path) and root.is_dir() else "not there"
        raise DataError(
            f"the CSV file {root} is {there}: give a file whose first line is {','.join(COLUMNS)} "
            "with --root, or photos in a folder for each person with --source folders"
        )
    base = require_folder(root.parent if images is None else images)
    rows = _read_rows(root)
    lines = list(rows)

    def numbers(column: str) -> tuple[list[int], bool]:
        values = [row[column] for row in rows.values()]
        return numbered(values, column, lambda i: f"{root}, line {lines[i]}")

    (pids, people), camids, cameras = numbers("pid"), [NO_CAMERA] * len(rows), False
    if any(row["camid"] for row in rows.values()):
        camids, cameras = numbers("camid")
    records, seen = [], dict[str, int]()
    for (line, row), pid, camid in zip(rows.items(), pids, camids, strict=True):
        where = f"{root}, line {line}"
        relative, path = _image(base, row["path"], where)
        if row["split"] not in SPLITS:
            raise DataError(f"{where}: split {row['split']!r} is none of {', '.join(SPLITS)}")
        if (
            isinstance(path, Path) and not path.is_file()
        ):  # the scan finds which objects are missing
            raise DataError(f"{where}: {path} does not exist")
        if (earlier := seen.setdefault(relative, line)) != line:
            raise DataError(f"{where}: {row['path']!r} is already listed on line {earlier}")
        names = row["pid"] if people else "", row["camid"] if cameras else ""
        records.append(ImageRecord(path, relative, pid, camid, row["split"], *names))
    return records


def _image(base: Place, name: str, where: str) -> tuple[str, Place]:
    """The name of an image in the dataset, and where it is: below `base`, or a URL of its own."""
    if name.startswith("s3://"):
        path = object_at(name)
        return name.removeprefix(f"{base}/"), path
    relative = normalized(base, name, where)
    return relative, base / relative


def _read_rows(path: Place) -> dict[int, dict[str, str]]:
    """The rows of a CSV file by the number of their line, without files of macOS."""
    rows = dict[int, dict[str, str]]()
    try:
        with io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            found = [column for column in COLUMNS if column in reader.fieldnames]
            if missing := [c for c in COLUMNS if c not in (*found, OPTIONAL)]:
                only = reader.fieldnames[0] if len(reader.fieldnames) == 1 else ""
                mark = next((f" with commas, not {mark!r}" for mark in ";\t|" if mark in only), "")
                raise DataError(
                    f"{path} has no column {', '.join(missing)}: its first line must be"
                    f" {','.join(COLUMNS)}{mark}"
                )
            for row in reader:
                if any(row[column] is None for column in found):
                    raise DataError(f"{path}, line {reader.line_num}: too few fields")
                row.setdefault(OPTIONAL, "")
                rows[reader.line_num] = {column: row[column].strip() for column in COLUMNS}
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}") from None
    wanted = {line: row for line, row in rows.items() if not is_of_macos(row["path"])}
    if skipped := len(rows) - len(wanted):
        log.warning("%s: skipped %d files that macOS makes beside images", path, skipped)
    return wanted
