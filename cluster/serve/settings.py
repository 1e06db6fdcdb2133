"""What `python -m cluster serve` is told."""

from __future__ import annotations

import hashlib
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_shards.errors import ConfigError

TOKEN = "REID_SERVE_TOKEN"
TOKEN_LENGTH = 16


@dataclass(frozen=True)
class Settings:
    """What all replicas of the service are told. Nothing here is secret."""

    model: str
    """models:/name@champion, a checkpoint's or run's folder or s3:// URL, or an ONNX file."""
    gallery: str
    """What to search: a folder or s3:// prefix of images, a sharded dataset, or embeddings."""
    enrolled: str | None = None
    """Folder or s3:// prefix for enrolled images and removals; by default GALLERY-enrolled."""
    split: str = "gallery"
    """Which split of a sharded dataset or of embeddings to search."""
    images: str | None = None
    """With embeddings as gallery: the folder or dataset of their images."""
    tracking_uri: str | None = None
    """MLflow, for models:/…; by default MLFLOW_TRACKING_URI."""
    runtime: Literal["torch", "onnx"] | None = None
    """What runs the model; by default PyTorch, and ONNX Runtime for an ONNX file."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; cuda reserves GPUs for the replicas that embed."""
    replicas: int = 1
    """Replicas that embed."""
    cpus_per_replica: int = 1
    """Cores of each replica that embeds."""
    gpus_per_replica: float = 1.0
    """GPUs of each replica that embeds, with --device cuda; a fraction shares one."""
    search_replicas: int = 1
    """Replicas that search; each holds the whole gallery in memory."""
    search_cpus: int = 1
    """Cores of each replica that searches."""
    ingress_replicas: int = 2
    """Replicas that answer HTTP."""
    approximate_above: int | None = None
    """Search galleries of more images than this by HNSW; by default every search is exact."""
    watch_seconds: float = 30.0
    """Seconds between looks at the model's alias, and at what other replicas have enrolled."""
    max_upload_bytes: int = 10 << 20
    """Largest request."""
    max_pixels: int = 25_000_000
    """Largest photo, in pixels: checked before it is decoded."""

    def check(self) -> None:
        """Raise `ConfigError` for what is out of range."""
        least = "replicas", "search_replicas", "ingress_replicas", "cpus_per_replica", "search_cpus"
        for name in (*least, "max_upload_bytes", "max_pixels"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} must be at least 1, not {getattr(self, name)}")
        if self.watch_seconds <= 0:
            raise ConfigError(f"--watch-seconds must be positive, not {self.watch_seconds:g}")
        if self.gpus_per_replica <= 0:
            raise ConfigError(f"--gpus-per-replica must be positive, not {self.gpus_per_replica}")

    @property
    def store(self) -> str:
        """Where enrolled images are."""
        return self.enrolled or f"{self.gallery.rstrip('/')}-enrolled"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def token_digest(file: Path | None, host: str) -> str | None:
    """SHA-256 of the token, in hex: all that leaves this process. None for loopback without one.

    Raises:
        ConfigError: it listens beyond loopback without a token, or the token is short.
    """
    try:
        token = os.environ.get(TOKEN, "") if file is None else file.read_text().strip()
    except OSError as error:
        raise ConfigError(f"cannot read the token from {file}: {error.strerror}") from None
    if not token and file is None and is_loopback(host):
        return None
    if len(token) < TOKEN_LENGTH:
        problem = f"a token of {len(token)} characters is too short" if token else "there is none"
        raise ConfigError(
            f"listening on {host} needs a token of at least {TOKEN_LENGTH} characters, and "
            f"{problem}: set {TOKEN}, or write one with `openssl rand -hex 32 > FILE` and give "
            "--token-file FILE"
        )
    return hashlib.sha256(token.encode()).hexdigest()
