"""The scaling model: what must hold whatever the figures are, and that calibration finds figures it was not told."""

import dataclasses
import random
import statistics

import pytest

pytest.importorskip("scipy", reason="calibration needs scipy")
pytest.importorskip(
    "deepspeed", reason="what ZeRO sends and holds comes from arsg_dist.deepspeed.config.explain"
)
pytest.importorskip("horovod.torch", reason="shards are laid out by arsg_dist.horovod")

from arsg_dist.deepspeed.config.explain import explain
from benchmarks.scaling import fit
from benchmarks.scaling.__main__ import MEASUREMENTS
from benchmarks.scaling.collectives import Cluster, Cost, Exchange, Link, seconds, sent_by_rank
from benchmarks.scaling.inputs import CLUSTERS, load_of
from benchmarks.scaling.model import Behaviour, communication, step_seconds
from benchmarks.scaling.traffic import STRATEGIES, Load, exchanges, memory, zero_config

LOAD = Load((3 * 2**20, 2**19, 2**19), forward=0.1, backward=0.2, bucket=2**20)
RANKS = (2, 8, 64, 4096)


def cluster(inside: float, between: float, **settings: bool) -> Cluster:
    return Cluster(8, Link(1e-6, inside), Link(1e-5, between), **settings)


@pytest.mark.parametrize("ranks", [2, 3, 8, 4096])
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_rings_send_what_the_accounting_says(strategy: str, ranks: int) -> None:
    """Catches two accounts of what is sent: the model's and `arsg-dist check-config`'s."""
    stage = 0 if strategy == "ddp" else int(strategy[-1])
    told = explain(zero_config(stage, LOAD), parameters=LOAD.parameters, world_size=ranks).communication
    one_per_node = dataclasses.replace(cluster(1e9, 1e9), ranks_per_node=1)
    sent = [sent_by_rank(e.operation, e.size, ranks) for e in exchanges(strategy, LOAD, one_per_node, ranks)]
    assert sent == pytest.approx([message.sent for message in told], rel=1e-6)


@pytest.mark.parametrize("ranks", RANKS)
def test_volumes_are_those_of_the_papers(ranks: int) -> None:
    """Catches a pass forgotten: 2(n−1)/n of the gradients in a ring, ZeRO-3 1.5 times that (arXiv 1910.02054, 7)."""
    size = 4 * sum(LOAD.parameters)
    total = {
        strategy: sum(
            sent_by_rank(e.operation, e.size, ranks)
            for e in exchanges(strategy, LOAD, cluster(1e9, 1e9), ranks, gathers=2)
        )
        for strategy in ("ddp", "zero3", "horovod-sharded", "fsdp", "ddp-sharded")
    }
    assert total["ddp"] == pytest.approx(2 * size * (ranks - 1) / ranks)
    for strategy in ("horovod-sharded", "ddp-sharded"):
        assert total[strategy] == pytest.approx(total["ddp"])
    for strategy in ("zero3", "fsdp"):
        assert total[strategy] == pytest.approx(1.5 * total["ddp"])


@pytest.mark.parametrize("ranks", RANKS)
def test_memory_is_the_accounting_of_the_engines(ranks: int) -> None:
    """Catches a second definition of memory, and shards that do not add up to the model."""
    for stage in range(4):
        told = explain(zero_config(stage, LOAD), parameters=LOAD.parameters, world_size=ranks).memory
        strategy = "ddp" if stage == 0 else f"zero{stage}"
        assert memory(strategy, LOAD, cluster(1, 1), ranks) == sum(entry.bytes for entry in told)
    size = sum(LOAD.parameters)
    whole = 4 * size
    assert memory("fsdp", LOAD, cluster(1, 1), ranks) == pytest.approx(20 * size / ranks, abs=20)
    assert memory("ddp-sharded", LOAD, cluster(1, 1), ranks) == pytest.approx(
        8 * size + 12 * size / ranks, abs=20
    )
    for strategy, group in (("horovod-sharded", ranks), ("horovod-two-level", min(ranks, 8))):
        found = memory(strategy, LOAD, cluster(1, 1), ranks)
        assert whole + 16 * size / group <= found <= 1.01 * whole + 16 * 1.3 * size / group


