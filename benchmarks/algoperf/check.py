"""Run the submissions in AlgoPerf's own harness, on its MNIST workload and a CPU, from the four IDX files.

    python -m benchmarks.algoperf.check --mnist DIR --output runs/algoperf

In an environment with AlgoPerf's package (docs/algoperf.md). Only where the images come from is replaced: the workload
asks TensorFlow Datasets for them, which would download them. The updates of a short run are compared with a plain loop
over the same batches. Then the benchmark's runner makes a trial of each ruleset, with its evaluations and checkpoints.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.nn import functional

SUBMISSIONS = ("arsg", "remote_adamw")
FILES = {"train": "train", "test": "t10k"}


def idx(path: Path, header: int) -> np.ndarray:
    """Return the bytes of an IDX file after its header."""
    with gzip.open(path) as file:
        return np.frombuffer(file.read()[header:], np.uint8)


def offer_images(folder: Path) -> None:
    """Let `tensorflow_datasets.load("mnist", ...)` take the images from a folder."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    def load(name: str, split: str, **_: Any) -> Any:
        assert name == "mnist"
        part, _, share = split.partition("[")
        images = idx(folder / f"{FILES[part]}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28, 1)
        labels = idx(folder / f"{FILES[part]}-labels-idx1-ubyte.gz", 8).astype(np.int64)
        first, _, last = share.rstrip("]").partition(":")
        kept = slice(int(first) if first else None, int(last) if last else None)
        return tf.data.Dataset.from_tensor_slices({"image": images[kept], "label": labels[kept]})

    tfds.load = load


def give_flags(*arguments: str) -> list[str]:
    """Let the benchmark's flags have these values: its functions, and not only its runner, ask for them."""
    import submission_runner
    from absl import flags

    flags.FLAGS.unparse_flags()
    given = [submission_runner.__name__, "--framework=pytorch", *arguments]
    flags.FLAGS(given)
    return given


def compare(name: str, steps: int) -> dict[str, float]:
    """Make updates by the submission and by a plain loop; return the first and last loss and the largest difference."""
    give_flags()

    from algoperf import random_utils
    from algoperf.workloads.mnist.mnist_pytorch.workload import MnistWorkload
    from benchmarks.algoperf import shared

    module = importlib.import_module(f"benchmarks.algoperf.{name}.submission")
    workload, key = MnistWorkload(), random_utils.PRNGKey(0)
    model, model_state = workload.init_model_fn(key)
    plain = copy.deepcopy(model)
    state = module.init_optimizer_state(workload, model, model_state, None, key)
    optimizer = module.make(plain.parameters(), module.Defaults())
    base = [group["lr"] for group in optimizer.param_groups]
    settings = shared.Settings()
    factor = shared.WarmupCosine(round(settings.warmup_factor * workload.step_hint), workload.step_hint)
    queue = workload._build_input_queue(key, "train", "", module.get_batch_size("mnist"))
    losses: list[float] = []
    for step in range(steps):
        batch = module.data_selection(workload, queue, state, model, model_state, None, step, key)
        state, model, model_state = module.update_params(
            workload,
            model,
            workload.model_params_types,
            model_state,
            None,
            batch,
            workload.loss_type,
            state,
            [],
            step,
            key,
        )
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * factor(step)
        optimizer.zero_grad()
        loss = functional.cross_entropy(plain(batch["inputs"]), batch["targets"])
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), settings.grad_clip)
        optimizer.step()
        losses.append(loss.item())
    apart = max(
        (a - b).abs().max().item() for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )
    mean = steps // 10
    found = {"first": sum(losses[:mean]) / mean, "last": sum(losses[-mean:]) / mean, "apart": apart}
    assert found["last"] < 0.7 * found["first"], found
    assert apart < 1e-4, found
    return found


def trial(name: str, ruleset: str, output: Path, steps: int) -> None:
    """Let the benchmark's runner make one trial of so many updates; it parses its own command line."""
    import submission_runner

    space = f"benchmarks/algoperf/{name}/tuning_search_space.json"
    external = [f"--tuning_search_space={space}", "--num_tuning_trials=1"] if ruleset == "external" else []
    arguments = give_flags(
        "--workload=mnist",
        f"--submission_path=benchmarks/algoperf/{name}/submission.py",
        f"--tuning_ruleset={ruleset}",
        *external,
        f"--experiment_dir={output.resolve()}",
        f"--experiment_name={name}_{ruleset}",
        f"--max_global_steps={steps}",
        "--rng_seed=1",
        "--notorch_compile",
        "--overwrite",
    )
    submission_runner.main(arguments)


def evaluations(folder: Path) -> dict[str, float]:
    """Return what the runner recorded of its last evaluation, and how many there were."""
    (path,) = folder.glob("**/eval_measurements.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    names = ("validation/loss", "validation/accuracy", "global_step")
    return {"evaluations": len(rows), **{name: float(rows[-1][name]) for name in names}}


def main() -> None:
    """Compare, then let the runner make its trials; it keeps its workload's path, so each has a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist", type=Path, required=True, help="folder of the four IDX files")
    parser.add_argument("--output", type=Path, default=Path("runs/algoperf"), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="updates of each run (default: %(default)s)")
    parser.add_argument(
        "--trial", nargs=2, metavar=("SUBMISSION", "RULESET"), help="only this trial of the runner"
    )
    options = parser.parse_args()
    offer_images(options.mnist)
    if options.trial:
        trial(*options.trial, options.output, options.steps)
        return
    for name in SUBMISSIONS:
        print(json.dumps({"submission": name, **compare(name, options.steps)}), flush=True)
        for ruleset in ("external", "self"):
            command = [
                sys.executable,
                "-m",
                "benchmarks.algoperf.check",
                *sys.argv[1:],
                "--trial",
                name,
                ruleset,
            ]
            subprocess.run(command, check=True)
            found = evaluations(options.output / f"{name}_{ruleset}")
            print(json.dumps({"submission": name, "ruleset": ruleset, **found}), flush=True)


if __name__ == "__main__":
    main()
