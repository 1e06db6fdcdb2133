"""The service on real Ray Serve: HTTP, the page, killed replicas, and another champion."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from mlflow import MlflowClient
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from cluster.serve import command
from cluster.serve.settings import Settings
from data_shards.building.build import build
from data_shards.dataset import Dataset
from reid_train.commands.export import Export, export
from reid_train.config import ImageConfig, ModelConfig, TrainConfig
from reid_train.evaluation.thresholds import Threshold, Thresholds
from reid_train.model.network import ReidNet
from reid_train.registry.attached import THRESHOLDS, attach
from reid_train.registry.registry import register
from reid_train.tracking.tracker import Tracker
from reid_train.tracking.uris import local_tracking

CHROMIUM = Path("/usr/bin/chromium")
SHOTS = os.environ.get("REID_SCREENSHOTS")  # a folder to keep pictures of the page in
PATIENCE = 240.0
AT = Threshold(1e-3, 0.95, 0.94, 0.96, 0.9, 0.8, 1.0)


@dataclass
class Service:
    """The running service, and what it serves."""

    settings: Settings
    port: int
    client: MlflowClient
    dataset: Dataset

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, **changes: object) -> None:
        """Start it; if it runs, start it anew with other settings."""
        settings = replace(self.settings, **changes)  # type: ignore[arg-type]
        command.start(command.checked(settings), None, "127.0.0.1", self.port)

    def ask(
        self, method: str, path: str, files: dict[str, bytes] | None = None, **fields: object
    ) -> tuple[int, Any]:
        """Status and JSON, or bytes, of one request."""
        mark, body = uuid.uuid4().hex, b""
        for name, data in (files or {}).items():
            body += f'--{mark}\r\nContent-Disposition: form-data; name="{name}"; '.encode()
            body += b'filename="a.jpg"\r\n\r\n' + data + b"\r\n"
        for name, value in fields.items():
            body += f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode()
            body += f"{value}\r\n".encode()
        body += f"--{mark}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={mark}"}
        given = body if method == "POST" else None
        request = urllib.request.Request(self.url + path, given, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                data, kind = answer.read(), answer.headers["Content-Type"]
                return answer.status, json.loads(data) if "json" in kind else data
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def photo(self, row: int) -> bytes:
        """A query image of the dataset."""
        return self.dataset.read(self.dataset.index("query"), row)

    @property
    def status(self) -> dict[str, Any]:
        return self.ask("GET", "/healthz")[1]

    def kill(self, deployment: str) -> None:
        """End a replica at once."""
        name = f"ray::ServeReplica:reid:{deployment}"
        found = [p for p in psutil.Process().children(recursive=True) if name in _title(p)]
        assert found, f"no process {name}"
        os.kill(found[0].pid, signal.SIGKILL)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@dataclass
class Load:
    """Searches without end, and what they were answered."""

    statuses: list[int] = field(default_factory=list)
    models: list[str] = field(default_factory=list)


@contextmanager
def searching(service: Service) -> Iterator[Load]:
    """Search from two threads while the block runs; at least once after its end."""
    load, stop, photo = Load(), threading.Event(), service.photo(0)

    def search() -> None:
        while True:
            last = stop.is_set()
            status, answer = service.ask("POST", "/search", {"photo": photo}, top=3)
            load.statuses.append(status)
            load.models.append(answer["model"] if status == 200 else str(answer))
            if last:
                return
            time.sleep(0.05)  # new replicas need the cores, too

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("serve")
    people = {"identities": 12, "cameras": 3, "images_per_camera": 2}
    data = str(folder / "shards")
    build("synthetic", folder / "raw", data, options=people, jobs=1)
    uri = local_tracking(folder / "tracking")
    for seed in (0, 1):
        _register(folder / f"model-{seed}", uri, seed)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = Settings(
        "models:/people@champion",
        data,
        enrolled=str(folder / "enrolled"),
        tracking_uri=uri,
        device="cpu",
        ingress_replicas=1,
        search_replicas=2,
        watch_seconds=0.5,
    )
    client = MlflowClient(uri)
    client.set_registered_model_alias("people", "champion", "1")
    try:
        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        service = Service(settings, port, client, Dataset.open(data))
        service.start()
        yield service
    finally:
        command.end()
        ray.shutdown()


def _register(folder: Path, uri: str, seed: int) -> None:
    """An untrained network as a version of the model, with a threshold."""
    model = ModelConfig(backbone="timm:test_resnet", weights="none", stripes=1)
    size = ImageConfig(height=32, width=16)
    config = TrainConfig(recipe="test", image=size, model=model, precision="float32")
    folder.mkdir()
    torch.manual_seed(seed)
    state = ReidNet.from_config(config, identities=5).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(config.to_json())
    run = Tracker.start(uri, "reid", run_name=f"run-{seed}")
    run.close()
    made = register(
        folder,
        "people",
        {"mAP": 0.5},
        manifest_digest="m" * 64,
        evaluation_digest="e" * 64,
        run_id=str(run.run_id),
        tracking_uri=uri,
    )
    path = folder / "thresholds.json"
    path.write_text(json.dumps(Thresholds(50_000, 99, 5, (AT,), ()).to_json()))
    attach(made.uri, path, THRESHOLDS, {}, uri)


def test_a_photo_is_ranked_compared_and_embedded(service):
    photo = service.photo(0)
    status, found = service.ask("POST", "/search", {"photo": photo}, top=5)
    assert status == 200
    assert (found["model"], found["exact"]) == ("models:/people/1", True)
    scores = [match["similarity"] for match in found["matches"]]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
    assert found["threshold"]["similarity"] == AT.similarity
    _, one = service.ask("POST", "/embed", {"photo": photo})
    _, other = service.ask("POST", "/embed", {"photo": service.photo(1)})
    a, b = (np.array(answer["embedding"]) for answer in (one, other))
    _, compared = service.ask("POST", "/compare", {"a": photo, "b": service.photo(1)})
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert compared["similarity"] == pytest.approx(cosine, abs=1e-4)
    status, answer = service.ask("POST", "/search", {"photo": b"no image"})
    assert (status, json.loads(answer)) == (
        422,
        {"error": "the photo is not a readable image: send a JPEG, PNG or WebP file"},
    )
    assert b"reid_serve_gallery_images" in service.ask("GET", "/metrics")[1]


def test_all_replicas_find_an_enrolled_image_at_once_and_after_its_removal_none(service):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 32, 3), np.uint8)).save(
        file, "PNG"
    )
    status, image = service.ask("POST", "/gallery", {"photo": file.getvalue()}, pid=99, camera=1)
    assert status == 201

    def first() -> set[str]:
        """The most similar image, by eight searches: two replicas share them."""
        asked = [
            service.ask("POST", "/search", {"photo": file.getvalue()}, top=1) for _ in range(8)
        ]
        return {found["matches"][0]["id"] for _, found in asked}

    assert first() == {image["id"]}
    picture = service.ask("GET", f"/gallery/{image['id']}/image")[1]
    assert Image.open(io.BytesIO(picture)).size == (32, 64)
    assert service.ask("DELETE", f"/gallery/{image['id']}") == (200, {"removed": True})
    assert service.ask("DELETE", f"/gallery/{image['id']}") == (200, {"removed": False})
    assert image["id"] not in first()


@pytest.mark.skipif(not CHROMIUM.exists(), reason="there is no chromium")
def test_the_page_searches_filters_and_tells_errors(service, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    name = '<img src=x onerror="document.title=1">.jpg'
    (tmp_path / name.replace("/", "_")).write_bytes(service.photo(0))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.set_default_timeout(PATIENCE * 1000)
        playwright.expect.set_options(timeout=PATIENCE * 1000)
        page.goto(service.url)
        title = page.locator("#title")
        playwright.expect(title).to_contain_text("Gallery:")
        playwright.expect(page.locator(".picture img").nth(5)).to_be_visible()
        _shoot(page, "gallery")

        page.set_input_files("#file", str(tmp_path / name))
        playwright.expect(title).to_contain_text("most similar of")
        assert page.locator(".rank").first.inner_text() == "1"
        assert page.locator("#threshold").inner_text().startswith(tuple("0123456789"))
        playwright.expect(page.locator(".picture img").nth(5)).to_be_visible()
        _shoot(page, "ranks")

        page.get_by_label("Camera 1", exact=True).click()
        others = page.locator("button.card:not([aria-label*='camera 1'])")
        playwright.expect(others).to_have_count(0)
        page.get_by_label("Camera 1", exact=True).click()
        playwright.expect(page.locator("#grid")).not_to_have_attribute("aria-busy", "true")

        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        chosen = page.evaluate("document.activeElement.getAttribute('aria-label')")
        assert chosen.startswith("Rank 2")
        page.keyboard.press("Enter")
        # The image that is searched from is its own nearest.
        path = chosen.rpartition(", ")[2]
        nearest = page.locator("button.card").first
        playwright.expect(nearest).to_have_attribute(
            "aria-label", re.compile(f"^Rank 1, similarity 1.*{re.escape(path)}$")
        )
        page.keyboard.press("Escape")
        playwright.expect(title).to_contain_text("most similar of")

        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        _shoot(page, "narrow")
        page.set_viewport_size({"width": 1280, "height": 860})

        page.set_input_files("#file", str(tmp_path / "notes.txt"))
        assert "not an image file" in page.locator("#note").inner_text()
        assert problems == []
        page.set_input_files("#file", str(tmp_path / "broken.jpg"))
        playwright.expect(page.locator("#note")).to_contain_text("not a readable image")
        _shoot(page, "error")
        page.emulate_media(color_scheme="dark")
        page.keyboard.press("g")
        playwright.expect(title).to_contain_text("Gallery:")
        playwright.expect(page.locator(".picture img").nth(5)).to_be_visible()
        _shoot(page, "dark")
        assert all("422" in problem for problem in problems)
        browser.close()


@pytest.mark.skipif(not CHROMIUM.exists(), reason="there is no chromium")
def test_the_page_goes_back_from_a_photo_that_has_not_arrived(service):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(PATIENCE * 1000)
        playwright.expect.set_options(timeout=PATIENCE * 1000)
        held: list[Any] = []
        page.route("**/image", lambda route: held.append(route))  # a builtin is refused
        page.goto(service.url)
        title, query = page.locator("#title"), page.locator("#query")
        playwright.expect(title).to_contain_text("Gallery:")
        page.locator("button.card").first.click()
        playwright.expect(title).to_have_text("Searching…")
        page.keyboard.press("Escape")
        playwright.expect(title).to_contain_text("Gallery:")
        for route in held:
            route.continue_()
        page.unroute("**/image")
        playwright.expect(page.locator(".picture img").first).to_be_visible()
        assert query.is_hidden()
        assert query.get_attribute("src") is None
        assert page.locator("#hint").is_visible()
        playwright.expect(title).to_contain_text("Gallery:")
        browser.close()


def _shoot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png")


def test_killed_replicas_lose_no_request_and_what_was_enrolled_is_there_again(service):
    _, image = service.ask("POST", "/gallery", {"photo": service.photo(1)}, pid=5, camera=2)
    with searching(service) as load:
        for deployment in ("embedder", "searcher"):
            service.kill(deployment)
            time.sleep(1)
            assert service.status["status"] == "ok"
    assert set(load.statuses) == {200}
    _, found = service.ask("POST", "/search", {"photo": service.photo(1)}, top=1)
    assert found["matches"][0]["id"] == image["id"]


def test_a_new_champion_takes_over_without_a_lost_request(service):
    with searching(service) as load:
        service.client.set_registered_model_alias("people", "champion", "2")
        deadline = time.monotonic() + PATIENCE
        while set(load.models[-20:]) != {"models:/people/2"}:  # both replicas have it
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert set(load.statuses) == {200}
    assert set(load.models) == {"models:/people/1", "models:/people/2"}
    _, found = service.ask("POST", "/search", {"photo": service.photo(1)}, top=1)
    assert found["matches"][0]["pid"] == 5  # enrolled before


def test_a_killed_ingress_is_there_again(service):
    service.kill("ingress")
    deadline = time.monotonic() + PATIENCE
    while service.ask("GET", "/healthz")[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_started_anew_with_onnx_runtime_it_answers_as_with_pytorch(service, tmp_path):
    def answers() -> list[list[dict[str, Any]]]:
        asked = ({"photo": service.photo(row)} for row in range(3))
        return [service.ask("POST", "/search", photo, top=5)[1]["matches"] for photo in asked]

    before = answers()
    assert service.status["runtime"] == "torch"
    uri, quiet = service.settings.tracking_uri, Console(quiet=True)
    file = str(tmp_path / "people.onnx")
    export(Export("models:/people@champion", file, tracking_uri=uri), quiet)
    service.start(runtime="onnx", search_replicas=1)
    assert service.status["runtime"] == "onnx"
    for ours, theirs in zip(answers(), before, strict=True):
        assert [match["id"] for match in ours] == [match["id"] for match in theirs]
        scores = [[match["similarity"] for match in matches] for matches in (ours, theirs)]
        np.testing.assert_allclose(*scores, atol=1e-4)
