"""Models and images that are not there are told before PyTorch is loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

PROBE = """
import contextlib, io, json, sys
from reid_train import cli
found = {}
for line in json.loads(sys.argv[1]):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = cli.main(line)
    found[line[0]] = (code, text.getvalue(), [n for n in ("torch", "ray") if n in sys.modules])
print(json.dumps(found))
"""


@pytest.mark.parametrize("missing", ["model", "gallery", "version"])
def test_a_mistyped_name_is_told_before_pytorch_is_loaded(monkeypatch, tmp_path, missing):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    photo, gallery, model = tmp_path / "a.png", tmp_path / "photos", tmp_path / "model"
    gallery.mkdir()
    model.mkdir()
    for path in (photo, gallery / "b.png"):
        Image.fromarray(np.zeros((64, 32, 3), np.uint8)).save(path)
    for file in ("model.safetensors", "config.json"):
        (model / file).touch()
    given, images = str(model), str(gallery)
    if missing == "model":
        given = str(tmp_path / "modle")
    if missing == "gallery":
        images = str(tmp_path / "phots")
    if missing == "version":
        given = "models:/peple@champion"
    lines = [
        ["search", str(photo), "--model", given, "--gallery", images],
        ["embed", "--model", given, "--data", images, "--out", str(tmp_path / "out")],
        ["evaluate", "--model", given, "--data", images],
        ["visualize", "--model", given, "--data", images],
        ["export", "--model", given, "--data", images, "--out", str(tmp_path / "a.onnx")],
    ]
    command = [sys.executable, "-c", PROBE, json.dumps(lines)]
    made = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    for name, (code, text, slow) in json.loads(made.stdout).items():
        assert code in (3, 4), (name, text)
        assert slow == [], (name, text)
        word = {"model": "modle is not a model", "gallery": "phots", "version": "peple"}[missing]
        assert word in text.rpartition("error: ")[2], (name, text)
