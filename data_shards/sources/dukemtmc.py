"""DukeMTMC-reID: Market-1501's folders; `0002_c1_f0044158.jpg`.

Its authors have withdrawn it, so it cannot be downloaded; this reads an existing copy.
"""

from __future__ import annotations

import re
from pathlib import Path

from data_shards.records import ImageRecord
from data_shards.sources.layout import Counts, read_folders

COUNTS = Counts(16_522, 702, 2_228, 17_661, 8)
NAME = re.compile(r"(?P<pid>-1|\d+)_c(?P<camid>\d+)_")


def read(root: Path) -> list[ImageRecord]:
    """Read DukeMTMC-reID from its unpacked archive."""
    return read_folders(root, "DukeMTMC-reID", "DukeMTMC-reID", NAME)
