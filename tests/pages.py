"""The parts of the documentation that are made from the library: `python tests/pages.py` writes them anew.

Tables of formats and of public names, the picture of the floors, and what the cells of the notebook print.
"""

import contextlib
import inspect
import io
import json
import pathlib
import re

from test_imports import FLOORS, PACKAGE, imported

import altgrad_jax as ag
from altgrad_jax import formats

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "getting-started.ipynb"
PICTURE = DOCS / "images" / "floors.svg"


def with_part(page: str, name: str, part: str) -> str:
    """The text of a page with what stands between `<!-- name -->` and `<!-- end -->` exchanged."""
    return re.sub(
        rf"(?<=<!-- {name} -->\n\n)(.*?)(?=<!-- end -->)", lambda _: part + "\n", page, count=1, flags=re.DOTALL
    )


def table(*rows: tuple) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


# Formats


def format_table() -> str:
    head = ("format", "exponent bits", "mantissa bits", "largest", "smallest", "numbers > 0")
    known = [ag.as_format(name) for name in formats._DTYPE_FORMATS | formats._ALTGRAD_FORMATS if name != "float32"]
    rows = [
        (f"`{f.name}`", f.exponent_bits, f.mantissa_bits, number(f.max), number(f.smallest_subnormal), f.max_index)
        for f in known
    ]
    return table(head, *rows)


def number(x: float) -> str:
    """Up to 65504 as it is, otherwise as a multiple of a power of two."""
    if 0.5 < x <= 65504:
        return f"{x:.8g}"
    exponent = ag.as_format("float32").maxexp
    while 2.0**exponent > x:
        exponent -= 1
    factor = x / 2.0**exponent
    return f"2^{exponent}" if factor == 1 else f"{factor:.8g} x 2^{exponent}"


# Public names

SECTIONS = {
    "stored-weights": "Stored weights",
    "optimizers": "Optimizers and transformations",
    "formats": "Formats and rounding",
    "diagnostics": "Diagnostics",
}


def public() -> dict[str, object]:
    """Everything of `__all__`, and of `diagnostics`, by its full name."""
    names = [name for name in ag.__all__ if name != "diagnostics"]
    functions = inspect.getmembers(ag.diagnostics, inspect.isfunction)
    own = [name for name, f in functions if f.__module__ == ag.diagnostics.__name__ and not name.startswith("_")]
    return {f"altgrad_jax.{name}": getattr(ag, name) for name in names} | {
        f"altgrad_jax.diagnostics.{name}": getattr(ag.diagnostics, name) for name in own
    }


def entries(section: str) -> dict[str, str]:
    """The full names that a page of the API describes, in its order, and what the page calls them."""
    found = re.findall(r"^::: (altgrad_jax\.[\w.]+)$", (DOCS / "api" / f"{section}.md").read_text(), re.MULTILINE)
    # A function may have the name of its module, which Griffe takes for the module.
    names = {re.sub(r"\.(\w+)\.\1$", r".\1", name): name for name in found}
    return {name: entry for name, entry in names.items() if name in public()}


def api_tables() -> str:
    """A table for each page of the API: names that lead to their entries, and first lines of docstrings."""
    parts, known = [], public()
    for section, title in SECTIONS.items():
        rows = [
            (f"[`{name.rpartition('.')[2]}`]({section}.md#{entry})", inspect.getdoc(known[name]).splitlines()[0])
            for name, entry in entries(section).items()
        ]
        parts.append(f"## {title}\n\n{table(('name', 'what it is'), *rows)}")
    return "\n".join(parts)


# Floors


def floors_picture() -> str:
    """Modules on their floors, and a line from each to those that it imports and that none of these imports."""
    wide, high, gap, left = 92, 28, 52, 52
    below, reached, place = {}, {}, {}
    for module in sorted(FLOORS, key=FLOORS.get):
        names = imported(PACKAGE / f"{module}.py")
        direct = {name.split(".")[1] for name in names if name.startswith("altgrad_jax.")}
        reached[module] = direct.union(*(reached[name] for name in direct))
        below[module] = sorted(direct - set().union(*(reached[name] for name in direct)))
    floors = [[module for module in FLOORS if FLOORS[module] == i] for i in range(max(FLOORS.values()) + 1)]
    widest = max(map(len, floors))
    for i, modules in enumerate(floors):
        modules.sort(key=lambda module: sum(place[name][0] for name in below[module]) / max(1, len(below[module])))
        for k, module in enumerate(modules):
            x = left + (k + (widest - len(modules)) / 2) * (wide + 6)
            place[module] = x, 8 + (len(floors) - 1 - i) * (high + gap)
    lines, boxes, labels = [], [], []
    for module, (x, y) in place.items():
        for u, v in (place[name] for name in below[module]):
            lines.append(f'<path d="M{x + wide / 2:g} {y + high} L{u + wide / 2:g} {v}"/>')
        boxes.append(f'<rect x="{x:g}" y="{y}" width="{wide}" height="{high}" rx="4"/>')
        labels.append(f'<text x="{x + wide / 2:g}" y="{y + 18}">{module}</text>')
    labels += [f'<text x="24" y="{place[modules[0]][1] + 18}">floor {i}</text>' for i, modules in enumerate(floors)]
    size = f'width="{left + widest * (wide + 6)}" height="{len(floors) * (high + gap) - gap + 16}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
            '<rect width="100%" height="100%" rx="6" fill="#fff"/>',
            '<g stroke="#9fa8da" fill="none">',
            *lines,
            '</g>\n<g stroke="#3f51b5" fill="#e8eaf6">',
            *boxes,
            '</g>\n<g font-family="sans-serif" font-size="11" text-anchor="middle" fill="#222">',
            *labels,
            "</g>\n</svg>\n",
        ]
    )


# The notebook


def run_notebook() -> str:
    """The notebook with what its cells print when they run, in one process without Jupyter."""
    notebook, names = json.loads(NOTEBOOK.read_text()), {}
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {i}", "exec"), names)
            lines = printed.getvalue().splitlines(keepends=True)
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def made() -> dict[pathlib.Path, str]:
    """Files that have parts made from the library, as they should be; except for the notebook."""
    concepts, api = DOCS / "concepts" / "formats.md", DOCS / "api" / "index.md"
    return {
        concepts: with_part(concepts.read_text(), "formats", format_table()),
        api: with_part(api.read_text(), "names", api_tables()),
        PICTURE: floors_picture(),
    }


if __name__ == "__main__":
    for path, text in (made() | {NOTEBOOK: run_notebook()}).items():
        path.write_text(text)
