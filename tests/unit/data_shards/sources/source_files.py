"""Small folders of made-up files, as sources read them."""

from __future__ import annotations

from pathlib import Path

from data_shards.sources import SOURCES


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not opened by a parser")


def brief(records) -> list[tuple[str, int, int, str]]:
    return [(r.relative, r.pid, r.camid, r.split) for r in records]


def read(name: str, root: Path, **options):
    return SOURCES[name].read(root, **options)
