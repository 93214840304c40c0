"""DeepSpeed's defects, each shown by a script of plain DeepSpeed with AdamW, and mended by `repair`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from packaging.version import Version

from arsg_dist.deepspeed import repair
from tests.deepspeed.defects import report
from tests.deepspeed.defects.cases import DEFECTS, Defect
from tests.deepspeed.one_rank import one_rank
from tests.support.launchers import launch


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(autouse=True)
def _only_what_is_asked_for() -> Iterator[None]:
    yield
    repair()


def shown_by(defect: Defect) -> bool:
    """Whether the DeepSpeed of these tests is said to have a defect."""
    version = Version(deepspeed.__version__)
    return Version(defect.since) <= version and (defect.until is None or version <= Version(defect.until))


@pytest.mark.parametrize("name", [name for name in DEFECTS if DEFECTS[name].ranks == 1])
def test_a_script_shows_its_defect_and_none_with_the_repair(name: str) -> None:
    """Catches a repair that does nothing for other optimizers or does it unasked, and one that is not needed any more:
    plain DeepSpeed then gives the right value, and the table of versions must say so."""
    defect = DEFECTS[name]
    script: dict[str, Any] = {"__name__": name}
    exec(compile(defect.script(), name, "exec"), script)
    assert script["alone"]() == defect.right
    right = pytest.approx(defect.right, abs=defect.close)
    plain = script["with_deepspeed"]()
    assert (plain != right) == shown_by(defect), plain
    if shown_by(defect) and (defect.until or deepspeed.__version__ >= "0.19"):
        assert plain == pytest.approx(defect.shown, abs=0.001)
    repair(optimizers=(torch.optim.AdamW,))
    assert script["with_deepspeed"]() == right
    repair(optimizers=(torch.optim.SGD,))
    assert script["with_deepspeed"]() == plain


def test_the_document_is_written_from_the_scripts() -> None:
    """Catches a script in the document that is not the one that was run."""
    assert report.DOCUMENT.read_text() == report.text()


@pytest.mark.ranks
def test_scripts_of_several_ranks_show_their_defects(tmp_path: Path) -> None:
    """Catches the same where one rank does not show it: the gradient of one rank in place of the mean."""
    job = launch("warm deepspeed", 2, "tests/deepspeed/jobs/defects.py", tmp_path)
    if "is a view and is being modified inplace" in job.output and Version(deepspeed.__version__) < Version(
        "0.19.0"
    ):
        pytest.skip(
            f"DeepSpeed {deepspeed.__version__} by itself gathers no weights on CPU ranks with this torch"
        )
    assert job.code == 0, job.output[-5000:]
    results = torch.load(tmp_path / "defects.pt", weights_only=True)
    assert results.keys() == {name for name in DEFECTS if DEFECTS[name].ranks > 1}
    for name, (plain, repaired, alone) in results.items():
        defect = DEFECTS[name]
        assert alone == defect.right
        assert repaired == pytest.approx(defect.right, abs=defect.close)
        assert plain == pytest.approx(defect.shown if shown_by(defect) else defect.right, abs=defect.close)
