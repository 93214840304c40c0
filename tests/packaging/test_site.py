"""The site of the documents, and pages that must keep in step with the code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launchers import REPOSITORY

DOCS = REPOSITORY / "docs"


def test_the_script_of_the_page_is_the_one_that_is_tested() -> None:
    """Catches a page that shows another script than tests/examples runs."""
    page = (DOCS / "own-scripts.md").read_text()
    shown = re.search(r"<!-- file: (\S+) -->\n```python\n(.*?)```\n<!-- end of file -->", page, re.DOTALL)
    assert shown is not None
    assert shown[2] == (REPOSITORY / shown[1]).read_text(), f"put {shown[1]} into docs/own-scripts.md again"


def messages() -> list[str]:
    """Every text of the program, with … for what it fills in."""
    found = []
    for path in (REPOSITORY / "arsg_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_message_of_the_troubleshooting_table_is_one_of_the_program() -> None:
    """Catches a message that was reworded, or is gone, and is still looked up by its old words."""
    table = (DOCS / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(rows) > 30
    texts = messages()
    unknown = []
    for row in rows:
        pattern = re.compile(".*?".join(re.escape(part) for part in row.split("…")), re.DOTALL)
        if not any(pattern.search(text) for text in texts):
            unknown.append(row)
    assert not unknown


def test_the_snippets_of_coming_from_run() -> None:
    """Catches a conversion that was renamed or gives another learning rate."""
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", (DOCS / "coming-from.md").read_text(), re.DOTALL):
        exec(compile(snippet, "docs/coming-from.md", "exec"), names)
    assert "optimizer" in names


def test_the_site_builds_with_every_link_and_interface(tmp_path: Path) -> None:
    """Catches a broken link or anchor, a page that is in no menu, and a docstring that cannot be read."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'arsg-dist[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    interface = (tmp_path / "site" / "reference" / "arsg_dist" / "index.html").read_text()
    assert "observation factor" in interface, "the interface's page is made of docstrings"
    results = tmp_path / "site" / "repository" / "benchmarks" / "results"
    assert results.is_dir(), "results that pages link to are on the site"
    hosts = {
        host
        for page in (tmp_path / "site").rglob("*.html")
        for host in re.findall(r'(?:src|href)="https?://([^/"]+)[^"]*\.(?:js|css|woff2?)"', page.read_text())
    }
    assert not hosts, "a page fetches from elsewhere"
