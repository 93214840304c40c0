"""Run the scripts of the defects that one rank does not show, as DeepSpeed is and repaired.

usage: defects.py OUTPUT_DIRECTORY [--local_rank=N]
"""

import sys
from pathlib import Path
from typing import Any

import torch

from arsg_dist.deepspeed import repair
from arsg_dist.engine import end_process
from tests.deepspeed.defects.cases import DEFECTS
from tests.deepspeed.jobs import common


def main() -> None:
    output = Path(next(a for a in sys.argv[1:] if not a.startswith("--")))
    with common.job(output / "defects.pt") as results:
        for name, defect in DEFECTS.items():
            if defect.ranks > 1:
                script: dict[str, Any] = {"__name__": name}
                exec(compile(defect.script(), name, "exec"), script)
                plain = script["with_deepspeed"]()
                repair(optimizers=(torch.optim.AdamW,))
                results[name] = plain, script["with_deepspeed"](), script["alone"]()
                repair()
    end_process(0)


if __name__ == "__main__":
    main()
