"""Market-1501: `bounding_box_train`, `query`, `bounding_box_test`; `0002_c1s1_000451_03.jpg`."""

from __future__ import annotations

import re
from pathlib import Path

from data_shards.records import ImageRecord
from data_shards.sources.layout import Counts, read_folders

# The gallery has 19,732 files: 3,819 of pid -1 are dropped, 2,798 of pid 0 are distractors.
COUNTS = Counts(12_936, 751, 3_368, 15_913, 6)
NAME = re.compile(r"(?P<pid>-1|\d+)_c(?P<camid>\d+)s\d+_")


def read(root: Path) -> list[ImageRecord]:
    """Read Market-1501 from its unpacked archive."""
    return read_folders(root, "Market-1501", "Market-1501-v15.09.15", NAME)
