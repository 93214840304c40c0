"""Job for one rank of several: saves checkpoints for one rank to load, and loads those of `cases_on_ranks`.

usage: loads.py DIRECTORY {few|every|CELLS,SEED} [--local_rank=N]
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import deepspeed

import arsg_dist.deepspeed
from arsg_dist.deepspeed.checkpoint.reader import ShardedCheckpoint
from arsg_dist.deepspeed.universal import convert
from arsg_dist.deepspeed.versions import saves_stage_0
from arsg_dist.engine import end_process
from tests.deepspeed import load_cases
from tests.deepspeed.jobs.common import gathered, job, refusal


def main() -> None:
    where, selection = (argument for argument in sys.argv[1:] if not argument.startswith("--"))
    directory = Path(where)
    cases = load_cases.selected(selection)
    with job(directory / "results.pt") as results:
        here = directory / "by several ranks"
        mine = load_cases.cases_on_ranks()
        for case in [*mine, *[case for case in cases if case.source == "other ranks"]]:
            if not (here / load_cases.source_name(case)).exists():
                load_cases.save_source(case, here)
        for case in mine:
            above = directory / "by one rank" if case.source == "other ranks" else here
            results[str(case)] = gathered(load_cases.run(case, above / load_cases.source_name(case)))
        results["refusals"] = gathered(refusals(directory))
        for stage, precision in ((0, "bf16"), (2, "fp32")):
            if stage == 0 and not saves_stage_0():
                continue  # refused at the save
            results[f"spread {stage}"] = gathered(
                spread_experts(stage, precision, directory / f"spread {stage}")
            )


def refusals(directory: Path) -> list[str | None]:
    """What this rank says where only one of them sees something wrong."""
    rank = deepspeed.comm.get_rank()
    case = load_cases.plain(1)
    source = load_cases.save_source(case, directory / "seen otherwise")
    if rank == 0:
        for node, tag in enumerate(("older", "newest")):
            shutil.copytree(source, directory / f"node {node}")
            (directory / f"node {node}" / "latest").write_text(tag)
    deepspeed.comm.barrier()
    engine = load_cases.build(case, "target")
    own = load_cases.snapshot(engine)
    said = [refusal(lambda: engine.load_checkpoint(str(directory / f"node {rank}")))]
    changed = load_cases.differences(own, load_cases.snapshot(engine))
    read = ShardedCheckpoint.read

    def damaged(*_: Any) -> Any:
        raise ValueError("this file is damaged")

    if rank == 1:
        ShardedCheckpoint.read = damaged  # type: ignore[method-assign]
    said.append(refusal(lambda: engine.load_checkpoint(str(source), load_module_only=True)))
    ShardedCheckpoint.read = read  # type: ignore[method-assign]
    return [*said, str(changed)]


def spread_experts(stage: int, precision: str, directory: Path) -> dict[str, Any]:
    """Each rank has another expert of a mixture: what comes back, and what is refused."""
    case = load_cases.plain(stage, precision, "moe spread")
    engine = load_cases.build(case, "source")
    load_cases.train(engine, 0, 1)
    engine.save_checkpoint(str(directory), tag="one")
    at_save = load_cases.snapshot(engine)
    load_cases.train(engine, 2)
    at_end = load_cases.snapshot(engine)
    resumed, warm = (load_cases.build(case, "target") for _ in range(2))
    different = load_cases.differences(at_save, load_cases.snapshot(resumed)) != []
    resumed.load_checkpoint(str(directory))
    loaded = load_cases.differences(at_save, load_cases.snapshot(resumed))
    load_cases.train(resumed, 2)
    warm.load_checkpoint(str(directory), load_module_only=True)
    weights = load_cases.weights(load_cases.snapshot(warm))
    load_cases.train(warm, 2)
    moved = [
        (value - at_save[key]).abs().max().item()
        for key, value in load_cases.weights(load_cases.snapshot(warm)).items()
    ]
    export = arsg_dist.deepspeed.export
    return {
        "warned": engine.warned,
        "different before": different,
        "loaded": loaded,
        "at the end": load_cases.differences(at_end, load_cases.snapshot(resumed)),
        "weights": load_cases.differences(load_cases.weights(at_save), weights),
        "moved": max(moved),
        "refused": [
            refusal(lambda: export(engine, directory / "engine.safetensors")),
            refusal(lambda: export(directory, directory / "directory.safetensors")),
            refusal(lambda: convert(directory / "one", directory / "universal")),
        ],
    }


if __name__ == "__main__":
    main()
    end_process(0)
