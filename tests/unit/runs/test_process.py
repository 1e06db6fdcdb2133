"""A worker's memory is used again, and temporary files are removed once their worker died."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

PAGE = resource.getpagesize()
WORKER = """
import sys, tempfile
from reid_train.runs.process import own_temporary_folder
own_temporary_folder()
open(tempfile.mkdtemp() + "/checkpoint", "w").write("x")
print(tempfile.gettempdir(), flush=True)
sys.stdin.read()
"""

TENSORS = """
import ctypes, resource, sys, threading
import torch
from reid_train.runs.process import keep_freed_memory
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: no huge pages, each is one fault
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        tensors = [torch.ones(size << 18) for size in (1, 20, 70)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def work():
    print(min(faults() for _ in range(5)))
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def worker(folder: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process with temporary files, and where they are."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env={"TMPDIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[3])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_killed_workers_files_are_removed_by_the_next_and_a_living_ones_stay(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    killed, left = worker(tmp_path)
    living, kept = worker(tmp_path)
    assert left.parent == kept.parent == tmp_path
    killed.kill()
    killed.wait()
    assert list(left.rglob("checkpoint"))
    third, own = worker(tmp_path)
    assert {other, kept, own} == set(tmp_path.iterdir())
    assert list(kept.rglob("checkpoint"))
    for process in (living, third):
        process.communicate()
    assert list(tmp_path.iterdir()) == [other], "workers that end remove theirs"


def test_compiled_code_is_kept_for_the_next_process(tmp_path):
    program = (
        "from reid_train.runs.process import own_temporary_folder; own_temporary_folder()\n"
        "from torch._inductor.runtime.cache_dir_utils import cache_dir; print(cache_dir())"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert Path(found[0]).parent == tmp_path
    assert Path(found[0]).is_dir()


def test_memory_of_freed_tensors_is_used_again():
    """As in Ray, not in the main thread. A fault is a page that the kernel fills with zeros."""
    faults = {}
    for how in ("kept", "as usual"):
        command = [sys.executable, "-c", TENSORS, how]
        folder = str(Path(__file__).parents[3])
        found = subprocess.run(command, env={"PYTHONPATH": folder}, stdout=subprocess.PIPE)
        faults[how] = int(found.stdout)
    assert faults["as usual"] > 3 * (70 << 20) / PAGE
    assert faults["kept"] < faults["as usual"] / 20
