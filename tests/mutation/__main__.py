"""Makes plausible mistakes in a copy of the repository, one at a time, and runs the tests that should see them.

usage: python -m tests.mutation [--only PATTERN] [--resume]
"""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.mutation.results import HUNG, NO_TEST, SEEN, STALE, UNSEEN, Result, read, write
from tests.mutation.tables import Mutation, mutations

ROOT = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")
LIBRARIES = (
    "torch",
    "torch._dynamo.repro.after_dynamo",
    "torch.utils.tensorboard",
    "deepspeed",
    "sklearn.datasets",
    # Plugins of pytest, whose source each child would rewrite anew.
    "hypothesis",
    "hypothesis.strategies",
    "anyio.pytest_plugin",
)
LIMIT = 300
"""Seconds for the tests of one mistake; those named in the tables take a few."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", metavar="PATTERN", help="mistakes of these names: 'optim-*'")
    parser.add_argument(
        "--resume", action="store_true", help="leave out those that RESULTS.md has a result of"
    )
    options = parser.parse_args()
    everything, results = mutations(), read()
    chosen = mutations(options.only)
    if options.resume:
        chosen = [mutation for mutation in chosen if mutation.name not in results]
    for mutation in chosen:
        results.pop(mutation.name, None)
    load_libraries()
    with tempfile.TemporaryDirectory(prefix="mutation-") as directory:
        copy = Path(directory)
        copy_repository(copy)
        possible = [mutation for mutation in chosen if stale(mutation, copy, results) is None]
        if failed := run_tests(copy, sorted({test for mutation in possible for test in mutation.tests})):
            print(f"without any mistake the tests should pass: {failed.outcome} {failed.by}")
            return 1
        write(results, everything)
        for number, mutation in enumerate(possible, 1):
            begin = time.monotonic()
            results[mutation.name] = attempt(mutation, copy)
            write(results, everything)
            result = results[mutation.name]
            seconds = time.monotonic() - begin
            print(
                f"[{number}/{len(possible)}] {mutation.name}: {result.outcome} {result.by} ({seconds:.0f} s)",
                flush=True,
            )
    unexpected = [m.name for m in chosen if results[m.name].outcome != (UNSEEN if m.unseen else SEEN)]
    print(f"{len(chosen) - len(unexpected)} of {len(chosen)} as expected")
    for name in unexpected:
        print(f"  {name}: {results[name].outcome} {results[name].by}")
    return 1 if unexpected else 0


def copy_repository(copy: Path) -> None:
    """Copies what git would commit, and the compiled kernel."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    kernels = [str(path.relative_to(ROOT)) for path in ROOT.glob("arsg_dist/*.so")]
    for name in [*listed.stdout.split("\0"), *kernels]:
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)


def stale(mutation: Mutation, copy: Path, results: dict[str, Result]) -> Result | None:
    """Records an entry that does not fit the files any more."""
    try:
        mutation.applied(copy)
    except ValueError as error:
        results[mutation.name] = Result(STALE, str(error))
        return results[mutation.name]
    return None


def attempt(mutation: Mutation, copy: Path) -> Result:
    """What the tests say of one mistake."""
    path = copy / mutation.file
    before = path.read_text()
    path.write_text(mutation.applied(copy))
    try:
        return run_tests(copy, list(mutation.tests)) or Result(UNSEEN)
    finally:
        path.write_text(before)


def run_tests(copy: Path, tests: list[str]) -> Result | None:
    """Runs tests of the copy up to the first failure, in a child that has the libraries; None if they pass."""
    if not tests:
        return None
    log = copy / "pytest.log"
    child = FORK.Process(target=in_child, args=(copy, tests, log))
    child.start()
    child.join(LIMIT * (len(tests) if len(tests) > 3 else 1))
    if child.exitcode is None:
        child.kill()
        child.join()
        return Result(HUNG)
    if child.exitcode == 0:
        return None
    output = log.read_text(errors="replace")
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    if child.exitcode == 1 and failed:
        return Result(SEEN, failed[1])
    last = output.strip().splitlines()[-1] if output.strip() else ""
    return Result(NO_TEST, f"{last} (exit code {child.exitcode})")


def in_child(copy: Path, tests: list[str], log: Path) -> None:
    """Runs pytest on the copy, whose modules take the place of this checkout's."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)  # of ranks that tests start
    sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("arsg_dist", "tests")]:
        del sys.modules[name]
    # A byte-code file is taken for current by the second and the size of its source, which a mistake can share.
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
    import arsg_dist

    assert Path(arsg_dist.__file__).is_relative_to(copy)
    sys.stdout.flush()
    os._exit(code)


def load_libraries() -> None:
    """Imports what takes the tests seconds to import; nothing of this package."""
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


if __name__ == "__main__":
    sys.exit(main())
