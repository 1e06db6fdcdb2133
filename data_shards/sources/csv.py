"""Any images at all, listed in a CSV file with the columns `path,pid,camid,split`."""

from __future__ import annotations

import csv
from pathlib import Path

from data_shards.errors import DataError
from data_shards.records import SPLITS, ImageRecord
from data_shards.sources.layout import inside, require_folder

COLUMNS = ("path", "pid", "camid", "split")


def read(root: Path, *, images: Path | None = None) -> list[ImageRecord]:
    """Read a CSV file with a header.

    `pid` and `camid` are integers from 0 up, or all of them names, which are then numbered by
    their sorted order. `split` is train, val, query or gallery.

    Args:
        root: the CSV file.
        images: the folder that its paths are relative to; by default the one it is in.

    Raises:
        DataError: a missing column or file, a value that is wrong, a path that leads elsewhere;
            with the number of the line.
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
        path = inside(base, row["path"], where)
        if row["split"] not in SPLITS:
            raise DataError(f"{where}: split {row['split']!r} is none of {', '.join(SPLITS)}")
        if not path.is_file():
            raise DataError(f"{where}: {path} is not there")
        if seen.setdefault(row["path"], line) != line:
            raise DataError(f"{where}: {row['path']!r} is on line {seen[row['path']]} already")
        records.append(ImageRecord(path, row["path"], pid, camid, row["split"]))
    return records


def _read_rows(path: Path) -> tuple[list[int], list[dict[str, str]]]:
    lines, rows = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := [c for c in COLUMNS if c not in (reader.fieldnames or ())]:
                raise DataError(
                    f"{path} has no column {', '.join(missing)}: its first line must name the "
                    f"columns {', '.join(COLUMNS)}"
                )
            for row in reader:
                if any(row[column] is None for column in COLUMNS):
                    raise DataError(f"{path}, line {reader.line_num}: it has too few fields")
                lines.append(reader.line_num)
                rows.append({column: row[column].strip() for column in COLUMNS})
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}") from None
    return lines, rows


def _numbers(values: list[str], column: str, path: Path, lines: list[int]) -> list[int]:
    """Integers as they are; names by their sorted order. A mix is a mistake somewhere."""
    bad = [i for i, value in enumerate(values) if not (value.isascii() and value.isdecimal())]
    if bad and (len(bad) < len(values) or any(not v or v.lstrip("-").isdecimal() for v in values)):
        raise DataError(
            f"{path}, line {lines[bad[0]]}: {column} {values[bad[0]]!r} is not an integer from 0"
            " up (or use names throughout)"
        )
    if not bad:
        return [int(value) for value in values]
    number = {name: i for i, name in enumerate(sorted(set(values)))}
    return [number[value] for value in values]
