"""Loops that Numba compiles. It keeps the compiled code beside the source or in the home folder.

In a container with a read-only image and an unknown user it can write to neither, and would refuse
to compile. Then each process compiles anew.
"""

import atexit
import os
import shutil
import tempfile

import numba
from numba.core import config


def _probe() -> None:
    pass


try:
    numba.njit(cache=True)(_probe)
except RuntimeError:  # nowhere to keep compiled code
    folder = os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="reid-numba-")
    config.reload_config()
    del os.environ["NUMBA_CACHE_DIR"]  # child processes outlive the folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
