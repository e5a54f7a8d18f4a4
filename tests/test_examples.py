"""`--help` of every example explains and does nothing else. Two processes have the bits of one. Benchmarks run."""

import os
import pathlib
import re
import shlex
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "gpu.py --log2 12 --repeats 1",
        "training.py --size tiny --steps 12 --ways 'grid_adamw, layer by layer' 'optax.adamw, float32'",
    ],
)
def test_benchmarks_of_accelerators_run_on_a_cpu(command, tmp_path):
    program, *options = shlex.split(command)
    command = [sys.executable, ROOT / "tests" / "benchmarks" / program, *options, "--json", tmp_path / "lines.json"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-2000:]
    lines = (tmp_path / "lines.json").read_text()
    assert "error" not in lines
    assert re.search(r'"different_integers": 0|"tokens_per_second": \d', lines)


@pytest.mark.slow
def test_two_processes_have_the_bits_of_one():
    """With two devices: the fingerprints that three runs print."""
    port = str(20000 + os.getpid() % 20000)
    command = [sys.executable, ROOT / "examples" / "two_processes.py", "--steps", "5", "--port", port]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    runs = [
        subprocess.Popen(
            [*command, process], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
        )
        for process in ("0", "1", "alone")
    ]
    try:
        outputs = [run.communicate(timeout=240) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert all(run.returncode == 0 for run in runs), [errors[-2000:] for _, errors in outputs]
    first, second, alone = (re.findall(r"\b[0-9a-f]{8}\b", printed) for printed, _ in outputs)
    assert {*first, *second} == {alone[2]}  # Of two bytes over two devices.
