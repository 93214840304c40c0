"""Job for one rank: trains every configuration of `sharded_cases` and compares each with one process.

usage: sharded_job.py [--shard_group=N|node] [NAME OF A CASE]...
"""

import argparse
from collections.abc import Iterable
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor

from arsg_dist.horovod import ShardedOptimizer
from arsg_dist.horovod.sharded.buckets import ALIGNMENT
from arsg_dist.horovod.sharded.inner_optimizer import NUMBERS
from tests.horovod.jobs import run_job
from tests.horovod.jobs import sharded_cases as sharded
from tests.support import toy
from tests.support.compare import assert_same_weights

BUCKET_MB = 0.01  # several buckets, and parameters cut by their ends


def train(case: sharded.Case, model: torch.nn.Module, optimizer: ShardedOptimizer, updates: range) -> None:
    """Makes some updates as a Horovod user would."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=case.scaler)
    schedulers = sharded.schedulers(case, optimizer)
    for update in updates:
        optimizer.zero_grad()

        overflow = None
        if case.scaler and update == sharded.OVERFLOW_AT and hvd.rank() == hvd.size() - 1:
            overflow = model.get_parameter("lift.weight").register_hook(one_infinite)

        def backward(update: int = update) -> Tensor:
            for step in range(case.passes):
                loss = scaler.scale(sharded.loss_of(model, case, update, hvd.rank(), step))
                loss.backward()
            return loss

        if case.closure:
            assert isinstance(optimizer.step(backward), Tensor)
            continue
        backward()
        if overflow is not None:
            overflow.remove()
        if case.clip_idiom == "horovod":
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            if case.scaler:  # else a rank that made the update would wait for those that leave it out
                found = [bool(found) for found in scaler._found_inf_per_device(optimizer).values()]
                assert hvd.allgather_object(found) == [[update == sharded.OVERFLOW_AT]] * hvd.size()
            if not (case.scaler and update == sharded.OVERFLOW_AT):
                assert optimizer.clip_grad_norm_(case.clip, case.norm_type) > case.clip
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
        else:
            if case.clip:
                assert optimizer.clip_grad_norm_(case.clip, case.norm_type) > case.clip
            scaler.step(optimizer)
        scaler.update()
        for scheduler in schedulers:
            scheduler.step()
    if case.scaler and sharded.OVERFLOW_AT in updates:
        assert scaler.get_scale() == 32.0


def one_infinite(gradient: Tensor) -> Tensor:
    """The gradient with one infinite element, which one rank's shard has."""
    changed = gradient.clone()
    changed[3, 4] = float("inf")
    return changed


