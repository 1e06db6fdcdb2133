"""Ray's environment variables: quiet, and off the network. Set them before importing Ray."""

from __future__ import annotations

import os

NOISE = (
    # Ray Train's own actor; nothing depends on its restart (Ray's issue 53727).
    "PreemptionWatcher",
    # It is specified so that gradient buckets keep their layout, and a resumed run its sums.
    "find_unused_parameters=True was specified",
    # Machines without a name service: the connection stands.
    "hostname of the client socket cannot be retrieved",
    # Actors that need no CPU, such as the board, count as too many processes.
    "PYTHON worker processes have been started",
)
"""Lines of workers that are not shown here; Ray's log files have them."""


def prepare_ray() -> None:
    """Set Ray's environment variables; call it before anything imports Ray.

    Ray listens on the machine's outward address. A cluster that this process starts stays on
    loopback: Ray has a switch for systems with firewalls that ask, and it works on all others too.
    """
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "|".join(NOISE))
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # Ray's default for a new cluster, which it otherwise prints a notice about.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
