"""Small files that are replaced as a whole."""

from pathlib import Path

from arsg_dist.checkpoint.durable import sync


def write_whole(path: Path, text: str) -> None:
    """Gives a file, new or not, this content. A full disk or a kill at any moment leaves it as it was.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text)
        sync(partial)
        partial.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}") from error