def run(case: sharded.Case, **arguments: Any) -> None:
    """One case."""
    model = sharded.Patchwork().to(case.dtype)
    start = sharded.weights_of(model)
    optimizer = ShardedOptimizer(
        sharded.OPTIMIZERS[case.optimizer](sharded.grouped(case, dict(model.named_parameters()))),
        model.named_parameters(),
        backward_passes_per_step=case.passes,
        op=hvd.Sum if case.total else hvd.Average,
        compression=getattr(hvd.Compression, case.compression),
        **{"bucket_mb": BUCKET_MB, **case.arguments, **arguments},
    )
    train(case, model, optimizer, range(toy.UPDATES))
    reference = sharded.Reference(case, hvd.size())
    reference.train(range(toy.UPDATES))
    frozen = {name: p for name, p in reference.model.named_parameters() if not p.requires_grad}
    for name, parameter in model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name])
    weights = sharded.weights_of(model)
    expected = {name: master.detach() for name, master in reference.masters.items() if name in start}
    state = optimizer.state_dict()
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    names = [name_of[p] for group in optimizer.param_groups for p in group["params"]]
    if "master_params" in state:
        masters = {names[place]: master for place, master in state["master_params"].items()}
        compare(case, masters, expected, {name: tensor.float() for name, tensor in start.items()})
        for name, master in masters.items():
            assert torch.equal(master.to(case.dtype), weights[name]), f"{name} is not its master, rounded"
    elif case.dtype in (torch.float32, torch.float64):
        compare(case, weights, expected, start)
    of_ranks = hvd.allgather_object({name: w.float().numpy().tobytes() for name, w in weights.items()})
    assert all(other == of_ranks[0] for other in of_ranks), "ranks differ"
    if hvd.rank() == 0:
        compare_state(case, state, reference.optimizer.state_dict())
    optimizer.load_state_dict(state)  # rank 0 sends it to the others
    again = optimizer.state_dict()
    if hvd.rank() == 0:
        compare_state(case, again, reference.optimizer.state_dict())
    if not case.boost:  # its schedules would start anew
        train(case, model, optimizer, range(toy.UPDATES, toy.UPDATES + 1))
        reference.train(range(toy.UPDATES, toy.UPDATES + 1))
        again = optimizer.state_dict()
        if hvd.rank() == 0:
            compare_state(case, again, reference.optimizer.state_dict())
        if case.dtype in (torch.float32, torch.float64):
            expected = {name: master.detach() for name, master in reference.masters.items() if name in start}
            compare(case, sharded.weights_of(model), expected, start)
    held = hvd.allgather_object(elements_of(optimizer.inner.state.values()))
    whole = elements_of(entry for p, entry in reference.optimizer.state.items() if p.requires_grad)
    assert sum(held) == whole * hvd.size() // optimizer.shard_world_size
    # No rank has more than its share, but for the gaps in front of parameters and at the end of the last bucket.
    tensors = max(len(entry) for entry in reference.optimizer.state.values())
    gaps = (len(reference.optimizer.state) + 1) * ALIGNMENT // 4
    assert max(held) <= whole / optimizer.shard_world_size + tensors * gaps
    optimizer.close()


def elements_of(states: Iterable[dict[str, Any]]) -> int:
    """Numbers that optimizer state holds, one per element of a parameter."""
    return sum(
        value.numel()
        for entry in states
        for name, value in entry.items()
        if isinstance(value, Tensor) and name not in NUMBERS
    )


def compare(
    case: sharded.Case, actual: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]
) -> None:
    """Only tensors that moved: `unused` does not without weight decay."""
    moved = [name for name in expected if not torch.equal(expected[name], start[name])]
    assert len(moved) > 8
    assert set(expected) - set(moved) <= {"unused.weight", "unused.bias"}
    assert_same_weights(
        {name: actual[name] for name in moved},
        {name: expected[name] for name in moved},
        started_from={name: start[name] for name in moved},
        relative=case.relative,
    )


def compare_state(case: sharded.Case, actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """State has the same keys, shapes, dtypes and numbers, and groups the same settings, as without sharding."""
    for group, other in zip(actual["param_groups"], expected["param_groups"], strict=True):
        assert group == other, (group, other)
    for place, entry in expected["state"].items():
        mine = actual["state"].get(place, {})
        elements = [v.numel() for v in entry.values() if isinstance(v, Tensor) and v.shape != ()]
        if elements and not max(elements):
            continue  # the empty parameter has no shard
        assert mine.keys() == entry.keys(), (place, mine.keys(), entry.keys())
        for name, value in entry.items():
            if not isinstance(value, Tensor):
                assert mine[name] == value, (place, name)
                continue
            assert (mine[name].shape, mine[name].dtype) == (value.shape, value.dtype), (place, name)
            size = value.abs().max().clamp(min=1e-30)
            difference = ((mine[name] - value).abs().max() / size).item()
            assert difference <= 10 * case.relative, f"{case.name}: state {place} {name} off by {difference}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shard_group", default="job")
    parser.add_argument("names", nargs="*")
    chosen = parser.parse_args()
    group = int(chosen.shard_group) if chosen.shard_group.isdecimal() else chosen.shard_group
    for case in sharded.selected(chosen.names):
        try:
            run(case, shard_group=group)
        except Exception as error:
            raise AssertionError(f"case {case.name!r} on rank {hvd.rank()} of {hvd.size()}") from error
        if hvd.rank() == 0:
            print("done:", case.name, flush=True)


if __name__ == "__main__":
    run_job(main)
