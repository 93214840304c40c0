"""Makes plausible mistakes in a copy of the repository, one at a time, and runs the tests that should see them.

usage: python -m tests.mutation [--only PATTERN ...] [--resume] [--limit SECONDS]

That a test fails shows nothing if it fails without the mistake too, say on a busy machine: so the tests that saw
mistakes run once without any. That is a test for each mistake, and not whole files before the first result.
"""

import argparse
import atexit
import contextlib
import importlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.mutation.results import BROKEN, HUNG, NO_TEST, SEEN, STALE, UNSEEN, Result, read, write
from tests.mutation.tables import Mutation, mutations

ROOT = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")
LIBRARIES = (
    "torch",
    "torch._dynamo.repro.after_dynamo",
    "torch.utils.tensorboard",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "safetensors.torch",
    "PIL.Image",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "horovod.torch",
    "matplotlib.figure",
    "sklearn.datasets",
    # Plugins of pytest, whose source each child would rewrite anew.
    "hypothesis",
    "hypothesis.strategies",
    "anyio.pytest_plugin",
)
LIMIT = 300
"""Seconds for the tests of one mistake; those named in the tables take a few."""
TOGETHER = 4
"""Mistakes whose tests are run without them in one go."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="mistakes of these names: 'optim-*'"
    )
    parser.add_argument(
        "--resume", action="store_true", help="leave out those that RESULTS.md has a result of"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT,
        metavar="SECONDS",
        help="for the tests of one mistake (%(default)s)",
    )
    options = parser.parse_args()
    everything, results = mutations(), read()
    wanted = {mutation.name for pattern in options.only for mutation in mutations(pattern)}
    chosen = [mutation for mutation in everything if mutation.name in wanted]
    if options.resume:
        chosen = [mutation for mutation in chosen if mutation.name not in results]
    for mutation in chosen:
        results.pop(mutation.name, None)
    load_libraries()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without removing the copy
    # Not a TemporaryDirectory, which every child would remove at its own end.
    copy = Path(tempfile.mkdtemp(prefix="mutation-"))
    try:
        copy_repository(copy)
        possible = [mutation for mutation in chosen if stale(mutation, copy, results) is None]
        passing: set[str] = set()
        for first in range(0, len(possible), TOGETHER):
            found: dict[str, Result] = {}
            for number, mutation in enumerate(possible[first : first + TOGETHER], first + 1):
                begin = time.monotonic()
                result = found[mutation.name] = attempt(mutation, copy, options.limit)
                seconds = time.monotonic() - begin
                print(
                    f"[{number}/{len(possible)}] {mutation.name}: {result.outcome} {result.by} ({seconds:.0f} s)",
                    flush=True,
                )
            results |= without_mistakes(found, copy, options.limit, passing)
            save(results, chosen, everything)
    finally:
        shutil.rmtree(copy)
    save(results, chosen, everything)
    unexpected = [m.name for m in chosen if results[m.name].outcome != (UNSEEN if m.unseen else SEEN)]
    print(f"{len(chosen) - len(unexpected)} of {len(chosen)} as expected")
    for name in unexpected:
        print(f"  {name}: {results[name].outcome} {results[name].by}")
    return 1 if unexpected else 0


def save(results: dict[str, Result], chosen: list[Mutation], everything: list[Mutation]) -> None:
    """Writes the results of what this campaign chose, and leaves those of others that run at the same time."""
    own = {mutation.name for mutation in chosen}
    others = {name: result for name, result in read().items() if name not in own}
    write(others | {name: result for name, result in results.items() if name in own}, everything)


def copy_repository(copy: Path) -> None:
    """Copies what git would commit, and the compiled kernel."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    kernels = [str(path.relative_to(ROOT)) for path in ROOT.glob("arsg_dist/**/*.so")]
    for name in [*listed.stdout.split("\0"), *kernels]:
        if name and ((ROOT / name).is_file() or (ROOT / name).is_symlink()):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)


