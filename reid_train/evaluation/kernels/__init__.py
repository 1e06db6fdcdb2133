"""Loops that Numba compiles. It keeps the compiled code beside the source or in the home folder.

In a container with a read-only image and an unknown user it can write to neither, and would refuse
to compile. Then each process compiles anew.
"""

import atexit
import shutil
import tempfile

import numba


def _probe() -> None:
    pass


try:
    numba.njit(cache=True)(_probe)
except RuntimeError:  # nowhere to keep compiled code
    numba.config.CACHE_DIR = tempfile.mkdtemp(prefix="reid-numba-")
    atexit.register(shutil.rmtree, numba.config.CACHE_DIR, ignore_errors=True)
