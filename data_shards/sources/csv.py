"""Any images, listed in a CSV file with the columns `path,pid,camid,split`."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

from data_shards.errors import DataError
from data_shards.records import SPLITS, ImageRecord
from data_shards.sources.layout import is_of_macos, normalized, require_folder

log = logging.getLogger(__name__)

COLUMNS = ("path", "pid", "camid", "split")


def read(root: Path, *, images: Path | None = None) -> list[ImageRecord]:
    """Read a CSV file with a header.

    `pid` and `camid` are integers from 0 up, or all of them are names, which are then numbered in
    sorted order. `split` is train, val, query or gallery. Files of macOS (`._name`, `.DS_Store`)
    are skipped.

    Args:
        root: the CSV file.
        images: the folder that its paths are relative to; by default the CSV file's.

    Raises:
        DataError: a missing column or file, a wrong value, a path outside the folder, or an image
            that is listed twice; the message has the number of the line.
    """
    if not root.is_file():
        raise DataError(f"{root} is not a file: give the CSV with --root")
    base = require_folder(root.parent if images is None else images)
    lines, rows = _read_rows(root)
    pids = _numbers([row["pid"] for row in rows], "pid", root, lines)
    camids = _numbers([row["camid"] for row in rows], "camid", root, lines)
    records, seen = [], dict[str, int]()
    for line, row, pid, camid in zip(lines, rows, pids, camids, strict=True):
        where = f"{root}, line {line}"
        relative = normalized(base, row["path"], where)
        path = base / relative
        if row["split"] not in SPLITS:
            raise DataError(f"{where}: split {row['split']!r} is none of {', '.join(SPLITS)}")
        if not path.is_file():
            raise DataError(f"{where}: {path} does not exist")
        if (earlier := seen.setdefault(relative, line)) != line:
            raise DataError(f"{where}: {row['path']!r} is already listed on line {earlier}")
        records.append(ImageRecord(path, relative, pid, camid, row["split"]))
    return records


def _read_rows(path: Path) -> tuple[list[int], list[dict[str, str]]]:
    lines, rows, skipped = [], [], 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            if missing := [c for c in COLUMNS if c not in reader.fieldnames]:
                raise DataError(
                    f"{path} has no column {', '.join(missing)}: its first line must be"
                    f" {','.join(COLUMNS)}"
                )
            for row in reader:
                if any(row[column] is None for column in COLUMNS):
                    raise DataError(f"{path}, line {reader.line_num}: too few fields")
                if is_of_macos(row["path"].strip()):
                    skipped += 1
                    continue
                lines.append(reader.line_num)
                rows.append({column: row[column].strip() for column in COLUMNS})
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}") from None
    if skipped:
        log.warning("%s: skipped %d files that macOS makes beside images", path, skipped)
    return lines, rows


def _numbers(values: list[str], column: str, path: Path, lines: list[int]) -> list[int]:
    """Integers as they are, names numbered in sorted order. A mix of both is refused."""
    bad = [i for i, value in enumerate(values) if not (value.isascii() and value.isdecimal())]
    if bad and (len(bad) < len(values) or any(not v or v.lstrip("-").isdecimal() for v in values)):
        raise DataError(
            f"{path}, line {lines[bad[0]]}: {column} {values[bad[0]]!r} is not an integer from 0"
            " up (use integers on all lines, or names on all lines)"
        )
    if not bad:
        return [int(value) for value in values]
    number = {name: i for i, name in enumerate(sorted(set(values)))}
    return [number[value] for value in values]
