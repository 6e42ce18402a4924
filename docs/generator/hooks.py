"""Put what stands outside docs/ into the site: the README files as pages, pages made from tables of the code, linked files.

A link that leads out of docs/ works in a checkout. In the site it leads to a copy of the file under ``repository/``. A link to a
file that does not exist ends a strict build.
"""

import logging
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# files of the repository that are pages of the site
PAGES = {"kernels/README.md": "kernels.md", "README.md": "index.md"}
COPIES = "repository"
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(Path(__file__).parent)]

import pages  # noqa: E402

# what a link in a checkout leads to -> the page of the site that says it better
STANDS_FOR = {
    "recbole_llm/properties/LLMTwoTower.yaml": "keys.md",
    "README.md#commands": "command-line.md",
} | pages.OF_EXAMPLES
ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>~?([^<]*)</code>")
LINK = re.compile(r"(\]\()([^)\s:#]+)(#[^)\s]*)?(\))")
log = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that stand elsewhere and the files that pages link to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page, write in pages.PAGES.items():
        files.append(File.generated(config, page, content=write()))
    wanted = {}
    for file in list(files.documentation_pages()):
        text = file.content_string
        for match in LINK.finditer(text):
            target = _outside(file.src_uri, match[2])
            if target is not None and target.is_file() and _page_of(target, file.src_uri) is None:
                wanted[_copy_of(target)] = target
    for uri, target in sorted(wanted.items()):
        files.append(File.generated(config, uri, content=target.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links that lead out of docs/ into links inside the site."""
    here = page.file.src_uri

    def rewritten(match: re.Match[str]) -> str:
        target = _outside(here, match[2])
        if target is None:
            return match[0]
        if not target.is_file() and _page_of(target, here) not in pages.PAGES:
            log.warning("%s links to %s, which is no file", here, match[2])
            return match[0]
        anchor = match[3] or ""
        better = STANDS_FOR.get(target.relative_to(ROOT).as_posix() + anchor)
        if better is not None and better != here:
            inside, anchor = better, ""
        else:
            inside = _page_of(target, here) or _copy_of(target)
        up = "../" * here.count("/")
        return f"{match[1]}{up}{inside}{anchor}{match[4]}"

    return LINK.sub(rewritten, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Leave out the roles of cross-references, which docstrings have for other readers."""
    return ROLE.sub(r"<code>\1</code>", html)


def _copy_of(target: Path) -> str:
    """Where the site holds a copy of a file; not as Markdown, which would be a page, and not hidden."""
    name = target.relative_to(ROOT).as_posix().removeprefix(".")
    return f"{COPIES}/{name}{'.txt' if name.endswith('.md') else ''}"


def _page_of(target: Path, here: str) -> str | None:
    """The page of the site, or the file of docs/, to which a link of the page ``here`` to a file of the repository leads."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    name = target.relative_to(ROOT).as_posix()
    better = STANDS_FOR.get(name)
    return PAGES.get(name) or (better if better != here else None)


def _outside(page: str, link: str) -> Path | None:
    """The file that a link of a page leads to, where it stands outside docs/ or the page does; ``None`` for any other link."""
    own = next((source for source, name in PAGES.items() if name == page), None)
    target = ((DOCS / page if own is None else ROOT / own).parent / link).resolve()
    if not target.is_relative_to(ROOT) or (own is None and (target.is_relative_to(DOCS) or link in pages.PAGES)):
        return None
    return target
