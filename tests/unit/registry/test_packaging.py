"""What is stored with a model is what it needs to load, and no more."""

from __future__ import annotations

import subprocess
import sys

from reid_train.registry.packaging import CODE, SOURCE

IMPORTED = """
import sys
import data_shards.errors, reid_train.model.embedder
for name, module in sys.modules.items():
    if name.split(".")[0] in ("data_shards", "reid_train"):
        print(module.__file__)
"""


def test_stored_code_is_what_the_embedder_imports():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], cwd=SOURCE, capture_output=True, text=True, check=True
    )
    assert {str(SOURCE / file) for file in CODE} == set(done.stdout.split())


def test_mlflow_has_no_advice_on_the_model():
    command = [sys.executable, "-c", "import reid_train.registry.pyfunc_model"]
    done = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, check=True)
    assert "type hint" not in done.stderr
