"""The mistakes: one TOML file per part of the product."""

import tomllib
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path

TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Mutation:
    """A plausible mistake.

    Attributes:
        name: unique; begins with the package it is made in.
        file: changed file, from the repository's root.
        says: what goes wrong with it.
        old: text of the file, found there exactly once.
        new: text in its place.
        tests: files or node ids of the tests that should see it.
        unseen: why no test sees it; empty where one does.
    """

    name: str
    file: str
    says: str
    old: str
    new: str
    tests: tuple[str, ...]
    unseen: str = ""

    def applied(self, root: Path) -> str:
        """The changed content of the file.

        Raises:
            ValueError: the entry is stale: its text is not in the file exactly once, or a test file is gone.
        """
        content = (root / self.file).read_text() if (root / self.file).is_file() else ""
        if content.count(self.old) != 1:
            raise ValueError(f"the old text is {content.count(self.old)} times in {self.file}")
        for test in self.tests:
            if not (root / test.partition("::")[0]).exists():
                raise ValueError(f"{test} does not exist")
        return content.replace(self.old, self.new)


def mutations(only: str = "*", tables: Path = TABLES) -> list[Mutation]:
    """All entries, or those whose names match a pattern, in the order of the tables.

    Raises:
        ValueError: an entry that is not complete, changes nothing, or has a name that another one has.
    """
    found: dict[str, Mutation] = {}
    for path in sorted(tables.glob("*.toml")):
        for entry in tomllib.loads(path.read_text())["mutation"]:
            keys = {field.name for field in fields(Mutation)}
            if not keys - {"unseen"} <= entry.keys() <= keys:
                raise ValueError(f"{path.name}: {entry.get('name')} has other keys than {sorted(keys)}")
            mutation = Mutation(**{**entry, "tests": tuple(entry["tests"])})
            if mutation.name in found or mutation.old == mutation.new or not mutation.tests:
                raise ValueError(
                    f"{path.name}: {mutation.name} is there twice, changes nothing or has no tests"
                )
            found[mutation.name] = mutation
    return [mutation for name, mutation in found.items() if fnmatch(name, only)]
