"""The floors: a module imports only lower floors, and the library needs only jax, optax and numpy."""

import ast
import pathlib
import subprocess
import sys

import pytest

import altgrad_jax

PACKAGE = pathlib.Path(altgrad_jax.__file__).parent
FLOORS = {
    "_checks": 0,
    "_floats": 0,
    "formats": 0,
    "grid": 1,
    "codec": 1,
    "random_words": 1,
    "scales": 2,
    "weights": 2,
    "rounding": 3,
    "grid_array": 3,
    "stiffness": 4,
    "on_grid": 4,
    "compress_state": 4,
    "factored": 4,
    "grid_steps": 4,
    "gradients": 4,
    "diagnostics": 4,
    "layerwise": 5,
    "optimizers": 5,
    "flax_support": 6,
}
EXTERNAL = {"jax", "numpy", "optax"}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module


def test_every_module_has_a_floor():
    assert set(MODULES) == set(FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_lower_floors_alone(module):
    for name in imported(PACKAGE / f"{module}.py"):
        first, *rest = name.split(".")
        if first == "altgrad_jax":
            assert FLOORS[rest[0]] < FLOORS[module], f"{module} imports {name}"
        else:
            external = EXTERNAL | ({"flax"} if module == "flax_support" else set())
            assert first in external | set(sys.stdlib_module_names), f"{module} imports {name}"


def test_trees_with_grid_arrays_are_walked_in_one_place():
    """The other modules call `map_stored` and `flatten_stored`."""
    walkers = [module for module in MODULES if "is_leaf=is_grid_array" in (PACKAGE / f"{module}.py").read_text()]
    assert walkers == ["grid_array"]


def test_importing_the_library_imports_nothing_optional():
    code = "import sys, altgrad_jax; print(*{'flax', 'chex', 'orbax', 'matplotlib'} & set(sys.modules))"
    # Optax itself imports chex on some versions; ours is what the source says, above.
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(loaded) & {"flax", "orbax", "matplotlib"}


def test_every_public_name_is_documented():
    for name in altgrad_jax.__all__:
        assert getattr(altgrad_jax, name).__doc__, name
