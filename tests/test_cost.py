"""Bytes moved by the programs that XLA compiles for a TPU v5e and an H200: deterministic, and neither is needed."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parent / "benchmarks"

pytestmark = pytest.mark.slow


def measured(program, *options):
    extra, package = ("gpu", "jax_cuda13_plugin") if program == "gpu_bytes.py" else ("tpu", "libtpu")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the extra `{extra}` (Linux)")
    # In a process of its own, because libtpu and the CPU backend of the other tests cannot share one.
    environment = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, BENCHMARKS / program, *(options or ["--json"])]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return lines if options else lines[-1]


@pytest.fixture(scope="module")
def costs():
    return measured("tpu_bytes.py")


@pytest.fixture(scope="module")
def costs_of_gpu():
    return {line["arm"]: line for line in measured("gpu_bytes.py", "--json")}


class TestOneMatrix:
    """A whole step on a 16384 x 16384 matrix is one kernel that reads and writes everything once."""

    def test_adamw_is_the_yardstick(self, costs):
        cost = costs["one matrix"]["optax.adamw"]
        assert cost["bytes"] == pytest.approx(28, abs=0.1)
        assert cost["operations"] == pytest.approx(15, abs=0.1)
        assert cost["kernels"] == 1

    @pytest.mark.parametrize("name", ["manifold_adamw", "manifold_adamw(format)"])
    def test_manifold_adamw(self, costs, name):
        assert costs["one matrix"][name]["bytes"] <= 36.1
        assert costs["one matrix"][name]["kernels"] == 1

    def test_without_the_tracker(self, costs):
        assert costs["one matrix"]["without the tracker"]["bytes"] <= 28.1
        assert costs["one matrix"]["without the tracker"]["kernels"] == 1


class TestStoredWeights:
    """An ordinary step, the levels of all rows included, is one kernel and at its floor."""

    @pytest.mark.parametrize(
        ("name", "size", "operations", "kernels"),
        [
            ("on_grid(momentum)", 6.1, 110, 1),
            ("grid_adamw, 8bit", 8.1, 170, 1),
            ("grid_adamw, 8bit, a schedule", 8.1, 170, 1),
            # One kernel and 10 bytes until the momentum rounded to nearest, which costs the default nothing.
            ("grid_adamw, 8bit, f32 gradients", 19.1, 220, 2),
            ("grid_adamw, 8bit, 2-byte weight", 8.1, 120, 1),
            # A second read of the gradient, for the means.
            ("grid_adamw", 8.1, 125, 1),
            ("grid_adamw, a schedule", 8.1, 125, 1),
            ("grid_adamw, float32 gradients", 12.1, 125, 1),
            ("grid_adamw, 2-byte weight", 8.1, 72, 1),
            ("on_grid(optax.adamw)", 22.1, 68, 1),
        ],
    )
    def test_on_grid(self, costs, name, size, operations, kernels):
        cost = costs["one matrix"][name]
        assert cost["bytes"] <= size
        assert cost["operations"] <= operations
        assert cost["kernels"] == kernels

    @pytest.mark.parametrize(("name", "reads"), [("grid_adamw, 8bit", 1), ("grid_adamw", 2)])
    def test_under_vmap(self, costs, name, reads):
        """More reads of a bfloat16 gradient, from which unset rows take exponents, and unset leaves means."""
        cost, plain = costs["one matrix"][f"{name}, vmap of 4"], costs["one matrix"][name]
        assert cost["bytes"] <= plain["bytes"] + 2 * reads + 0.03
        assert cost["kernels"] == 1


class TestFortyLeaves:
    """A tree of 40 leaves is one kernel per leaf, and the tracker's 8 bytes more than AdamW."""

    def test_manifold_adamw(self, costs):
        tree = costs["40 leaves"]
        assert tree["manifold_adamw"]["kernels"] == tree["optax.adamw"]["kernels"] == 40
        assert tree["manifold_adamw"]["bytes"] <= tree["optax.adamw"]["bytes"] + 8.1


class TestWholeStep:
    """The peak of a step is that of weights, state and bfloat16 gradients: nothing decoded outlives its use."""

    def test_of_a_scanned_decoder(self):
        """151 million weights: 3.0 or 2.0 bytes, 2 of gradients; 4.05 and 5.05 in all at 604 million."""
        peaks = measured("step_memory.py")
        assert peaks["8bit"] <= 5.3
        assert peaks["factored"] <= 4.4

    def test_of_layers_that_are_updated_in_the_backward_pass(self):
        """Gradients of one layer at a time, for as many cycles as a rematerialised step of all gradients takes."""
        ways = ["value_and_grad, factored", "layerwise, factored"]
        whole, layerwise = measured("peak_memory.py", "--ways", *ways, "--layers", "4")
        assert layerwise["peak"] <= 2.7
        assert whole["peak"] <= 4.3
        assert layerwise["million_cycles"] <= 1.15 * whole["million_cycles"]

    def test_of_all_weights_of_llama_2_7b(self):
        """With a momentum for each, on one v5e of 16 GB."""
        (line,) = measured("peak_memory.py", "--ways", "layerwise, factored", "--layers", "32")
        assert line["weights"] == 6_738_415_616
        assert line["peak"] <= 2.3


class TestGPU:
    """As compiled for an H200, on a machine without one."""

    @pytest.mark.parametrize(
        ("arm", "moved", "temporary"),
        [
            ("optax.adamw", 28.1, 0.1),
            ("grid_adamw, factored", 12.1, 1.1),
            ("grid_adamw, 8bit", 10.1, 1.1),
            ("grid_adamw, float32", 16.1, 1.1),
            ("grid_adamw, b1 = 0, 16 bits", 10.1, 0.1),
            ("compress_state(on_grid(lion))", 8.1, 1.1),
        ],
    )
    def test_bytes(self, costs_of_gpu, arm, moved, temporary):
        assert costs_of_gpu[arm]["bytes"] <= moved
        assert costs_of_gpu[arm]["temporary"] <= temporary