@pytest.mark.parametrize("all_to_all", [False, True])
def test_two_levels_pay_where_the_network_is_slow(all_to_all: bool) -> None:
    """Catches traffic on the wrong link.

    With links between nodes as many times slower as there are nodes, two levels are never slower. Where both are alike
    rings over all ranks are quicker: their data pass between nodes once in any case.
    """
    for ranks in (16, 64, 512, 4096):
        fast_inside = cluster(1e9 * ranks / 8, 1e9, reduce_scatter_by_all_to_all=all_to_all)
        flat, _ = communication("horovod-sharded", LOAD, fast_inside, ranks)
        two_level, _ = communication("horovod-two-level", LOAD, fast_inside, ranks)
        assert two_level <= flat
    alike = cluster(1e9, 1e9)
    large = dataclasses.replace(LOAD, parameters=(2**30,), bucket=2**32)
    assert (
        communication("horovod-sharded", large, alike, 512)[0]
        < communication("horovod-two-level", large, alike, 512)[0]
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_is_at_least_its_passes_and_at_most_everything_in_turn(strategy: str) -> None:
    """Catches time that is hidden twice, or hidden where nothing runs beside it."""
    compute = LOAD.forward + LOAD.backward
    for name in CLUSTERS:
        for ranks in (1, *RANKS):
            alone, _ = communication(strategy, LOAD, CLUSTERS[name], ranks)
            one = Cluster(8, CLUSTERS[name].inside, CLUSTERS[name].between)
            steps = [step_seconds(strategy, LOAD, one, ranks, Behaviour(overlap=o)) for o in (0.0, 0.5, 1.0)]
            assert steps == sorted(steps, reverse=True)
            assert compute <= steps[-1]
            assert steps[0] <= compute + max(alone, communication(strategy, LOAD, one, ranks)[0]) * (1 + 1e-9)


def test_ranks_that_do_not_fill_nodes_are_refused() -> None:
    """Catches a prediction for a job that has no such layout."""
    with pytest.raises(ValueError, match="do not fill"):
        seconds(cluster(1, 1), Exchange("all_gather", 1, 1, "nothing"), 12)


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_calibration_finds_the_figures_that_made_the_data(noise: float) -> None:
    """Catches a feature that is computed otherwise for fitting than for predicting, or a mixed-up column."""
    order = random.Random(0)
    true = {"all_reduce": Cost(5e-4, 1.1, 1.5e-9), "all_gather": Cost(2e-4, 1.4, 0.4e-9)}
    behaviour = Behaviour(0.02, 0.6)
    collectives, steps = [], []
    for hosts in (2, 3, 4):
        for rate in (100, 1000, 2000):
            for operation in true:
                for size in (1 << 14, 1 << 20, 1 << 23):
                    row = fit.Row("torch", hosts, 1, rate, f"{operation} {size}", 1.0)
                    time = seconds(fit.rehearsal(row, true), fit.exchange_of(row), row.ranks)
                    collectives.append(
                        dataclasses.replace(row, measured=time * order.uniform(1 - noise, 1 + noise))
                    )
            row = fit.Row("torch", hosts, 1, rate, "zero1", 1.0)
            time = step_seconds("zero1", fit.LOAD, fit.rehearsal(row, true), hosts, behaviour)
            steps.append(dataclasses.replace(row, measured=time * order.uniform(1 - noise, 1 + noise)))
    costs, behaviours = fit.calibrate(collectives, steps)
    _, steps = fit.predicted(collectives, steps, costs, behaviours)
    assert all(abs(row.error) <= 5 * noise + 1e-6 for row in steps)
    slack = 20 * noise + 1e-6
    for operation, cost in true.items():
        found = costs["torch"][operation]
        assert found.latency == pytest.approx(cost.latency, rel=slack)
        assert found.slowdown == pytest.approx(cost.slowdown, rel=slack)
        assert found.handling == pytest.approx(cost.handling, rel=2 * slack)
    if not noise:  # overhead and overlap trade for one another as soon as the collectives are a little off
        assert behaviours["torch zero1"].overhead == pytest.approx(behaviour.overhead, rel=1e-4)
        assert behaviours["torch zero1"].overlap == pytest.approx(behaviour.overlap, rel=1e-4)


def test_the_model_describes_the_measurements_it_was_not_fitted_to() -> None:
    """Catches a change of the model after which docs/scaling.md no longer tells its error."""
    measured = fit.read(MEASUREMENTS)
    costs, behaviours = fit.calibrate(*measured)
    _, steps = fit.predicted(*measured, costs, behaviours)
    unseen = [row for row in steps if not row.fitted_to]
    assert len(unseen) >= 20
    assert statistics.median(abs(row.error) for row in unseen) < 0.15


def test_loads_are_the_models_they_are_named_after() -> None:
    """Catches a layer forgotten in the sizes."""
    assert sum(load_of("llama7b").parameters) == 6_738_415_616
    assert sum(load_of("resnet50").parameters) == 25_557_032
