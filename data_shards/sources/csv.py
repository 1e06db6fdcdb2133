"""Any images, listed in a CSV file with the columns `path,pid,camid,split`; camid is optional."""

import csv
import logging
from pathlib import Path

from data_shards.errors import DataError
from data_shards.records import NO_CAMERA, SPLITS, ImageRecord
from data_shards.sources.layout import is_of_macos, normalized, require_folder

log = logging.getLogger(__name__)

COLUMNS = ("path", "pid", "camid", "split")
OPTIONAL = "camid"


def read(root: Path, *, images: Path | None = None) -> list[ImageRecord]:
    """Read a CSV file with a header.

    `pid` and `camid` are integers from 0 up, or all of them are names, which are then numbered in
    sorted order. If the column `camid` is missing, or empty on all lines, the cameras are not
    known. `split` is one of `SPLITS`. Files of macOS (`._name`, `.DS_Store`) are skipped.

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
    rows = _read_rows(root)
    pids, camids = _numbers(rows, "pid", root), [NO_CAMERA] * len(rows)
    if any(row["camid"] for row in rows.values()):
        camids = _numbers(rows, "camid", root)
    records, seen = [], dict[str, int]()
    for (line, row), pid, camid in zip(rows.items(), pids, camids, strict=True):
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


def _read_rows(path: Path) -> dict[int, dict[str, str]]:
    """The rows of a CSV file by the number of their line, without files of macOS."""
    rows = dict[int, dict[str, str]]()
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            found = [column for column in COLUMNS if column in reader.fieldnames]
            if missing := [c for c in COLUMNS if c not in (*found, OPTIONAL)]:
                raise DataError(
                    f"{path} has no column {', '.join(missing)}: its first line must be"
                    f" {','.join(COLUMNS)}"
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


def _numbers(rows: dict[int, dict[str, str]], column: str, path: Path) -> list[int]:
    """Integers as they are, names numbered in sorted order. A mix of both is refused."""
    values = {line: row[column] for line, row in rows.items()}
    names = {n: v for n, v in values.items() if not (v.isascii() and v.isdecimal())}
    if not names:
        return [int(value) for value in values.values()]
    if len(names) < len(values) or any(not v or v.lstrip("-").isdecimal() for v in names.values()):
        line, value = next(iter(names.items()))
        or_none = ", or none at all if cameras are not known" if column == OPTIONAL else ""
        raise DataError(
            f"{path}, line {line}: {column} {value!r} is not an integer from 0"
            f" up (use integers on all lines, or names on all lines{or_none})"
        )
    number = {name: i for i, name in enumerate(sorted(set(values.values())))}
    return [number[value] for value in values.values()]
