"""A Ray that a command starts for itself listens to this machine alone."""

from __future__ import annotations

import os


def keep_ray_home() -> None:
    """Keep the Ray that this process may start off the network; before Ray is imported.

    Ray would listen on the machine's outward address. It has this switch for systems whose
    firewalls ask; on all others it does the same.
    """
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
