"""Where compiled code is kept, and what started processes may import."""

import stat
from pathlib import Path

import pytest

from arsg_dist.safe_io.processes import environment_of_child, keep_compiled_code_private, private_cache


def test_children_do_not_import_from_the_current_directory() -> None:
    """Catches a started Python that imports a module lying in the current directory."""
    assert environment_of_child({"A": "1"}) == {"A": "1", "PYTHONSAFEPATH": "1"}


def test_compiled_code_is_kept_in_a_directory_of_the_users(tmp_path: Path) -> None:
    """Catches compiled code in a place that a neighbour could have made first; what the user set stays."""
    environ = {"HOME": str(tmp_path), "TRITON_CACHE_DIR": "/mine"}
    keep_compiled_code_private(environ)
    directory = tmp_path / ".cache" / "arsg_dist" / "compiled"
    assert environ["TORCHINDUCTOR_CACHE_DIR"] == str(directory / "inductor")
    assert environ["TRITON_CACHE_DIR"] == "/mine"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    """Catches planted code in a cache that was made before, for all to write, or that leads elsewhere."""
    directory = tmp_path / "arsg_dist" / "compiled"
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    with pytest.raises(ValueError, match="others may write to it"):
        private_cache({"XDG_CACHE_HOME": str(tmp_path)})
    directory.rmdir()
    (tmp_path / "elsewhere").mkdir()
    directory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="others may write to it"):
        private_cache({"XDG_CACHE_HOME": str(tmp_path)})
