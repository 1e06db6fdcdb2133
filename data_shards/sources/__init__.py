"""The datasets that can be sharded, by the name of their source."""

from data_shards.sources import csv, folders, msmt17, webdataset
from data_shards.sources.cuhk03 import DETECTED, LABELED
from data_shards.sources.layout import Source, with_disk_errors
from data_shards.sources.market1501 import DUKEMTMC, MARKET1501, VERI776
from data_shards.sources.synthetic import render as synthetic

_PARSERS: dict[str, Source] = {
    "msmt17": Source("MSMT17", msmt17.read, msmt17.COUNTS),
    "market1501": MARKET1501,
    "dukemtmc": DUKEMTMC,
    "veri776": VERI776,
    "cuhk03_labeled": LABELED,
    "cuhk03_detected": DETECTED,
    "folders": Source("Folders", folders.read),
    "csv": Source("CSV", csv.read),
    "webdataset": Source("WebDataset", webdataset.read, streamed=True),
    "synthetic": Source("Synthetic people", synthetic.read),
}
# Streamed ones read through a storage, which explains what a disk refuses.
SOURCES = {
    name: source if source.streamed else source._replace(read=with_disk_errors(source.read))
    for name, source in _PARSERS.items()
}
