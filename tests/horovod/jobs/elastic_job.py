"""Job for one rank of an elastic job: trains the toy problem through what the scenario does to it.

usage: elastic_job.py FORM SCENARIO HOSTS_FILE OUTPUT
FORM: replicated, sharded or sharded-bf16
SCENARIO: kill-rank-0, kill-rank-1, kill-lone-rank (which has its host for itself), kill-in-commit, add or remove

Whatever happens, the function must start with the state of the last commit, bit by bit.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import pytest
import torch

from arsg_dist import ARSG, ObservationBoost
from arsg_dist.engine import discover_ranks, end_process
from arsg_dist.horovod import DistributedOptimizer, ShardedOptimizer, connect
from arsg_dist.horovod.comm.process_groups import Group
from arsg_dist.horovod.elastic import TorchState, run
from tests.support import toy

UPDATES = 8
COMMIT_EVERY = 2
CHANGE_AT = 5  # not a multiple of COMMIT_EVERY: an update is lost and made again
BOOST_AT = 3


def main() -> None:
    form, scenario, hosts_file, output = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    connect(discover_ranks())
    torch.manual_seed(os.getpid())  # ranks start with different weights: only the exchange makes them one
    model = toy.build_model()
    if hvd.rank():
        torch.nn.init.zeros_(model[0].weight)
    if form.endswith("bf16"):
        model.bfloat16()
    optimizer = ARSG(model.parameters(), **toy.HYPERPARAMETERS | {"mu": 0.05, "state_dtype": "float32"})
    if form == "replicated":
        distributed = DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    else:
        distributed = sharded(optimizer, model)
    boost = ObservationBoost(distributed, [BOOST_AT])
    state = TorchState(model=model, optimizer=distributed, boost=boost, update=0, world_sizes=[])
    parameters, group = list(model.parameters()), distributed.param_groups[0]
    train(state, scenario, hosts_file)
    assert all(map(lambda mine, now: mine is now, parameters, model.parameters()))
    assert group is distributed.param_groups[0] or form == "replicated"
    if hvd.rank() == 0:
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        torch.save((weights, state.world_sizes, distributed.param_groups[0]["mu"]), output)
    hvd.shutdown()
    end_process(0)


def sharded(optimizer: ARSG, model: torch.nn.Module) -> ShardedOptimizer:
    """Sharded, after what must be refused; several buckets, and cuts inside of parameters."""
    named = list(model.named_parameters())
    refuses(ValueError, "shard_group", lambda: ShardedOptimizer(optimizer, named, shard_group=1))
    distributed = ShardedOptimizer(optimizer, named, bucket_mb=0.01)
    for use in (distributed.step, distributed.state_dict, lambda: distributed.load_state_dict(None)):
        refuses(RuntimeError, "elastic.run", use)
    refuses(ValueError, "belong to no model", lambda: TorchState(model=model[0], optimizer=distributed))
    return distributed


def refuses(kind: type[Exception], text: str, call: Any) -> None:
    """Asserts that a call raises."""
    with pytest.raises(kind, match=text):
        call()


@run
def train(state: TorchState, scenario: str, hosts_file: Path) -> None:
    print(f"rank {hvd.rank()} of {hvd.size()} starts at update {state.update}", flush=True)
    marker, committed = hosts_file.with_suffix(".changed"), hosts_file.with_suffix(".committed")
    if committed.exists():
        compare(state, committed)
    while state.update < UPDATES:
        inputs, targets = toy.batch(state.update)
        rows = toy.BATCH // hvd.size()
        part = slice(hvd.rank() * rows, (hvd.rank() + 1) * rows)
        dtype = state.model[0].weight.dtype
        toy.loss_of(state.model(inputs[part].to(dtype)), targets[part]).backward()
        if state.update == CHANGE_AT and not marker.exists():
            change(state, scenario, hosts_file, marker)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.boost.step()
        state.update += 1
        state.world_sizes = [*state.world_sizes, hvd.size()]
        if state.update % COMMIT_EVERY == 0:
            state.commit()
            record(state, committed)


def change(state: TorchState, scenario: str, hosts_file: Path, marker: Path) -> None:
    """What happens to the job once; in the middle of an update."""
    if scenario == "kill-in-commit":
        if hvd.rank() == 1:
            Group.gather_to_all = dying_in_its_third(Group.gather_to_all, marker)
        return
    if scenario.startswith("kill"):
        if hvd.local_size() == 1 if scenario == "kill-lone-rank" else hvd.rank() == int(scenario[-1]):
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1)  # the dying rank does not take part in this update
        return
    state.optimizer.synchronize()
    state.optimizer.zero_grad()
    record(state, hosts_file.with_suffix(".committed"))
    before = hvd.size()
    hvd.allreduce(torch.zeros(1), name="all ranks know that there is no marker yet")
    if hvd.rank() == 0:
        marker.touch()
        hosts_file.write_text("localhost:1\n127.0.0.1:2\n" if scenario == "add" else "localhost:1\n")
    while hvd.size() == before:
        time.sleep(0.5)
        state.check_host_updates()


def dying_in_its_third(gather: Any, marker: Path) -> Any:
    """`Group.gather_to_all` that kills this rank when the third tensor of a commit is gathered."""
    calls = iter(range(1, 4))

    def dying(group: Group, shard: torch.Tensor, what: str) -> torch.Tensor:
        if next(calls) == 3:
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return gather(group, shard, what)

    return dying


def record(state: TorchState, path: Path) -> None:
    """Rank 0 notes what is committed now, independently of the commit."""
    optimizer = state.optimizer.state_dict()
    if hvd.rank() == 0:
        noted = {"update": state.update, "optimizer": optimizer, "model": state.model.state_dict()}
        torch.save(noted, path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)


def compare(state: TorchState, path: Path) -> None:
    """Asserts on rank 0 that the state is the noted one, bit by bit; on the others that their weights are."""
    noted = torch.load(path, weights_only=False)
    assert state.update == noted["update"], (state.update, noted["update"])
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, noted["model"][name]), name
    optimizer = state.optimizer.state_dict()
    if hvd.rank():
        return
    assert optimizer.keys() == noted["optimizer"].keys()
    assert optimizer["param_groups"] == noted["optimizer"]["param_groups"]
    pairs = []
    if "master_params" in optimizer:
        pairs += [(optimizer["master_params"], noted["optimizer"]["master_params"])]
        assert any((master.bfloat16() != master).any() for master in optimizer["master_params"].values())
    assert optimizer["state"].keys() == noted["optimizer"]["state"].keys()
    pairs += [(entry, noted["optimizer"]["state"][place]) for place, entry in optimizer["state"].items()]
    assert {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"} <= optimizer["state"][0].keys()
    for now, then in pairs:
        assert now.keys() == then.keys()
        for key in now:
            assert torch.equal(torch.as_tensor(now[key]), torch.as_tensor(then[key])), key
    print(f"the state at update {state.update} is the committed one", flush=True)


if __name__ == "__main__":
    main()
