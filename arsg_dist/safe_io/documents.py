"""YAML and JSON from outside: data only, bounded in size and depth, no key twice, no class named in it.

YAML is read by PyYAML's own safe loader underneath; JSON by the standard library.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, Final

from arsg_dist.safe_io.files import MiB, read_text

LIMIT: Final = 1 * MiB
"""Bytes that a document may have unless its reader says otherwise."""
MAX_DEPTH: Final = 64
MAX_NODES: Final = 100_000
"""Values that a YAML document may hold, each counted as often as aliases repeat it."""


def read_json(path: Path, *, limit: int = LIMIT, follow: bool = False) -> Any:
    """Read a JSON file.

    Args:
        path: of the file.
        limit: bytes it may have.
        follow: whether it may be a link: True for a path that the user named.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is no regular file, is too large, or is no JSON; the message names the file and the place.
    """
    return parse_json(read_text(path, limit=limit, follow=follow), str(path))


def parse_json(text: str, name: str) -> Any:
    """Parse JSON. Numbers may be NaN and Infinity, which Python's writer makes.

    Args:
        text: the document.
        name: for messages, for example its path.

    Raises:
        ValueError: it is no JSON, names a key twice, or is nested deeper than `MAX_DEPTH`.
    """
    try:
        content = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError(_too_deep(name)) from error
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from error
    if _depth(content) > MAX_DEPTH:
        raise ValueError(_too_deep(name))
    return content


def read_yaml(path: Path, *, limit: int = LIMIT, follow: bool = False, pipe: bool = False) -> Any:
    """Read a YAML file; see `read_json`.

    Args:
        path: of the file.
        limit: bytes it may have.
        follow: whether it may be a link: True for a path that the user named.
        pipe: whether it may be a pipe, which the shell makes of ``<(command)``.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is no regular file, is too large, or is refused by `parse_yaml`.
    """
    return parse_yaml(read_text(path, limit=limit, follow=follow, pipe=pipe), str(path))


def parse_yaml(text: str, name: str) -> Any:
    """Parse one YAML document into dictionaries, lists, strings, numbers, booleans and None.

    Numbers are those of YAML 1.2: 1e-3 is one, while 1:30 and 2026-01-31 are text.

    Args:
        text: the document.
        name: for messages, for example its path.

    Raises:
        ValueError: it is no YAML, has a tag (``!!python/...``), names a key twice, is nested deeper than `MAX_DEPTH`,
            holds more than `MAX_NODES` values with aliases counted each time, or contains itself.
    """
    import yaml  # belongs to the extras that read recipes

    loader = None
    try:
        loader = _loader()(text)
        loader.name = name
        node = loader.get_single_node()
        if node is None:
            return None
        _check_bounds(node)
        return loader.construct_document(node)
    except RecursionError as error:
        raise ValueError(_too_deep(name)) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two: ours, or of a tagged value
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error
    finally:
        if loader is not None:
            loader.dispose()


def dump_yaml(document: Any) -> str:
    """Write a document as YAML that `parse_yaml` reads back equal: text that it would take for a number is quoted.

    Characters beyond ASCII are escaped, so that nothing in it steers a terminal or breaks a line.

    Args:
        document: dictionaries, whose order is kept, lists, strings, numbers, booleans and None.
    """
    import yaml

    text: str = yaml.dump(document, Dumper=_dumper(), sort_keys=False)
    return text


@cache
def _dumper() -> Any:
    """Return PyYAML's safe dumper, which quotes what YAML 1.1 reads into text, and what `_loader` does."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    _add_numbers(Dumper)
    return Dumper


@cache
def _loader() -> Any:
    """Return PyYAML's safe loader without what YAML 1.1 reads into plain text beside simple numbers."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in resolvers if not tag.endswith((":timestamp", ":int", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _add_numbers(Loader)
    return Loader


def _add_numbers(reader_or_writer: Any) -> None:
    reader_or_writer.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
    reader_or_writer.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


_INTEGER: Final = re.compile(r"[-+]?(0|[1-9][0-9_]*|0b[01_]+|0[0-7_]+|0x[0-9a-fA-F_]+)$")
_FLOAT: Final = re.compile(
    r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)

_KINDS: Final = {"null", "bool", "int", "float", "str", "seq", "map", "merge"}


def _check_bounds(root: Any) -> None:
    """Visit the nodes as if aliases were copies, so that a "billion laughs" document is refused; raise ValueError."""
    import yaml

    waiting, count = [(root, 1)], 0
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        if count > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES:,} values, those of its aliases counted")
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind not in _KINDS or (kind in ("int", "float") and ":" in node.value):
            raise ValueError(f"line {node.start_mark.line + 1} is no plain value: {node.tag}")
        if isinstance(node, yaml.SequenceNode):
            waiting += [(child, depth + 1) for child in node.value]
        elif isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        raise ValueError(
                            f"the key {key.value!r} is there twice, line {key.start_mark.line + 1}"
                        )
                    seen.add(key.value)
                waiting += [(key, depth + 1), (value, depth + 1)]


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key!r} is there twice")
        content[key] = value
    return content


def _depth(content: Any) -> int:
    deepest, waiting = 0, [(content, 1)]
    while waiting:
        value, depth = waiting.pop()
        deepest = max(deepest, depth)
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [(child, depth + 1) for child in children]
    return deepest


def _too_deep(name: str) -> str:
    return f"{name} is nested deeper than {MAX_DEPTH} levels"
