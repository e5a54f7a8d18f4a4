"""Every Python block of README.md and docs/*.md runs, in the order of its page, and prints what the page shows."""

import doctest
import inspect
import pathlib
import re

import pytest

import altgrad_jax as ag

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, names = page.read_text(), {}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        line, code = text[: block.start(1)].count("\n"), block[1]
        if not code.startswith(">>>"):
            exec(compile("\n" * line + code, str(page), "exec"), names)
            continue
        test = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line)
        report = []
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, report.append, clear_globs=False)
        names.update(test.globs)
        assert not report, "".join(report)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files(page):
    """Links within the repository, and files that commands and texts name, exist."""
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]
    files = re.findall(r"\b(?:tests|examples|docs|altgrad_jax)/[\w/]+\.\w+", text)
    assert not [file for file in files if not (ROOT / file).exists()]


def test_readme_is_short():
    """At most 700 words, of everything except commands, code and the image's address."""
    text = re.sub(r"^```.*?^```", "", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(re.sub(r"\]\([^)]*\)", "]", text).split()) <= 700


def test_every_public_name_is_listed():
    """With the first line of its docstring."""
    page = (ROOT / "docs" / "api.md").read_text()
    functions = inspect.getmembers(ag.diagnostics, inspect.isfunction)
    named = {name: getattr(ag, name) for name in ag.__all__ if name != "diagnostics"} | {
        name: f for name, f in functions if f.__module__ == ag.diagnostics.__name__ and not name.startswith("_")
    }
    lines = {f"| `{name}` | {inspect.getdoc(thing).splitlines()[0]} |" for name, thing in named.items()}
    assert {line for line in page.splitlines() if line.startswith("| `")} == lines
