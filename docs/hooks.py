"""Pages of the site that are files of the repository: README.md and the operations' READMEs, with no second copy.

mkdocs calls `on_files`. The README up to its figures is the first page, its figures are a page, each operation's
README is one; what lies in benchmarks/data is served beside them.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
FIGURES = "## Figures\n"
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    start, figures = (ROOT / "README.md").read_text(encoding="utf-8").split(FIGURES)
    pages = {"index.md": start, "figures.md": f"# Figures\n{figures}"}
    for path in sorted(ROOT.glob("mir_kernels/ops/*/README.md")):
        pages[f"operations/{path.parent.name}.md"] = path.read_text(encoding="utf-8")
    for name, text in pages.items():
        files.append(File.generated(config, name, content=LINK.sub(_link, text)))
    for path in sorted(ROOT.glob("benchmarks/data/*")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """docs/ links to the figures where the repository has them; the site has them beside its pages."""
    return markdown.replace("](../benchmarks/data/", "](benchmarks/data/")


def _link(link: re.Match) -> str:
    """A link of the repository as one of the site; one to a file that the site has not is its text alone."""
    target = re.sub(r"^docs/", "", link["target"])
    target = re.sub(r"^mir_kernels/ops/(\w+)/README\.md", r"operations/\1.md", target)
    if target == link["target"] and not target.startswith(("#", "http", "benchmarks/data/")):
        return link["text"]
    return f"{link['image']}[{link['text']}]({target})"
