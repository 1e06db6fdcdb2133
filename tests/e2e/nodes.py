"""A Ray cluster of several nodes on this machine, which share no disk folder.

As root each node is a network namespace with an address of its own, and sees its own /tmp and
/dev/shm. Elsewhere nodes are raylets that differ in their home folder.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import ray

from cluster.local.s3_server import free_ports

PATIENCE = 400.0
RAY = [str(Path(sys.executable).parent / "ray"), "start", "--disable-usage-stats", "--block"]
PORTS = ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]


def namespaces_allowed() -> bool:
    """Whether this process may make network and mount namespaces."""
    if os.geteuid() or not (shutil.which("ip") and shutil.which("unshare")):
        return False
    name = f"reid-{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode:
        return False
    subprocess.run(["ip", "netns", "del", name], check=True)
    return not subprocess.run(
        ["unshare", "-m", "true"], capture_output=True, check=False
    ).returncode


@dataclass
class Nodes:
    """A head without CPUs, on this host, and nodes with two each.

    Attributes:
        address: the head's, for `RAY_ADDRESS`.
        host: the address by which nodes reach this host.
        separate: whether nodes have addresses and disks of their own.
    """

    folder: Path
    host: str
    network: str
    separate: bool
    address: str = ""
    nodes: dict[str, subprocess.Popen] = field(default_factory=dict)

    def start_head(self) -> None:
        """Start Ray's head and wait for it."""
        port, client = free_ports(2)
        self.address = f"{self.host}:{port}"
        command = [*RAY, *PORTS, "--head", f"--node-ip-address={self.host}", f"--port={port}"]
        command += ["--num-cpus=0", f"--ray-client-server-port={client}"]
        command += ["--include-dashboard=true", f"--dashboard-port={free_ports(1)[0]}"]
        self.nodes["head"] = self._start("head", [*command, f"--temp-dir={self.folder / 'r'}"])
        self.wait_for(1)

    def start_node(self, number: int) -> str:
        """Start a node of two CPUs; returns its address."""
        command = [*RAY, *PORTS, f"--address={self.address}", "--num-cpus=2"]
        name = f"{self.network}n{number}"
        if not self.separate:
            self.nodes[str(number)] = self._start(name, command)
            return self.host
        ip = f"{self.host.rpartition('.')[0]}.{number + 1}"
        bridge = f"{self.network}br"
        for words in (
            f"netns add {name}",
            f"link add {name}v type veth peer name eth0 netns {name}",
            f"link set {name}v master {bridge} up",
            f"-n {name} link set lo up",
            f"-n {name} addr add {ip}/24 dev eth0",
            f"-n {name} link set eth0 up",
        ):
            subprocess.run(["ip", *words.split()], check=True)
        mounts = "for d in /tmp /dev/shm; do mount -t tmpfs -o size=4g none $d; done"
        command.append(f"--node-ip-address={ip}")
        inside = ["ip", "netns", "exec", name, "unshare", "-m", "sh", "-c"]
        inside += [f'{mounts}; mkdir -p "$HOME"; exec "$@"', "sh"]
        # The host's name means loopback in there.
        inside = ["env", "GLOO_SOCKET_IFNAME=eth0", *inside]
        self.nodes[str(number)] = self._start(name, inside + command)
        return ip

    def stop_node(self, number: int) -> None:
        """Take a node away for good."""
        _kill(self.nodes.pop(str(number)))

    def wait_for(self, count: int) -> None:
        """Wait until so many nodes are alive, the head among them."""
        deadline = time.monotonic() + PATIENCE
        code = "import ray; ray.init(logging_level='ERROR'); "
        code += "print(sum(node['Alive'] for node in ray.nodes()))"
        environment = os.environ | {"RAY_ADDRESS": self.address}
        while True:
            # Now and then a client that comes while the head starts waits for ever.
            with contextlib.suppress(subprocess.TimeoutExpired):
                found = subprocess.run(
                    [sys.executable, "-c", code],
                    env=environment, capture_output=True, text=True, check=False, timeout=60,
                )  # fmt: skip
                if found.stdout.strip() == str(count):
                    return
            assert time.monotonic() < deadline, f"there are not {count} nodes"

    def _start(self, name: str, command: list[str]) -> subprocess.Popen:
        home = Path(f"/tmp/home-{name}") if self.separate else self.folder / name
        home.mkdir(exist_ok=True)
        with open(self.folder / f"{name}.log", "wb") as log:
            return subprocess.Popen(
                command,
                env=os.environ | {"HOME": str(home), "REID_LOG_LEVEL": "DEBUG"},
                stdout=log,
                stderr=log,
            )


def _kill(process: subprocess.Popen) -> None:
    """End a node as a power cut does."""
    tree = [*psutil.Process(process.pid).children(recursive=True), process]
    for part in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            part.kill()
    process.wait()
    psutil.wait_procs(tree[:-1], timeout=30)


@contextlib.contextmanager
def nodes(folder: Path) -> Iterator[Nodes]:
    """Room for nodes; everything is taken down at the end."""
    network, separate = f"reid{secrets.token_hex(2)}", namespaces_allowed()
    host = f"198.18.{secrets.randbelow(250) + 1}.1" if separate else ray.util.get_node_ip_address()
    cluster = Nodes(folder, host, network, separate)
    try:
        if separate:
            for words in (
                f"link add {network}br type bridge",
                f"addr add {host}/24 dev {network}br",
                f"link set {network}br up",
            ):
                subprocess.run(["ip", *words.split()], check=True)
        yield cluster
    finally:
        for process in reversed(cluster.nodes.values()):
            _kill(process)
        if separate:
            for space in subprocess.run(
                ["ip", "netns", "list"], capture_output=True, text=True, check=True
            ).stdout.split():
                if space.startswith(network):
                    subprocess.run(["ip", "netns", "del", space], check=True)
            subprocess.run(["ip", "link", "del", f"{network}br"], check=False)
