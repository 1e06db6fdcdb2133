"""Join datasets into one."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_shards.building import state
from data_shards.building.build import work_folder
from data_shards.building.numbering import next_numbers
from data_shards.building.reading import check_name, sanitized
from data_shards.building.versions import Change, commit, moved, shifted
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError, StorageError
from data_shards.index import Index
from data_shards.manifest import Names, ShardInfo, json_digest
from data_shards.progress import Progress, silent
from data_shards.records import NO_CAMERA
from data_shards.storage import Storage, open_storage

THREADS = 8  # that copy shards


def merge(
    urls: Sequence[str], out: str, *, name: str | None = None, progress: Progress = silent
) -> Change:
    """Join datasets: identities and cameras of one are never those of another.

    Shards are not written anew. In local folders they are hard links; on S3 the server copies them.

    Args:
        urls: of the datasets.
        out: an empty place, an interrupted merge of these datasets, or this very merge.
        name: of the new dataset; by default their names, joined.

    Raises:
        ConfigError: fewer than two datasets, or two of one name.
        DataError: something else is at `out`.
    """
    if len(urls) < 2:
        raise ConfigError("a merge needs two datasets or more")
    datasets = [Dataset.open(url) for url in urls]
    origins = [{d.manifest.dataset_of(s) for s in d.manifest.shards} for d in datasets]
    names = [name for of_dataset in origins for name in of_dataset]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(
            f"two of the datasets are, or have parts, named {', '.join(sorted(twice))}: results are"
            " shown by these names, so build one of them with another --name"
        )
    name = name or sanitized("-".join(dataset.manifest.name for dataset in datasets))
    check_name(name)
    parts = [[d.manifest.name, d.digest] for d in datasets]
    content, storage = json_digest(["merge", name, parts]), open_storage(out)
    with work_folder(None, f"{content} {storage.url}") as folder:
        if (found := state.find_finished(storage, content)) is not None:
            return Change(found, 0, already_made=True)
        shards, indices, copies, kept, pid, camid = [], [], [], [], 0, 0
        for number, dataset in enumerate(datasets):
            for shard in dataset.manifest.shards:
                key = f"shards/{number}/{shard.name.removeprefix('shards/')}"
                copies.append((dataset.storage, shard, key))
                of_part = moved(dataset.manifest, shard, pid, camid)
                shards.append(of_part.model_copy(update={"name": key}))
            index, first = dataset.whole, len(shards) - len(dataset.manifest.shards)
            indices.append(shifted(index, first, pid, camid))
            if dataset.manifest.names is not None:
                kept.append(dataset.manifest.names.shifted(pid, camid))
            more = next_numbers(dataset.manifest, [index])
            pid, camid = pid + more[0], camid + more[1]
        if pid >= 1 << 62 or camid >= NO_CAMERA:
            raise DataError("the pids or camids of these datasets are too large to be joined")
        state.claim(storage, content)
        _copy_all(copies, storage, folder, progress)
        manifest = commit(
            storage,
            None,
            shards,
            Index.concatenated(indices),
            name=name,
            source="merge",
            options={"datasets": parts},
            content=content,
            complete=all(dataset.manifest.complete for dataset in datasets),
            left_out=tuple(item for dataset in datasets for item in dataset.manifest.left_out),
            names=Names.joined(kept),
        )
    return Change(manifest, sum(info.images for info in manifest.splits.values()))


def _copy_all(
    copies: Sequence[tuple[Storage, ShardInfo, str]],
    target: Storage,
    folder: Path,
    progress: Progress,
) -> None:
    """Copy shards that an interrupted merge did not."""

    def copy(task: tuple[Storage, ShardInfo, str]) -> int:
        source, shard, key = task
        if not target.exists(key) or target.size(key) != shard.bytes:
            if not target.copy_from(source, shard.name, key):
                path = folder / key.replace("/", "-")
                source.download(shard.name, path, sha256=shard.sha256)
                target.upload(key, path)
                path.unlink()
            if target.size(key) != shard.bytes:
                raise StorageError(f"{target.url}/{key} arrived with another size: try again")
        return shard.images

    done, total = 0, sum(shard.images for _, shard, _ in copies)
    progress("copying", 0, total)
    with ThreadPoolExecutor(THREADS) as pool:
        for images in pool.map(copy, copies):
            done += images
            progress("copying", done, total)
