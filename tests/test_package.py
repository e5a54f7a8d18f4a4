"""The wheel, what an installed copy does outside of the checkout, and the files about the project."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# README's `+` lines come first, second and in each step.
PROGRAM = """
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import altgrad_jax as ag

print(ag.__file__)
key = jax.random.key(0)
x = batch = jax.random.normal(key, (64, 16))
model = nn.Dense(4)


def loss_fn(params, batch):
    return jnp.mean((model.apply({{"params": params}}, batch) - 1) ** 2)


{params}
{tx}


@jax.jit
def train_step(params, state, batch):
    {gradient}
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


state, losses = tx.init(params), []
for _ in range(20):
    params, state, loss = train_step(params, state, batch)
    losses.append(float(loss))
assert losses[-1] < losses[0], losses
"""


def run(*command, folder, **environment):
    """What a command prints, run in a folder."""
    process = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by the hatchling of the environment, so that no network is needed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = sys.executable, "-m", "pip", "--disable-pip-version-check"
    run(*pip, "wheel", ROOT, "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder=folder)
    (path,) = folder.glob("*.whl")
    run(*pip, "install", path, "--no-deps", "--no-index", "--target", folder / "installed", folder=folder)
    return path


class TestWheel:
    """Of `pip wheel .`."""

    def test_holds_the_package_and_its_metadata_alone(self, wheel):
        about = f"altgrad_jax-{PROJECT['version']}.dist-info"
        modules = {f"altgrad_jax/{path.name}" for path in ROOT.glob("altgrad_jax/*.py")}
        metadata = {f"{about}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
        assert set(zipfile.ZipFile(wheel).namelist()) == modules | metadata | {"altgrad_jax/py.typed"}

    def test_trains_by_the_diff_of_readme(self, wheel, tmp_path):
        (diff,) = re.findall(r"^```diff\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
        added = [line[2:] for line in diff.splitlines() if line.startswith("+ ")]
        program = PROGRAM.format(**dict(zip(("params", "tx", "gradient"), added, strict=True)))
        installed = wheel.parent / "installed"
        printed = run(sys.executable, "-P", "-c", program, folder=tmp_path, PYTHONPATH=str(installed))
        assert pathlib.Path(printed.strip()).is_relative_to(installed)


def test_citation_has_the_version_and_the_licence_of_the_project():
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert {f"version: {PROJECT['version']}", f"license: {PROJECT['license']}"} <= set(lines)
