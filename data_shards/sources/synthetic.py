"""placeholder"""

from pathlib import Path

from data_shards.records import ImageRecord


def read(root: Path) -> list[ImageRecord]:
    return []
