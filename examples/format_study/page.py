"""Sections of text, tables and pictures, as one HTML file that needs no other, and as Markdown."""

import base64
import dataclasses
import html
import posixpath
import re
from collections.abc import Sequence

VERDICTS = {"supported": "good", "contradicted": "bad", "not resolved": "open", "PASS": "good", "FAIL": "bad"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e21; background: #fff; max-width: 1180px; margin: 2em auto;
       padding: 0 1.5em; }
h1 { font-size: 1.7em; line-height: 1.25; } h2 { margin-top: 2.4em; border-bottom: 1px solid #d5d9de; }
p, li { max-width: 52em; } figure { margin: 1.2em 0; } img { max-width: 100%; height: auto; }
figcaption, caption { color: #565d66; font-size: 0.92em; text-align: left; padding: 0.3em 0; max-width: 70em; }
.table { overflow: auto; max-height: 50em; margin: 1.2em 0; border: 1px solid #d5d9de; }
caption { position: sticky; left: 0; padding: 0.5em 0.7em; }
table { border-collapse: collapse; font-size: 0.87em; font-variant-numeric: tabular-nums; min-width: 40em; }
th, td { padding: 0.25em 0.7em; text-align: left; white-space: nowrap; border-top: 1px solid #eceef1; }
td.long { white-space: normal; min-width: 14em; } th { position: sticky; top: 0; background: #f2f4f6; }
code { font: 0.92em ui-monospace, monospace; background: #f2f4f6; padding: 0 0.2em; } [title] { cursor: help; }
.good { color: #0a6b34; font-weight: 600; } .bad { color: #b3261e; font-weight: 600; } .open { color: #7a5c00; }
nav ol { columns: 2; max-width: 52em; }
"""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A text, and the keys of the lines behind it, which show up under the pointer."""

    text: str
    keys: str


@dataclasses.dataclass(frozen=True)
class Table:
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    in_markdown: bool = True


@dataclasses.dataclass(frozen=True)
class Picture:
    caption: str
    png: bytes
    file: str | None = None  # Its name, for Markdown, which leaves other pictures out.


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[str | Table | Picture]


def to_html(title: str, sections: Sequence[Section]) -> str:
    """One page without outside resources. In texts and cells, `this` is code and **this** is bold."""
    names = [re.sub(r"\W+", "-", section.title.lower()).strip("-") for section in sections]
    pairs = list(zip(names, sections, strict=True))
    contents = "".join(f'<li><a href="#{name}">{_inline(section.title)}</a></li>' for name, section in pairs)
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{_inline(title)}</h1>",
        f"<nav><ol>{contents}</ol></nav>",
    ]
    for name, section in pairs:
        parts += [f'<h2 id="{name}">{_inline(section.title)}</h2>', *map(_html_block, map(_shown, section.blocks))]
    return "\n".join([*parts, "</body>\n</html>\n"])


def to_markdown(title: str, sections: Sequence[Section], pictures: str = ".") -> str:
    """The same, without most pictures and the longest tables; sections that only introduce those are left out.

    `pictures` is the folder of the others, as seen from the page.
    """
    parts = [f"# {title}"]
    for section in sections:
        texts = [_markdown_block(_shown(block), pictures) for block in section.blocks]
        figures = [text for text, block in zip(texts, section.blocks, strict=True) if not isinstance(block, str)]
        if any(figures) or not figures:
            parts += [f"## {section.title}", *filter(None, texts)]
    return "\n\n".join(parts) + "\n"


def _shown(block: str | Table | Picture) -> str | Table | Picture:
    """The block, or a sentence for a table without rows."""
    return f"{block.caption} There is no row yet." if isinstance(block, Table) and not block.rows else block


def _html_block(block: str | Table | Picture) -> str:
    if isinstance(block, Table):
        head = "".join(f"<th>{_inline(column)}</th>" for column in block.columns)
        rows = "\n".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in block.rows)
        table = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>"
        return f'<div class="table"><table><caption>{_inline(block.caption)}</caption>\n{table}</table></div>'
    if isinstance(block, Picture):
        data = base64.b64encode(block.png).decode()
        caption = _inline(block.caption)
        image = f'<img alt="{html.escape(block.caption)}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    return f"<p>{_inline(block)}</p>"


def _html_cell(cell: str | Cell) -> str:
    text, title = (cell.text, f' title="{html.escape(cell.keys)}"') if isinstance(cell, Cell) else (cell, "")
    long = "long" if len(text) > 60 and not text.startswith("`") else ""
    kind = next((kind for word, kind in VERDICTS.items() if text.startswith(word)), long)
    return f"<td{f' class={kind!r}' if kind else ''}{title}>{_inline(text)}</td>"


def _inline(text: str) -> str:
    text = re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)


def _markdown_block(block: str | Table | Picture, pictures: str) -> str:
    if isinstance(block, Picture):
        return f"![{block.caption}]({posixpath.normpath(posixpath.join(pictures, block.file))})" if block.file else ""
    if isinstance(block, str):
        return block
    if not block.in_markdown:
        return ""
    texts = [[cell.text if isinstance(cell, Cell) else cell for cell in row] for row in block.rows]
    lines = [block.columns, ["---"] * len(block.columns), *texts]
    rows = ["| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in line) + " |" for line in lines]
    return block.caption + "\n\n" + "\n".join(rows)
