"""What all examples share: `--help` explains and does nothing else."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = [path for path in sorted(ROOT.glob("examples/**/*.py")) if "parse_args()" in path.read_text()]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_help(path, tmp_path):
    """Without a backend, JAX raises at the first array: an example that computes anything fails."""
    environment = os.environ | {"JAX_PLATFORMS": "none", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, path, "--help"]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.startswith("usage:")
    assert len(process.stdout.splitlines()) > 5
    assert not process.stderr
    assert not list(tmp_path.iterdir())
