"""The optimizer's documentation: its code runs, its table of options is complete and true."""

from __future__ import annotations

import inspect
import re
from pathlib import Path as FilePath

import torch

from arsg_dist import ARSG

TEXT = (FilePath(__file__).parents[2] / "docs" / "optimizer.md").read_text()


def test_the_code_runs_as_written_from_top_to_bottom() -> None:
    """Catches a snippet that was broken by a renamed option."""
    snippets = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(snippets) >= 4
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "docs/optimizer.md", "exec"), names)
    assert isinstance(names["loss_at_theta"], torch.Tensor)


def test_the_table_of_options_is_the_signature() -> None:
    """Catches an option or default that the documentation lacks or still promises."""
    table = TEXT.split("## Options")[1].split("\n\n")[1]
    rows = {
        row[1].strip("` "): row[2].strip(' "') for row in (line.split("|") for line in table.splitlines()[2:])
    }
    parameters = [p for name, p in inspect.signature(ARSG.__init__).parameters.items() if name != "self"]
    assert list(rows) == [p.name for p in parameters]
    for parameter in parameters[1:]:
        default = rows[parameter.name]
        assert default == parameter.default or eval(default) == parameter.default
