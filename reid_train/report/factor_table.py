"""λ of every tensor over time, in a compact file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.errors import DataError
from reid_train.report.style import write_file


class Factors(NamedTuple):
    """λ over time: `names` of n tensors, `steps` (T,) int64, `values` (T, n) float32."""

    names: tuple[str, ...]
    steps: np.ndarray
    values: np.ndarray


def save_factors(
    path: Path, names: Sequence[str], steps: Sequence[int] | np.ndarray, values: np.ndarray
) -> None:
    """Write λ over time as Parquet: a `step` column, then a column a tensor under its name.

    Args:
        path: the file to write.
        names: n tensor names in network order.
        steps: (T,) optimizer steps, ascending.
        values: (T, n) float32.

    Raises:
        ValueError: the shapes disagree.
    """
    names, steps, values = checked(names, steps, values)
    columns = [pa.array(steps), *(pa.array(column) for column in values.T)]
    buffer = io.BytesIO()
    # λ moves slowly: split into byte planes, all but the last mantissa bytes compress to nothing.
    pq.write_table(
        pa.table(columns, names=["step", *names]),
        buffer,
        compression="zstd",
        use_dictionary=False,
        use_byte_stream_split=True,
        write_statistics=False,
    )
    write_file(path, buffer.getvalue())


def load_factors(path: Path) -> Factors:
    """Read what `save_factors` wrote.

    Raises:
        DataError: the file is missing or is not such a table.
    """
    try:
        table = pq.read_table(pa.BufferReader(Path(path).read_bytes()))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as a table of λ: {error}") from error
    types = [pa.int64(), *[pa.float32()] * (table.num_columns - 1)]
    if table.column_names[:1] != ["step"] or table.schema.types != types:
        raise DataError(f"{path}: not a table of λ: `step` (int64), then float32 columns")
    columns = [column.to_numpy() for column in table.columns[1:]]
    steps = table.column(0).to_numpy()
    values = np.stack(columns, axis=1) if columns else np.empty((len(steps), 0), np.float32)
    return Factors(tuple(table.column_names[1:]), steps, values)


def checked(names: Sequence[str], steps: Sequence[int] | np.ndarray, values: np.ndarray) -> Factors:
    """λ over time in its own types; shapes that disagree are a ValueError."""
    steps, values = np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=np.float32)
    if not len(steps):
        values = values.reshape(0, len(names))
    if values.shape != (len(steps), len(names)):
        raise ValueError(
            f"λ over time: {len(steps)} steps and {len(names)} names need values of shape "
            f"{(len(steps), len(names))}, got {values.shape}"
        )
    return Factors(tuple(names), steps, values)
