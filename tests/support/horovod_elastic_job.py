"""Job for one rank of an elastic job: trains the toy problem through what the scenario does to it.

usage: horovod_elastic_job.py SCENARIO HOSTS_FILE OUTPUT        SCENARIO: kill-rank-0, kill-rank-1, add or remove
"""

import os
import signal
import sys
import time
from pathlib import Path

import horovod.torch as hvd
import torch

from arsg_dist import ARSG, ObservationBoost
from arsg_dist.engine import discover_ranks, end_process
from arsg_dist.horovod import DistributedOptimizer, connect
from arsg_dist.horovod.elastic import TorchState, run
from tests.support import toy

UPDATES = 8
COMMIT_EVERY = 2
CHANGE_AT = 5  # not a multiple of COMMIT_EVERY: an update is lost and made again
BOOST_AT = 3


def main() -> None:
    scenario, hosts_file, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    connect(discover_ranks())
    torch.manual_seed(os.getpid())  # ranks start with different weights: only the exchange makes them one
    model = toy.build_model()
    if hvd.rank():
        torch.nn.init.zeros_(model[0].weight)
    optimizer = ARSG(model.parameters(), **toy.HYPERPARAMETERS | {"mu": 0.05, "state_dtype": "float32"})
    distributed = DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    boost = ObservationBoost(distributed, [BOOST_AT])
    state = TorchState(model=model, optimizer=distributed, boost=boost, update=0, world_sizes=[])
    train(state, scenario, hosts_file)
    if hvd.rank() == 0:
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        torch.save((weights, state.world_sizes, distributed.param_groups[0]["mu"]), output)
    hvd.shutdown()
    end_process(0)


@run
def train(state: TorchState, scenario: str, hosts_file: Path) -> None:
    print(f"rank {hvd.rank()} of {hvd.size()} starts at update {state.update}", flush=True)
    marker = hosts_file.with_suffix(".changed")
    while state.update < UPDATES:
        inputs, targets = toy.batch(state.update)
        rows = toy.BATCH // hvd.size()
        part = slice(hvd.rank() * rows, (hvd.rank() + 1) * rows)
        toy.loss_of(state.model(inputs[part]), targets[part]).backward()
        if state.update == CHANGE_AT and not marker.exists():
            change(state, scenario, hosts_file, marker)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.boost.step()
        state.update += 1
        state.world_sizes = [*state.world_sizes, hvd.size()]
        if state.update % COMMIT_EVERY == 0:
            state.commit()


def change(state: TorchState, scenario: str, hosts_file: Path, marker: Path) -> None:
    """What happens to the job once; in the middle of an update."""
    if scenario.startswith("kill"):
        if hvd.rank() == int(scenario[-1]):
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1)  # the dying rank does not take part in this update
        return
    state.optimizer.synchronize()
    state.optimizer.zero_grad()
    before = hvd.size()
    hvd.allreduce(torch.zeros(1), name="all ranks know that there is no marker yet")
    if hvd.rank() == 0:
        marker.touch()
        hosts_file.write_text("localhost:1\n127.0.0.1:1\n" if scenario == "add" else "localhost:1\n")
    while hvd.size() == before:
        time.sleep(0.5)
        state.check_host_updates()


if __name__ == "__main__":
    main()
