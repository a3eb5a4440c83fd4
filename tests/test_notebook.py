"""The notebook runs, cell by cell, as a reader runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    cells = json.loads((HERE / "examples" / "nano.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 6
    environment = {**os.environ, "STEPS": "2", "OUT": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", "\n\n".join(code)],
        cwd=HERE / "examples",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "\nbase " in done.stdout and "\nfinal " in done.stdout and "insight" in done.stdout
