"""One line for a machine or a GPU that ran out of memory."""

import re

_NODE = re.compile(r"Memory on the node \(IP: ([^,]+),[^)]*\) was (\S+) used / (\S+) limit")
_USER = re.compile(r"^\d+\t([\d.]+)\t(.+)$", re.MULTILINE)
_GPU = "CUDA out of memory."
_ASKED = re.compile(
    r"Tried to allocate ([\d.]+ \w+)\. GPU \d+ has a total capacity of ([\d.]+ \w+)"
)


def gpu_out_of_memory(text: str) -> bool:
    """Whether an error says that a GPU is too small, which the same batch would only meet again."""
    return _GPU in text


def out_of_memory(text: str) -> str | None:
    """Where memory ran out and what used it, from PyTorch's or Ray's error; None for any other."""
    if gpu_out_of_memory(text):
        asked = _ASKED.search(text)
        more = f": {asked[1]} more were asked for, of {asked[2]} in all" if asked else ""
        return f"a GPU's memory ran out{more}"
    if "due to the node running low on memory" not in text:
        return None
    node = _NODE.search(text)
    where = f" on {node[1]} ({node[2]} of {node[3]} in use)" if node else ""
    users = [f"{command[:60]} {size} GB" for size, command in _USER.findall(text)[:3]]
    return f"memory ran out{where}; most was used by: {', '.join(users) or 'unknown'}"
