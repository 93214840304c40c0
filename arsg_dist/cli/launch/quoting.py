"""Quote arguments for a shell, here or behind DeepSpeed's pdsh runner."""

import re
import shlex

_PLAIN_PATH = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")


def for_bash(argument: str) -> str:
    """Quote for bash, on one line: schedulers read directives from any line."""
    if "\n" not in argument and "\r" not in argument:
        return shlex.quote(argument)
    escaped = argument.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"$'{escaped}'"


def for_pdsh(argument: str) -> str:
    """Quote an argument of the user's script for DeepSpeed's pdsh runner.

    DeepSpeed 0.19.8 (launcher/multinode_runner.py, PDSHRunner) puts an argument with a space between double quotes,
    escaping double quotes only, and leaves any other as it is; pdsh then replaces %h, %u, %n; a shell reads the rest.
    """
    argument = argument.replace("%", "%%")
    if " " in argument:
        # DeepSpeed adds the outer quotes and a backslash before each '"'.
        return re.sub(r"[\\$`]", r"\\\g<0>", argument)
    return shlex.quote(argument)


def require_plain(path: str, what: str, launcher: str) -> None:
    """Refuse a path that a launcher hands to a shell unquoted.

    Raises:
        ValueError: the path has other characters than a shell leaves alone.
    """
    if not _PLAIN_PATH.fullmatch(path) or "%" in path:
        raise ValueError(
            f"{what} {path!r} has characters that {launcher} does not quote: use a path of letters, digits and "
            "_@+=:,./-"
        )
