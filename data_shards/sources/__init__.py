"""The datasets that can be sharded, by the name of their source."""

from __future__ import annotations

from data_shards.sources import csv, dukemtmc, market1501, msmt17
from data_shards.sources.layout import Source
from data_shards.sources.synthetic import render as synthetic

SOURCES: dict[str, Source] = {
    "msmt17": Source("MSMT17", msmt17.read, msmt17.COUNTS),
    "market1501": Source("Market-1501", market1501.read, market1501.COUNTS),
    "dukemtmc": Source("DukeMTMC-reID", dukemtmc.read, dukemtmc.COUNTS),
    "csv": Source("CSV", csv.read),
    "synthetic": Source("Synthetic people", synthetic.read),
}
