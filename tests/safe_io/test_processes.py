"""What started processes may import; where compiled code is kept: tests/security/test_processes.py."""

from arsg_dist.safe_io.processes import environment_of_child


def test_children_do_not_import_from_the_current_directory() -> None:
    """Catches a started Python that imports a module lying in the current directory."""
    assert environment_of_child({"A": "1"}) == {"A": "1", "PYTHONSAFEPATH": "1"}
