"""Every Python block of README.md and docs runs, in the order of its page, and prints what the page shows."""

import doctest
import json
import re

import pages
import pytest
from pages import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
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


@pytest.mark.parametrize("path", pages.made(), ids=lambda path: path.name)
def test_what_is_made_from_the_library_is_current(path):
    """Else run `python tests/pages.py`."""
    assert path.read_text() == pages.made()[path]


def test_every_public_name_has_one_entry():
    described = [item for section in pages.SECTIONS for item in pages.entries(section).items()]
    assert sorted(name for name, _ in described) == sorted(pages.public())
    modules = [entry for _, entry in described if (ROOT / f"{entry.replace('.', '/')}.py").exists()]
    assert not modules, "entries of modules in the place of functions"


def test_the_notebook_prints_what_it_shows():
    """Except for digits, which differ from machine to machine."""

    def shown(notebook):
        cells = json.loads(notebook)["cells"]
        printed = ["".join(line for output in cell.get("outputs", ()) for line in output["text"]) for cell in cells]
        return ["".join(re.sub(r"[-\d.]+", "#", text).split()) for text in printed]  # Numbers have widths.

    assert shown(pages.run_notebook()) == shown(pages.NOTEBOOK.read_text())


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    names = [str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]]
    assert not [name for name in names if f" {name}\n" not in text]


def test_every_test_file_keeps_a_promise():
    """The page of promises names each of them."""
    text = (pages.DOCS / "development" / "promises.md").read_text()
    assert not [path.name for path in ROOT.glob("tests/test_*.py") if f"`{path.name}`" not in text]
