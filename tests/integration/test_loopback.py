"""What a command's own Ray listens to."""

from __future__ import annotations

import json
import os
import subprocess
import sys

START = """
import json
import psutil
from data_shards.ray_utils import prepare_ray, start_ray
prepare_ray()
import ray
start_ray(1)
ray.get(ray.remote(lambda: None).remote())
me, addresses = psutil.Process(), set()
for process in (me, *me.children(recursive=True)):
    try:
        connections = process.net_connections()
    except psutil.Error:
        continue
    addresses |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
print(json.dumps(sorted(addresses)))
"""


def test_ray_started_by_a_command_listens_only_on_loopback():
    environment = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"}
    done = subprocess.run(
        [sys.executable, "-c", START], env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    addresses = set(json.loads(done.stdout.splitlines()[-1]))
    assert addresses, done.stderr
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
