"""Parameters of tests of which the suite runs a few; the others are slow: `python -m pytest -n 2 -m slow`."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def some(values: Iterable[Any], chosen: Callable[[Any], bool]) -> list[Any]:
    """The values, of which those that are not chosen are marked slow; tuples are sets of parameters."""

    def parameter(value):
        marks = () if chosen(value) else pytest.mark.slow
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks)

    return [parameter(value) for value in values]
