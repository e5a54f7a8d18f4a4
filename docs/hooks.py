"""What MkDocs does besides: README is the first page, the notebook a page, and examples of docstrings are code."""

import json
import pathlib
import re

import griffe
from mkdocs.structure.files import File


def on_files(files, config):
    """Adds the first page, and a page for each notebook."""
    readme = (pathlib.Path(config.docs_dir).parent / "README.md").read_text()
    files.append(File.generated(config, "index.md", content=readme.replace("](docs/", "](")))
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        name = file.src_uri.replace(".ipynb", ".md")
        files.append(File.generated(config, name, content=to_markdown(json.loads(file.content_string))))


def on_page_markdown(markdown, page, config, files):
    """Links to a notebook lead to its page."""
    return markdown.replace(".ipynb)", ".md)")


def to_markdown(notebook):
    """Texts as they are; code, and what it printed, as blocks."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = "".join(line for output in cell.get("outputs", ()) for line in output["text"])
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


class Docstrings(griffe.Extension):
    """Docstrings say "Example:", where Griffe wants "Examples:", and 2**8, which Markdown would take for bold."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            code = r"`[^`]*`|^ *(?:>>>|\.\.\.).*$"
            escaped = re.sub(rf"({code})|(\d)\*\*", lambda m: m[1] or m[2] + r"\*\*", text, flags=re.MULTILINE)
            obj.docstring.value = escaped
