"""Adds repository files outside docs/ to the site as pages, without copying them.

Pages link to each other by their paths in the repository, so that links also work when browsing the repository;
`on_page_markdown`, called by mkdocs, converts them to links of the site. A link to a file that is not on the site is
replaced by its text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]*)(?P<anchor>#[^)\s]*)?\)")


def _site_pages() -> dict[str, str]:
    """Repository path -> page of the site, for pages outside docs/."""
    operations = {
        path.relative_to(ROOT).as_posix(): f"operations/{path.parent.name}.md"
        for path in sorted(ROOT.glob("mir_kernels/ops/*/README.md"))
    }
    return {
        "README.md": "index.md",
        "CONTRIBUTING.md": "contributing.md",
        "CHANGELOG.md": "changes.md",
        "mir_kernels/ops/README.md": "operations/index.md",
        **operations,
    }


PAGES = _site_pages()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    for path in sorted(ROOT.glob("benchmarks/data/*")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    source = next((path for path, name in PAGES.items() if name == here), f"docs/{here}")
    return LINK.sub(lambda link: _site_link(link, source, here), markdown)


def _site_link(link: re.Match, source: str, here: str) -> str:
    """A link in the repository file `source`, converted to a link on its page `here`."""
    target = link["target"]
    if not target or "://" in target:
        return link[0]
    path = os.path.normpath(os.path.join(os.path.dirname(source), target))
    if path.startswith("docs/"):
        found = path.removeprefix("docs/")
    elif path.startswith("benchmarks/data/"):
        found = path
    elif path in PAGES:
        found = PAGES[path]
    else:
        return link["text"]
    return (
        f"{link['image']}[{link['text']}]({os.path.relpath(found, os.path.dirname(here) or '.')}{link['anchor'] or ''})"
    )
