"""The package's own source: what handles files from outside does so in one place.

Ruff's banned-api (pyproject.toml) covers functions; this covers methods, which have no name that ruff could see.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import arsg_dist

ROOT = Path(arsg_dist.__file__).parent
GROUND = ROOT / "safe_io"
WRITING_METHODS = {"write_text", "write_bytes", "touch"}


def violations(source: str) -> Iterator[str]:
    """Calls that open, list or write files in a way that follows what somebody may have prepared."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        words = [*node.args, *(keyword.value for keyword in node.keywords)]
        texts = [
            word.value for word in words if isinstance(word, ast.Constant) and isinstance(word.value, str)
        ]
        if isinstance(function, ast.Name) and function.id in (
            "open",
            "eval",
            "exec",
            "compile",
            "__import__",
        ):
            yield f"line {node.lineno}: {function.id}()"
        elif isinstance(function, ast.Attribute) and ast.unparse(function.value) not in ("files", "tarfile"):
            if function.attr in WRITING_METHODS:
                yield f"line {node.lineno}: .{function.attr}()"
            elif function.attr == "open" and any(set(text) & set("wax+") for text in texts if len(text) < 4):
                yield f"line {node.lineno}: .open() for writing"
            elif function.attr in ("glob", "rglob") and any(text.startswith(".") for text in texts):
                yield f"line {node.lineno}: .{function.attr}() of dot files"


def test_files_are_handled_in_one_place() -> None:
    """Catches a new place that opens, replaces or removes files in its own way."""
    found = [
        f"{path.relative_to(ROOT.parent)} {violation}"
        for path in sorted(ROOT.rglob("*.py"))
        if path.parent != GROUND
        for violation in violations(path.read_text())
    ]
    assert found == []


def test_the_check_sees_what_it_is_for() -> None:
    """Catches a check that finds nothing because it looks at nothing."""
    bad = [
        "open('x')",
        "path.open('w')",
        "path.open(mode='ab')",
        "path.write_text('x')",
        "path.write_bytes(b'x')",
        "path.touch()",
        "path.glob('.*')",
        "path.rglob('.git')",
        "eval('x')",
        "exec('x')",
    ]
    assert [source for source in bad if not list(violations(source))] == []
    assert (
        list(
            violations("files.write_text(path, 'x'); path.open(); path.glob('*.py'); text.replace('.', 'w')")
        )
        == []
    )
