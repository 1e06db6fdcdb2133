"""The datasets that can be sharded, by the name of their source."""

from data_shards.sources import csv, msmt17
from data_shards.sources.layout import Source
from data_shards.sources.market1501 import DUKEMTMC, MARKET1501
from data_shards.sources.synthetic import render as synthetic

SOURCES: dict[str, Source] = {
    "msmt17": Source("MSMT17", msmt17.read, msmt17.COUNTS),
    "market1501": MARKET1501,
    "dukemtmc": DUKEMTMC,
    "csv": Source("CSV", csv.read),
    "synthetic": Source("Synthetic people", synthetic.read),
}
