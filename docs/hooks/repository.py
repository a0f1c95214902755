"""Bring files of the repository into the site: linked records, parts of Markdown files outside of docs/, docstrings.

A page links to ``../benchmarks/x.json``, which works in the repository; the site gets that file under the same path, so
that a link to a record that does not exist fails a strict build like any other.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)")
_ROLE = re.compile(r":(?:class|func|data|meth|mod):<code>(~?)([\w.]+)</code>")
_INCLUDE = re.compile(r"^<!-- include: (\S+)(?: (\S+))? -->$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add every file that a page links to outside of the docs folder."""
    docs = Path(config.docs_dir)
    for page in list(files.documentation_pages()):
        source = Path(page.abs_src_path)
        for _, link in _LINK.findall(source.read_text(encoding="utf-8")):
            name = _outside(source, link, docs)
            if name and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(docs.parent / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at the files that were added, and fill in the included parts."""
    docs, source = Path(config.docs_dir), Path(page.file.abs_src_path)

    def link(match: re.Match[str]) -> str:
        name = _outside(source, match.group(2), docs)
        return match.group(1) + (os.path.relpath(name, Path(page.file.src_uri).parent) if name else match.group(2))

    def include(match: re.Match[str]) -> str:
        text = (docs.parent / match.group(1)).read_text(encoding="utf-8")
        if mark := match.group(2):
            text = text.split(f"<!-- {mark}: begin -->", 1)[1].split(f"<!-- {mark}: end -->", 1)[0]
        return text.strip()

    return _INCLUDE.sub(include, _LINK.sub(link, markdown))


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Show the Sphinx roles of docstrings as code; with a tilde the last part of the name, as Sphinx does."""
    return _ROLE.sub(lambda m: f"<code>{m[2].rpartition('.')[2] if m[1] else m[2]}</code>", html)


def _outside(page: Path, link: str, docs: Path) -> str | None:
    """Return the path in the repository of a linked file outside of docs, or None."""
    target = Path(os.path.normpath(page.parent / link))
    if target.is_relative_to(docs) or not target.is_relative_to(docs.parent) or not target.is_file():
        return None
    return target.relative_to(docs.parent).as_posix()