def stale(mutation: Mutation, copy: Path, results: dict[str, Result]) -> Result | None:
    """Records an entry that does not fit the files any more."""
    try:
        mutation.applied(copy)
    except ValueError as error:
        results[mutation.name] = Result(STALE, str(error))
        return results[mutation.name]
    return None


def attempt(mutation: Mutation, copy: Path, limit: float) -> Result:
    """What the tests say of one mistake."""
    path = copy / mutation.file
    before = path.read_text()
    path.write_text(mutation.applied(copy))
    try:
        return run_tests(copy, mutation.tests, limit)[0]
    finally:
        path.write_text(before)


def without_mistakes(
    found: dict[str, Result], copy: Path, limit: float, passing: set[str]
) -> dict[str, Result]:
    """The results, with `BROKEN` where a test that saw a mistake fails without it as well.

    Args:
        found: by name.
        copy: without mistakes.
        limit: seconds for each test.
        passing: tests known to pass; takes in those that do.
    """
    asked = sorted({result.by for result in found.values() if result.outcome == SEEN} - passing)
    if asked:
        passing |= run_tests(copy, asked, limit * len(asked), to_the_end=True)[1]
    return {
        name: Result(BROKEN, result.by) if result.outcome == SEEN and result.by not in passing else result
        for name, result in found.items()
    }


def run_tests(
    copy: Path, tests: Iterable[str], limit: float, *, to_the_end: bool = False
) -> tuple[Result, set[str]]:
    """Runs tests of the copy, in a child that has the libraries.

    Args:
        copy: where.
        tests: files or node ids.
        limit: seconds.
        to_the_end: not only up to the first failure.

    Returns:
        what became of them, and the node ids of those that passed.
    """
    log, outcomes = copy / "pytest.log", copy / "outcomes"
    outcomes.write_text("")
    child = FORK.Process(target=in_child, args=(copy, tests, log, outcomes, to_the_end))
    child.start()
    child.join(limit)
    hung = child.exitcode is None
    if hung and child.pid:
        os.kill(child.pid, signal.SIGINT)  # pytest ends the ranks that its tests have started
        child.join(60)
        child.kill()
        child.join()
    rows = [line.partition(" ")[::2] for line in outcomes.read_text().splitlines()]
    failed = [test for outcome, test in rows if outcome == "failed"]
    passed = {test for outcome, test in rows if outcome == "passed"} - {*failed}
    if hung:
        return Result(HUNG, failed[0] if failed else ""), passed
    if child.exitcode == 0:
        return Result(UNSEEN), passed
    if child.exitcode == 1 and failed:
        return Result(SEEN, failed[0]), passed
    output = log.read_text(errors="replace").strip()
    return Result(
        NO_TEST, f"{output.splitlines()[-1] if output else ''} (exit code {child.exitcode})"
    ), passed


class Outcomes:
    """A plugin of pytest that writes which tests passed and failed.

    Args:
        path: of the file, which other lines are added to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write a test's end, and a failure to begin or to end it."""
        if report.failed or (report.when == "call" and report.passed):
            with self._path.open("a") as file:
                file.write(f"{report.outcome} {report.nodeid}\n")


def in_child(copy: Path, tests: Iterable[str], log: Path, outcomes: Path, to_the_end: bool) -> None:
    """Runs pytest on the copy, whose modules take the place of this checkout's."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has background jobs ignore
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)  # of ranks that tests start
    sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("arsg_dist", "tests")]:
        del sys.modules[name]
    # A byte-code file is taken for current by the second and the size of its source, which a mistake can share.
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    warm_ranks = importlib.import_module("tests.support.warm_ranks")
    warm_ranks.prepare()
    options = ["-q", "-p", "no:cacheprovider", *([] if to_the_end else ["-x"])]
    code = pytest.main([*options, *tests], plugins=[Outcomes(outcomes)])
    import arsg_dist

    assert Path(arsg_dist.__file__).is_relative_to(copy)
    atexit._run_exitfuncs()  # as those of the processes that ranks are forked from
    sys.stdout.flush()
    os._exit(code)


def load_libraries() -> None:
    """Imports what takes the tests seconds to import; nothing of this package."""
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


if __name__ == "__main__":
    sys.exit(main())
