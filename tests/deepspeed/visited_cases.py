"""The configurations in which the base iterate is visited under DeepSpeed."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.deepspeed import matrix
from tests.support.turns import part_of


@dataclass(frozen=True)
class Visited:
    """A configuration of the matrix, perhaps with the optimizer on the CPU."""

    case: matrix.Case
    offload: bool = False

    def __str__(self) -> str:
        return f"{self.case}{'-offload' if self.offload else ''}"

    def config(self) -> dict[str, Any]:
        """For `deepspeed.initialize`."""
        config = self.case.config()
        if self.offload:
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        return config


def visited_cases(selection: str) -> Iterator[Visited]:
    """Every stage and precision with several groups, and offload: the "core", or a part of all."""
    cases = [
        Visited(matrix.Case(stage, precision, accumulation=2, groups="several"))
        for stage, precision in itertools.product(range(4), matrix.DTYPES)
        if (stage, precision) != (0, "bf16-fp32grads")
    ]
    cases += [
        Visited(matrix.Case(stage, precision), offload=True)
        for stage, precision in itertools.product((1, 2, 3), ("fp32", "bf16"))
    ]
    cases.append(Visited(matrix.Case(3, "fp16", accumulation=2, offload="cpu-and-parameters")))
    core = {"zero0-bf16", "zero1-bf16-fp32grads", "zero2-fp16", "zero3-fp32", "zero3-bf16", "zero3-fp16"}
    in_core = [case for case in cases if str(case).split("-accumulate")[0] in core]
    yield from in_core if selection == "core" else part_of(cases, selection)
