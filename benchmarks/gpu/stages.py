"""What is run on a GPU, in order of worth: stages of tasks, each a command with a limit of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

KERNEL = Path(__file__).parents[2] / "arsg_dist/optim/kernels/arsg_cpu.so"

ARSG = "`ARSG`: reference"
COMPILED = "`ARSG` under FSDP2"
ZERO = "DeepSpeed ZeRO 0, 1, 2, 3"
OFFLOAD = "DeepSpeed offload to the CPU"
HOROVOD = "Horovod, replicated"
SHARDED = "Horovod, sharded"
DDP = "torch's DistributedDataParallel"
FSDP = "torch's FSDP2"
SAVING = "checkpoints: saved by any engine"
ROWS = (ARSG, COMPILED, ZERO, OFFLOAD, HOROVOD, SHARDED, DDP, FSDP, SAVING)
"""How rows of the table in README.md begin."""


_OPERATORS = (
    "from deepspeed.accelerator import get_accelerator as here; "
    "[here().create_op_builder(name).load() for name in ('CPUAdamBuilder', 'ShareMemCommBuilder')]"
)


@dataclass(frozen=True)
class Setting:
    """Where and how large the tasks are.

    Attributes:
        output: folder for results and reports, absolute.
        device: "cuda"; "cpu" for a rehearsal.
        short: of each stage as little as shows that it runs.
    """

    output: Path
    device: str = "cuda"
    short: bool = False


@dataclass(frozen=True)
class Task:
    """A command whose end, and whose lines that begin with `RESULT`, are results.

    Attributes:
        name: unique in its stage.
        command: without a shell; the first word is looked for on PATH, and a task without it is left out.
        limit: seconds, after which it is ended.
        shows: rows of README's table (`ROWS`) → what is said there if it passes.
        environment: variables beside the runner's.
        needs: a Python package without which it is left out; "" for none.
    """

    name: str
    command: list[str]
    limit: float
    shows: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""


@dataclass(frozen=True)
class Stage:
    """Tasks that belong together.

    Attributes:
        name: on the command line, for `--from` and `--to`.
        limit: seconds for all of them; what is left of it limits each.
        tasks: in order of worth.
    """

    name: str
    limit: float
    tasks: list[Task]


def stages(setting: Setting) -> list[Stage]:
    """Return all stages, the most worth first."""
    dry, short, device, output = setting.device == "cpu", setting.short, setting.device, setting.output
    python = sys.executable
    alone = {"CUDA_VISIBLE_DEVICES": "0"}

    def module(name: str, *arguments: object) -> list[str]:
        return [python, "-u", "-m", f"benchmarks.{name}", *map(str, arguments)]

    def tests(*arguments: str, workers: int = 1) -> list[str]:
        several = ["-n", str(workers)] if workers > 1 else []
        options = [
            "-v",
            "-p",
            "no:cacheprovider",
            "--tb=short",
            "--turn",
            "0",
        ]  # else git would have to be there
        return [python, "-m", "pytest", *options, *several, *arguments]

    def steps(workload: str, *only: str) -> Task:
        rounds = 1 if short else 2 if dry else 15
        command = module("optimizer_step", "--device", device, "--workloads", workload, "--rounds", rounds)
        command += [
            "--output",
            str(output / f"optimizer_step_{workload}.md"),
            *(["--only", *only] if only else []),
        ]
        return Task(workload, command, 40)

    def engines(
        *names: str, start: list[str] | None = None, shows: Mapping[str, str] | None = None, needs: str = ""
    ) -> Task:
        command = [
            *(start or []),
            *module("gpu.engines", "--device", device, *(["--short"] if short else []), *names),
        ]
        return Task(" ".join(names) + (" on 2 ranks" if start else ""), command, 90, shows or {}, needs=needs)

    def throughput(*options: str) -> Task:
        size = ["--batch", "256", "--side", "224", "--steps", "20", "--rounds", "3"]
        if dry:
            size = ["--model", "resnet20", "--batch", "2", "--side", "32", "--steps", "1", "--rounds", "1"]
        kind = "".join(option.replace("--", "_") for option in options if option.startswith("--c"))
        command = module("throughput", "--device", device, "--precision", "bf16", *size, *options)
        return Task(f"resnet50{kind}", [*command, "--output", str(output / f"throughput{kind}.md")], 100)

    tokens, updates, every = (1024, 4, 2) if dry else (65_536, 100, 25)
    nanogpt = module(
        "nanogpt",
        *("--data", output / "tokens", "--synthetic", 100 * tokens, "--output", output / "nanogpt"),
        *("--optimizers", "muon", "remote-muon", "adamw", "arsg", "--minutes", 1.5),
        *("--tokens", tokens, "--steps", updates, "--val-every", every, "--val-tokens", 2 * tokens),
        *("--time", "64", "--micro", "4", "--vocabulary", "512", "--layers", "2", "--width", "64") * dry,
        *("--head", "32", "--dtype", "float32", "--no-compile") * dry,
    )
    saving = 80 if dry else 60
    kernel = module("gpu.kernel", "--device", device)
    gpu_tests = "not gpu" if dry else "gpu"
    found = [
        Stage("versions", 20, [Task("versions", module("gpu.versions", "--device", device), 20)]),
        Stage(
            "build",
            140 if dry else 40,
            [
                Task("unpack", module("gpu.unpack", output), 20),
                # A rehearsal leaves the tree's own as it is, which may be in use.
                Task(
                    "C++ kernel",
                    [
                        python,
                        "setup.py",
                        *(["--version"] if dry and KERNEL.exists() else ["-q", "build_ext", "--inplace"]),
                    ],
                    40,
                ),
                # Else ranks on the CPU would compile them within their own limits.
                *(
                    [Task("DeepSpeed's operators", [python, "-c", _OPERATORS], 100, needs="deepspeed")]
                    if dry
                    else []
                ),
            ],
        ),
        Stage(
            "tests",
            100,
            [
                Task(
                    "ARSG on the GPU",
                    tests("-m", "gpu", "tests/optim", workers=1 if dry else 8)
                    if not dry
                    else tests("-m", gpu_tests, "tests/optim/kernels/test_dispatch.py"),
                    60,
                    {
                        ARSG: "`pytest -m gpu tests/optim`: the reference's update, the authors' trajectories, state "
                        "moved between CPU and GPU",
                        COMPILED: "a step captured in a CUDA graph, replayed",
                    },
                ),
                Task(
                    "bits",
                    module("gpu.bits", "--device", device, *(["--short"] if short else [])),
                    60,
                    {ARSG: "the Triton kernel's bits against the C++ kernel's"},
                ),
            ],
        ),
        Stage(
            "optimizer",
            90,
            [
                steps("small" if dry else "resnet50"),
                *(
                    []
                    if dry
                    else [
                        steps("resnet50-flat"),
                        steps("transformer"),
                        steps("eighth-of-7b", "ARSG fused", "AdamW"),
                    ]
                ),
            ],
        ),
        Stage(
            "zero",
            100,
            [
                engines(
                    "deepspeed",
                    shows={
                        ZERO: "1 rank, stages 0 to 3 in fp32, bf16 and fp16, against one process",
                        OFFLOAD: "1 rank, stages 1 to 3, against one process",
                    },
                )
            ],
        ),
        Stage("resnet50", 80, [throughput("--channels-last")]),
        Stage(
            "horovod",
            80,
            [
                engines(
                    "horovod",
                    "horovod-sharded",
                    shows={HOROVOD: "1 rank, against one process", SHARDED: "1 rank, against one process"},
                    needs="horovod",
                ),
                *(
                    []
                    if short
                    else [
                        engines(
                            "horovod",
                            "horovod-sharded",
                            start=["horovodrun", "--gloo", "--network-interface", "lo", "-np", "2"],
                            shows={
                                HOROVOD: "2 ranks that share a GPU, over Gloo",
                                SHARDED: "2 ranks that share a GPU, over Gloo",
                            },
                            needs="horovod",
                        )
                    ]
                ),
            ],
        ),
        Stage(
            "local",
            40,
            [
                engines("single", "ddp", shows={DDP: "1 rank, against one process"}),
                *([] if short else [engines("fsdp", shows={FSDP: "1 rank, against one process"})]),
            ],
        ),
        Stage(
            "checkpoint",
            saving,
            []
            if short
            else [
                Task(
                    "stall and resume",
                    module(
                        "checkpoint_save",
                        *("--device", device, "--ranks", 1, "--rounds", 1 if dry else 3),
                        *("--workloads", "resnet50", "--output", output / "checkpoint_save.md"),
                    ),
                    saving,
                    {SAVING: "one process, saved in the background and loaded"},
                )
            ],
        ),
        Stage(
            "tools",
            70,
            []
            if short
            else [
                Task(
                    "compute-sanitizer",
                    ["compute-sanitizer", "--error-exitcode", "9", *kernel],
                    40,
                    {},
                    alone,
                ),
                Task("ncu", ["ncu", "--set", "basic", "-k", "kernel", "-c", "2", *kernel], 40, {}, alone),
            ],
        ),
        Stage(
            "compile",
            100,
            [] if short else [throughput("--channels-last", "--compile", "--only", "ARSG", "AdamW")],
        ),
        Stage("nanogpt", 110, [] if short else [Task("four optimizers", nanogpt, 110)]),
    ]
    if not dry:
        return found
    # The processors of a rehearsal are anybody's, and slower than what the limits are for.
    return [
        replace(
            stage, limit=3 * stage.limit, tasks=[replace(task, limit=3 * task.limit) for task in stage.tasks]
        )
        for stage in found
    ]
