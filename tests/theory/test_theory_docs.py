"""The code in docs/theory.md runs and gives what it says."""

import doctest
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from arsg_dist import theory

torch.set_num_threads(1)

PAGE = Path(__file__).parents[2] / "docs" / "theory.md"


def test_every_snippet_runs_in_order() -> None:
    """Catches documentation that no longer fits the code: outputs and assertions on the page are checked."""
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(snippets) == 6
    names: dict[str, Any] = {}
    for snippet in snippets:
        if snippet.startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(snippet, names, PAGE.name, str(PAGE), 0)
            runner = doctest.DocTestRunner(verbose=False)
            runner.run(test, clear_globs=False)
            names.update(test.globs)
            assert runner.summarize(verbose=False).failed == 0
        else:
            exec(compile(snippet, "a snippet of " + PAGE.name, "exec"), names)


def test_every_function_is_on_the_page() -> None:
    """Catches a new function that the page does not mention."""
    functions = {name for name in theory.__all__ if name[0].islower()}
    assert functions == {name for name in functions if f"`{name}(" in PAGE.read_text()}


def test_the_numbers_in_the_text_hold() -> None:
    """Catches stale numbers outside the snippets."""
    for mu, share in ((0.1, 0.5), (0.05, 0.33)):
        safe = [theory.largest_safe_step(beta, mu, 1.0) for beta in (0.9, 0.999)]
        assert safe[0] / safe[1] == pytest.approx(share, abs=0.01)
    assert theory.boost_ratio(0.9, 0.05, 0.1) == pytest.approx(0.57, abs=0.005)
