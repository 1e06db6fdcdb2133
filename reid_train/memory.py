"""What Ray says of a machine that ran out of memory, in one line."""

from __future__ import annotations

import re

_KILLED = "due to the node running low on memory"
_NODE = re.compile(r"Memory on the node \(IP: ([^,]+),[^)]*\) was (\S+) used / (\S+) limit")
_USER = re.compile(r"^\d+\t([\d.]+)\t(.+)$", re.MULTILINE)
_SHOWN = 3  # of the programs that used most


def out_of_memory(text: str) -> str | None:
    """Where memory ran out and what used it, from the text of one of Ray's errors.

    Args:
        text: what Ray's memory monitor said when it killed a process.

    Returns:
        A sentence without its end; None if the error is another.
    """
    if _KILLED not in text:
        return None
    node = _NODE.search(text)
    where = f" on {node[1]} ({node[2]} of {node[3]} in use)" if node else ""
    users = [f"{command[:60]} {size} GB" for size, command in _USER.findall(text)[:_SHOWN]]
    return f"memory ran out{where}; most was used by: {', '.join(users) or 'unknown'}"
