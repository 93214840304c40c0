"""What Horovod's own tests do with an optimizer, on two ranks: the values of plain Horovod and of one process."""

import functools
from typing import Any

import pytest

from tests.horovod.jobs.optimizer_cases import CASES, Place
from tests.support.compare import REDUCTION_ORDER, assert_same_weights
from tests.support.results import results_of

pytestmark = pytest.mark.ranks

ROWS = [(name, form) for name, case in CASES.items() for form in case.forms]


def found(name: str, form: str) -> list[Any]:
    """What each rank has."""
    of_ranks: list[Any] = results_of("warm horovodrun", 2, "horovod/jobs/optimizer_job")[f"{name}, {form}"]
    return of_ranks


@functools.cache
def one_process(name: str) -> tuple[Any, Place]:
    case, place = CASES[name], Place(name=name)
    return case.run(place, **case.settings), place


@pytest.mark.parametrize(("name", "form"), [row for row in ROWS if row[1] not in CASES[row[0]].differs])
def test_both_ranks_have_the_values_of_one_process_and_of_horovod(name: str, form: str) -> None:
    """Catches a gradient that is lost, sent twice, not averaged, or of another number of passes; state or options that
    reach a rank as another value or kind of value; and a case that shows nothing, since plain Horovod is a form too."""
    expected, place = one_process(name)
    relative = CASES[name].relative or REDUCTION_ORDER
    for weights in found(name, form):
        assert isinstance(weights, dict), weights
        assert_same_weights(weights, expected, started_from=place.started_from, relative=relative)
    if form == "replicated" and "horovod" not in CASES[name].differs:
        for weights, horovods in zip(found(name, form), found(name, "horovod"), strict=True):
            assert_same_weights(weights, horovods, started_from=place.started_from, relative=0)


@pytest.mark.parametrize(("name", "form"), [row for row in ROWS if row[1] in CASES[row[0]].differs])
def test_what_is_refused_says_so_on_both_ranks(name: str, form: str) -> None:
    """Catches a setting that is silently left out, a rank that is left waiting, and a repair without a purpose."""
    text = CASES[name].differs[form]
    for message in found(name, form):
        if text == "other values":
            expected, place = one_process(name)
            with pytest.raises(AssertionError, match="weights differ"):
                assert_same_weights(message, expected, started_from=place.started_from)
        else:
            assert text in message, message
