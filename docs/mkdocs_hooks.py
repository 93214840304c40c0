"""Build the site: the README is its first page; files that pages link to and every interface are on it, too.

MkDocs calls the functions `on_...`. In a page, links are as they work in the repository.
"""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FIRST_PAGE = "README.md"
BESIDE = "repository/"
"""Where files that are not in docs/ are on the site."""
PACKAGES = (
    "arsg_dist",
    "arsg_dist.theory",
    "arsg_dist.engine",
    "arsg_dist.ddp",
    "arsg_dist.fsdp",
    "arsg_dist.deepspeed",
    "arsg_dist.horovod",
    "arsg_dist.checkpoint",
)
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
_CODE = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)[ ]*$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the README, what pages link to outside docs/, and the interfaces."""
    beside = {FIRST_PAGE, "CHANGELOG.md", "CONTRIBUTING.md"}
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()] + sorted(beside)
    while pages:
        page = pages.pop()
        for target in _targets(page):
            if not target.startswith("docs/") and target not in beside and (ROOT / target).is_file():
                beside.add(target)
                pages += [target] if target.endswith(".md") else []
    for path in sorted(beside):
        uri = _uri(path)
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    for package in PACKAGES:
        files.append(File.generated(config, f"reference/{package}.md", content=_reference(package)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to where their files are on the site."""
    here = page.file.src_uri
    path = _path(here)

    def moved(match: re.Match[str]) -> str:
        target = _uri(posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2])))
        return match[1] + posixpath.relpath(target, posixpath.dirname(here) or ".") + match[3]

    if here.startswith("reference/"):
        return markdown
    return "".join(
        part if _CODE.fullmatch(part) else _LINK.sub(moved, part)
        for part in re.split(f"({_CODE.pattern})", markdown, flags=_CODE.flags)
    )


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Drop the second of the colons that announce code in a docstring."""
    return html.replace("::</p>", ":</p>")


def _targets(page: str) -> set[str]:
    """The files that a page of the repository links to, as paths in the repository."""
    text = _CODE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    folder = posixpath.dirname(page)
    return {posixpath.normpath(posixpath.join(folder, match[2])) for match in _LINK.finditer(text)}


def _uri(path: str) -> str:
    """A file's place on the site."""
    if path == FIRST_PAGE:
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else BESIDE + path


def _path(uri: str) -> str:
    """A file's place in the repository."""
    if uri == "index.md":
        return FIRST_PAGE
    return uri.removeprefix(BESIDE) if uri.startswith(BESIDE) else f"docs/{uri}"


def _reference(package: str) -> str:
    """A page of all that a package exports, or of a whole module."""
    title = f"# {package}\n\n"
    folder = ROOT / package.replace(".", os.sep)
    if not folder.is_dir():
        return (
            f"{title}::: {package}\n    options: {{show_root_heading: false, show_root_toc_entry: false}}\n"
        )
    source = (folder / "__init__.py").read_text(encoding="utf-8")
    exported = re.search(r"^__all__ = \[(.*?)\]", source, re.MULTILINE | re.DOTALL)
    assert exported, f"{package} says in __all__ what it exports"
    return title + "\n".join(f"::: {package}.{name}\n" for name in re.findall(r'"(\w+)"', exported[1]))
