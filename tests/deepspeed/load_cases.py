"""What `engine.load_checkpoint` is asked for, and what must be equal afterwards.

For a process that is one rank of a DeepSpeed job of any number of ranks: the tests run it in their own process, and
`jobs/loads.py` on several ranks.
"""

import functools
import itertools
import random
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

from arsg_dist import ARSG
from arsg_dist.deepspeed.checkpoint.engine_state import dynamic_scaler
from arsg_dist.deepspeed.universal import convert
from tests.support.pairwise import pairwise

FACTORS: dict[str, tuple[Any, ...]] = {
    "model": ("plain", "frozen", "excluded", "tied", "moe", "pipeline"),
    "stage": (0, 1, 2, 3),
    "precision": ("fp32", "bf16", "fp16"),
    "source": ("same ranks", "other ranks", "Adam", "universal"),
    "stepped": (False, True),
    "tag": ("latest", "older", "no latest"),
    "load_module_only": (False, True),
    "load_optimizer_states": (True, False),
    "load_lr_scheduler_states": (True, False),
    "load_module_strict": (True, False),
}
OPTIONS = [name for name in FACTORS if name.startswith("load_")]
SAVED_AFTER = {"older": 2, "newest": 3}  # updates
SCALES = (1.0, 0.5, -0.75, 0.25, 1.5)  # of the gradient, by update
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "slow_param")
SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": [0.9, 0.5], "mu": 0.5, "eps": 1e-4, "lookahead_k": 2}
LRS = {"source": (0.125, 0.5), "target": (0.25, 0.0625)}


@dataclass(frozen=True)
class Case:
    """One cell of the matrix; its fields are those of `FACTORS`."""

    model: str
    stage: int
    precision: str
    source: str
    stepped: bool
    tag: str
    load_module_only: bool
    load_optimizer_states: bool
    load_lr_scheduler_states: bool
    load_module_strict: bool

    def __str__(self) -> str:
        off = [name.removeprefix("load_") for name in OPTIONS if getattr(self, name) is not _USUAL[name]]
        parts = [f"zero{self.stage}", self.precision, self.model, self.source, *["stepped"] * self.stepped]
        return "-".join(part.replace(" ", "_") for part in [*parts, self.tag, *off])

    @property
    def options(self) -> dict[str, Any]:
        """For `load_checkpoint`."""
        return {name: getattr(self, name) for name in OPTIONS}

    @property
    def with_optimizer(self) -> bool:
        """Whether the optimizer's state is asked for."""
        return self.load_optimizer_states and not self.load_module_only

    @property
    def with_schedule(self) -> bool:
        """Whether the schedule's state is asked for."""
        return self.load_lr_scheduler_states and not self.load_module_only


_USUAL = {
    "load_module_only": False,
    "load_optimizer_states": True,
    "load_lr_scheduler_states": True,
    "load_module_strict": True,
}


def exists(row: dict[str, Any]) -> bool:
    """DeepSpeed has no mixture of experts at stage 3, no pipelines at 2 and 3, and ours none in bf16 at 0."""
    if (row["model"], row["stage"], row["precision"]) == ("pipeline", 0, "bf16"):
        return False
    return row["stage"] <= {"moe": 2, "pipeline": 1}.get(row["model"], 3)


@dataclass(frozen=True)
class Rule:
    """What a cell must do, in the order in which the first one that applies is taken.

    Attributes:
        when: it applies.
        cell: as the documents name it.
        then: as the documents say it.
        refusal: what the error says; None where it loads.
    """

    cell: str
    then: str
    when: Callable[[Case], bool]
    refusal: str | None = None


RULES = [
    Rule(
        "universal checkpoint of a pipeline, or of a mixture of experts spread over ranks",
        "refused by the converter",
        lambda case: case.source == "universal" and case.model == "pipeline",
        "is not supported",
    ),
    Rule(
        "no file `latest`, no tag",
        "`(None, None)` as DeepSpeed does, and nothing is changed; rank 0 warns and names the tags there are",
        lambda case: case.tag == "no latest" and case.source != "universal",
    ),
    Rule(
        "universal: no file `latest_universal`, no tag",
        "refused; says how to convert",
        lambda case: case.tag == "no latest",
        "has no file latest_universal.*python -m arsg_dist.deepspeed.universal",
    ),
    Rule(
        "the optimizer's state from another optimizer's checkpoint",
        "refused; says how to take the weights alone",
        lambda case: case.source == "Adam" and case.with_optimizer,
        "was not written by ARSG.*load_module_only=True",
    ),
    Rule(
        "the optimizer's state from another number of ranks, stages 1 to 3",
        "refused; says how to convert, or, where that cannot be, to take the weights alone",
        lambda case: case.source == "other ranks" and case.stage > 0 and case.with_optimizer,
        "was written by . ranks? and this job has",
    ),
    Rule(
        "saved with `exclude_frozen_parameters=True`, `load_module_strict=True`",
        "refused; says `load_module_strict=False`",
        lambda case: case.model == "excluded" and case.load_module_strict,
        "load_module_strict=False",
    ),
    Rule(
        "`load_optimizer_states=True`",
        "masters, weights, buffers, the optimizer's state, settings, loss scale and counters are the saved ones, the "
        "schedule with `load_lr_scheduler_states=True`; else lr is that of the engine's own schedule",
        lambda case: case.with_optimizer,
    ),
    Rule(
        "`load_optimizer_states=False`",
        "masters, weights, buffers and counters are the saved ones, and with `load_lr_scheduler_states=True` the "
        "schedule and lr; moments, other settings and loss scale stay the engine's; lookahead's slow weights begin at "
        "the loaded ones",
        lambda case: not case.load_module_only,
    ),
    Rule(
        "`load_module_only=True`",
        "masters, weights and buffers are the saved ones; all else stays the engine's; lookahead's slow weights begin "
        "at the loaded ones",
        lambda case: case.load_module_only,
    ),
]


def plain(stage: int, precision: str = "fp32", model: str = "plain") -> Case:
    """A resume from the older tag."""
    return Case(model, stage, precision, "same ranks", False, "older", False, True, True, True)


def rule_of(case: Case) -> Rule:
    """The first rule that applies."""
    return next(rule for rule in RULES if rule.when(case))


def loads(row: dict[str, Any]) -> bool:
    """Whether something is loaded."""
    return exists(row) and rule_of(_case(row)) in RULES[-3:]


@functools.cache
def _loading_rows() -> list[dict[str, Any]]:
    return pairwise(FACTORS, loads)


@functools.cache
def few_cases() -> list[Case]:
    """Every pair of values among the cells that load, and then every value with every rule."""
    factors = {**FACTORS, "rule": range(len(RULES))}

    def follows(row: dict[str, Any]) -> bool:
        return exists(row) and rule_of(_case(row)) is RULES[row["rule"]]

    loading = [{**row, "rule": RULES.index(rule_of(_case(row)))} for row in _loading_rows()]
    return [_case(row) for row in [*loading, *pairwise(factors, follows, known=loading)]]


def quick_cases() -> list[Case]:
    """Those of the few that load, in which every two values meet, and the first of every other rule."""
    seen: set[int] = set()
    quick = []
    for number, case in enumerate(few_cases()):
        rule = RULES.index(rule_of(case))
        if number < len(_loading_rows()) or rule not in seen:
            quick.append(case)
        seen.add(rule)
    return quick


def cases_on_ranks() -> list[Case]:
    """Those of the few that are run on two ranks too."""
    return [case for case in few_cases() if case.tag != "no latest"][::6]


def _case(row: dict[str, Any]) -> Case:
    return Case(**{name: row[name] for name in FACTORS})


def all_cases() -> Iterator[Case]:
    """The full product."""
    for values in itertools.product(*FACTORS.values()):
        row = dict(zip(FACTORS, values, strict=True))
        if exists(row):
            yield Case(**row)


def selected(selection: str) -> list[Case]:
    """The "few", "every" one, or "CELLS,SEED": a random sample of the full product."""
    if selection == "few":
        return few_cases()
    cases = list(all_cases())
    if selection == "every":
        return cases
    cells, seed = map(int, selection.split(","))
    # Checkpoints are made once: cells that load the same one follow each other.
    return sorted(random.Random(seed).sample(cases, cells), key=source_name)


class Slope(nn.Module):
    """Adds to a sum; the gradient of each of its elements is the slope times the input's first element."""

    def __init__(self, size: int, slope: float, start: float) -> None:
        super().__init__()
        self.slope = slope
        self.weight = nn.Parameter(start + torch.arange(float(size)) / 8)
        self.register_buffer("seen", torch.full((2,), start))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return inputs + torch.stack([inputs[0] * 0, self.slope * inputs[0] * self.weight.sum()])


class Experts(nn.Module):
    """A mixture of two experts between two layers."""

    def __init__(self, start: float, ep_size: int) -> None:
        super().__init__()
        torch.manual_seed(int(start) + deepspeed.comm.get_rank())
        self.first = nn.Linear(4, 6)
        self.mixture = MoE(6, nn.Linear(6, 6), num_experts=2, ep_size=ep_size, capacity_factor=2.0)
        self.last = nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.mixture(self.first(inputs))[0])
        return outputs


def build_model(name: str, start: float) -> Any:
    """With three parameters, the first two of one group, and what the name says."""
    if name.startswith("moe"):
        return Experts(start, ep_size=1 + name.endswith("spread"))
    layers = [Slope(5, 0.5, start), Slope(3, -0.25, start + 1), Slope(7, 2.0, start + 2)]
    if name in ("frozen", "excluded"):
        layers.insert(1, Slope(4, 1.0, start + 3).requires_grad_(False))
    if name.startswith("and"):  # what the other side of a load lacks
        if name == "and a buffer":
            layers[0].register_buffer("more", torch.full((2,), start))
        else:
            layers.append(Slope(4, 1.0, start + 3).requires_grad_(name == "and a parameter"))
    if name == "tied":
        layers.append(Slope(5, 0.25, start + 4))
        layers[-1].weight = layers[0].weight
    if name == "pipeline":
        return deepspeed.pipe.PipelineModule(layers, num_stages=1, loss_fn=lambda outputs, _: outputs[1])
    return nn.Sequential(*layers)


def build(case: Case, who: str, optimizer: str = "ARSG", **sections: Any) -> Any:
    """A DeepSpeed engine, the "source" of a checkpoint or its "target", whose weights differ."""
    model = build_model(case.model, {"source": 1.0, "target": 7.0}[who])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: Any = [
        {"params": trained[:2], "lr": LRS[who][0]},
        {"params": trained[2:], "lr": LRS[who][1], "betas": (0.5, 0.5)},
    ]
    if case.model.startswith("moe"):
        groups = split_params_into_different_moe_groups_for_optimizer(
            [{**group, "name": str(index)} for index, group in enumerate(groups)]
        )
    if case.model in ("frozen", "excluded"):
        groups[0]["params"].append(next(p for p in model.parameters() if not p.requires_grad))
    ours = {"type": "ARSG", "params": SETTINGS}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**6,
        # Stage 3 takes memory for a whole bucket at once.
        "zero_optimization": {"stage": case.stage, "reduce_bucket_size": 1000},
        "optimizer": ours
        if optimizer == "ARSG"
        else {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
        **sections,
    }
    if case.precision != "fp32":
        config[case.precision] = {"enabled": True}
    if case.precision == "fp16":
        config["fp16"] |= {"initial_scale_power": 4 if who == "source" else 6, "loss_scale_window": 2}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=groups,
            config={key: section for key, section in config.items() if section is not None},
            lr_scheduler=None if "scheduler" in sections else lambda inner: ExponentialLR(inner, 0.5),
        )
    engine.warned = [str(warning.message) for warning in warned]
    return engine


def train(engine: Any, *updates: int) -> None:
    """Each update has an input of its own."""
    dtype = DTYPES["bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"]
    for update in updates:
        torch.manual_seed(update)
        if engine.has_moe_layers:
            loss = engine(torch.randn(8, 4).to(dtype)).float().square().mean()
        else:
            inputs = torch.tensor([SCALES[update], 0.0], dtype=dtype)
            if isinstance(engine.module, deepspeed.pipe.PipelineModule):
                engine.train_batch(iter([(inputs.requires_grad_(), torch.zeros(()))]))
                continue
            loss = engine(inputs)[1].float()
        engine.backward(loss)
        engine.step()


def snapshot(engine: Any) -> dict[str, Any]:
    """What an engine's further training depends on, read by DeepSpeed's own functions."""
    names: dict[Any, str] = {p: n for n, p in engine.module.named_parameters()}
    taken: dict[str, Any] = {}
    masters = _masters_of_stage_0(engine)
    sharded = engine.zero_optimization()
    for parameter, name in names.items():
        whole = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], enabled=whole):
            taken[f"weight {name}"] = parameter.detach().clone()
        if not parameter.requires_grad:
            continue
        master = masters.get(parameter)
        taken[f"master {name}"] = (
            safe_get_full_fp32_param(parameter) if sharded else master.detach()  # type: ignore[union-attr]
        ).clone()
        state = {} if master is None else engine.basic_optimizer.state.get(master, {})
        for key in MOMENTS:
            value = _state_of(parameter, key) if sharded else state.get(key)
            taken[f"{key} {name}"] = (
                None if value is None else value.detach().clone().view(parameter_shape(parameter))
            )
    for index, group in enumerate(engine.basic_optimizer.param_groups):
        taken |= {f"group {index} {key}": group[key] for key in ("lr", "betas", "mu", "eps") if key in group}
    for name, buffer in engine.module.named_buffers():
        taken[f"buffer {name}"] = buffer.clone()
    steps = [state.get("step") for state in engine.basic_optimizer.state.values()]
    taken["step"] = steps[0] if steps else None
    scaler = dynamic_scaler(engine.optimizer) if engine.fp16_enabled() else None
    taken["loss scale"] = None if scaler is None else (scaler.cur_scale, scaler.cur_iter)
    taken["counters"] = (engine.global_steps, engine.skipped_steps)
    taken["schedule"] = engine.lr_scheduler.state_dict() if engine.lr_scheduler else None
    return taken


def weights(taken: dict[str, Any]) -> dict[str, Any]:
    """Those of a snapshot."""
    return {key: value for key, value in taken.items() if key.startswith("weight")}


def parameter_shape(parameter: Any) -> torch.Size:
    """Whether it is partitioned or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _state_of(parameter: Any, key: str) -> Tensor | None:
    try:
        return safe_get_full_optimizer_state(parameter, key)
    except (ValueError, KeyError):  # the latter is DeepSpeed's own, of another optimizer
        return None


def _masters_of_stage_0(engine: Any) -> dict[Any, Tensor]:
    wrapper = engine.optimizer
    if isinstance(wrapper, FP16_UnfusedOptimizer):
        pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        return {
            copy: master for copies, masters in pairs for copy, master in zip(copies, masters, strict=True)
        }
    return {parameter: parameter for parameter in engine.module.parameters()}


def source_name(case: Case) -> str:
    """What a directory with the checkpoints that a case loads is called."""
    optimizer = "Adam" if case.source == "Adam" else "ARSG"
    return f"{case.model}-{case.stage}-{case.precision}-{optimizer}"


def save_source(case: Case, above: Path) -> Path:
    """Write checkpoints "older" and "newest", with what the engine was then beside them; collective."""
    directory = above / source_name(case)
    engine = build(case, "source", "Adam" if case.source == "Adam" else "ARSG")
    exclude = case.model == "excluded"
    snapshots: dict[str, dict[str, Any]] = {}
    done = 0
    for tag, updates in SAVED_AFTER.items():
        train(engine, *range(done, updates))
        done = updates
        engine.save_checkpoint(str(directory), tag=tag, exclude_frozen_parameters=exclude)
        snapshots[tag] = snapshot(engine)
    if deepspeed.comm.get_rank() == 0:
        torch.save(snapshots, directory / "snapshots.pt")
    engine.destroy()
    deepspeed.comm.barrier()
    return directory


def run(case: Case, source: Path) -> list[str]:
    """Load as the case says into an engine of other weights; name what is not as its rule says. Collective."""
    sections = {"checkpoint": {"load_universal": True}} if case.source == "universal" else {}
    directory = source
    if case.source == "universal":
        directory = source / "universal"
        said = _on_rank_0(lambda: _convert_each(source, directory))
        if said is not None:
            return _judge_refusal(case, said)
    load_dir: Path = directory
    tag: str | None = "older" if case.tag == "older" else None
    if case.tag == "no latest":
        load_dir = source / "empty"
        load_dir.mkdir(exist_ok=True)
    engine = build(case, "target", **sections)
    if case.stepped:
        train(engine, 4, 0)
    own = snapshot(engine)
    result: list[Any] = []

    def load() -> None:
        result.extend(engine.load_checkpoint(str(load_dir), tag, **case.options))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = _refusal(load)
    try:
        if rule_of(case).refusal is not None:
            return [*_judge_refusal(case, said), *differences(own, snapshot(engine))]
        if said is not None:
            return [f"raised {said}"]
        if rule_of(case) is RULES[1]:
            return [
                *differences(own, snapshot(engine)),
                *([] if result == [None, None] else [f"returned {result}"]),
            ]
        snapshots = torch.load(source / "snapshots.pt", weights_only=True)
        expected = expected_after(case, own, snapshots["older" if tag else "newest"])
        found = differences(expected, snapshot(engine))
        return found or after_one_update(engine, case, expected)
    finally:
        engine.destroy()


def _convert_each(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for tag in SAVED_AFTER:
        if not (target / tag).exists():
            convert(source / tag, target / tag)


def _on_rank_0(call: Callable[[], Any]) -> str | None:
    said = [_refusal(call) if deepspeed.comm.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(said, src=0)
    return said[0]


def _refusal(call: Callable[[], Any]) -> str | None:
    try:
        call()
    except Exception as error:  # the rule says which one is right
        return f"{type(error).__name__}: {error}"
    return None


def _judge_refusal(case: Case, said: str | None) -> list[str]:
    wanted = rule_of(case).refusal
    if said is None or wanted is None:
        return [f"refused with {said!r}, and the rule is {wanted!r}"]
    right = said.startswith("ValueError: ") and re.search(wanted, said, re.DOTALL)
    return [] if right else [f"refused with {said!r}"]


def expected_after(case: Case, own: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """What the rule says the engine must be."""
    expected = dict(own)
    without_masters = case.model == "pipeline" or (
        case.source == "Adam" and case.model == "moe" and case.stage > 0
    )
    as_computed = without_masters and not case.with_optimizer
    for key, value in saved.items():
        kind, _, name = key.partition(" ")
        if key not in own:
            continue
        if (
            kind in ("weight", "buffer")
            or (kind in (*MOMENTS, "step", "loss") and case.with_optimizer)
            or (kind == "group" and (case.with_optimizer or (name.endswith(" lr") and case.with_schedule)))
            or (kind == "schedule" and case.with_schedule)
            or (kind == "counters" and not case.load_module_only)
        ):
            expected[key] = value
        if kind == "master":
            expected[key] = saved[f"weight {name}"].float() if as_computed else value
    for key in [key for key in own if key.startswith("weight")]:
        name = key.removeprefix("weight ")
        if case.model == "excluded" and f"master {name}" not in own:
            expected[key] = own[key]
        elif f"master {name}" in own:
            expected[key] = expected[f"master {name}"].to(own[key].dtype)
        slow = own.get(f"slow_param {name}")
        if not case.with_optimizer and slow is not None:
            expected[f"slow_param {name}"] = expected[f"master {name}"]
    if case.with_optimizer and not case.with_schedule:
        for key in [key for key in own if key.startswith("group") and key.endswith(" lr")]:
            expected[key] = own[key]
    return expected


def differences(expected: dict[str, Any], actual: dict[str, Any]) -> list[str]:
    """What is not the same, bit by bit, and how."""
    found = [f"{key} is on one side only" for key in sorted(expected.keys() ^ actual.keys())]
    for key in [key for key in expected if key in actual]:
        wanted, got = expected[key], actual[key]
        both = isinstance(wanted, Tensor) and isinstance(got, Tensor)
        same = both and torch.equal(wanted.float(), got.float()) if both else _plain(wanted) == _plain(got)
        if not same:
            found.append(f"{key} is {_plain(got)} and should be {_plain(wanted)}")
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [round(number, 4) for number in value.flatten().tolist()[:8]]
    return list(value) if isinstance(value, tuple) else value


def after_one_update(engine: Any, case: Case, expected: dict[str, Any]) -> list[str]:
    """One more update, against plain torch's from what the rule says."""
    update = 3
    names = [name.removeprefix("master ") for name in expected if name.startswith("master ")]
    rates = [expected[f"group {i} lr"] for i in range(len(engine.basic_optimizer.param_groups))]
    train(engine, update)
    actual = snapshot(engine)
    found = []
    for index, rate in enumerate(rates):
        if actual[f"group {index} lr"] != rate / 2:
            found.append(f"lr after the update is {actual[f'group {index} lr']}, and was to be {rate}/2")
    if case.model == "moe":  # its gradient depends on the weights: near the loaded ones, and not there
        moved = [(actual[f"master {n}"] - expected[f"master {n}"]).abs().max().item() for n in names]
        if not 0 < max(moved) < 2:
            found.append(f"the update moved by {moved}")
        return found
    for name, weight in by_plain_torch(case, engine, expected, names, SCALES[update]).items():
        master = actual[f"master {name}"]
        if not torch.allclose(master, weight, rtol=1e-5, atol=1e-6):
            found.append(f"{name} is {_plain(master)} after an update, and should be {_plain(weight)}")
        copy = actual[f"weight {name}"]
        if not torch.equal(copy, master.to(copy.dtype)):
            found.append(f"{name} is not its master's copy after an update")
    return found


def by_plain_torch(
    case: Case, engine: Any, expected: dict[str, Any], names: list[str], scale: float
) -> dict[str, Tensor]:
    """The masters after one update of ARSG outside DeepSpeed."""
    slopes = {}
    for path, layer in engine.module.named_modules():
        if isinstance(layer, Slope):
            slopes[path] = layer.slope
    tied = {"0.weight": 0.25} if case.model == "tied" else {}
    groups: list[dict[str, Any]] = []
    weights = {name: nn.Parameter(expected[f"master {name}"].clone()) for name in names}
    for index, group_names in enumerate((names[:2], names[2:])):
        settings = {key: expected[f"group {index} {key}"] for key in ("lr", "betas", "mu", "eps")}
        groups.append({"params": [weights[name] for name in group_names], **settings})
    optimizer = ARSG(groups, lookahead_k=SETTINGS["lookahead_k"], foreach=False, fused=False)
    for name, weight in weights.items():
        weight.grad = torch.full_like(weight, scale * (slopes[name.rpartition(".")[0]] + tied.get(name, 0.0)))
        state = {key: expected[f"{key} {name}"] for key in MOMENTS}
        if state["exp_avg"] is not None:
            optimizer.state[weight] = {key: value.clone() for key, value in state.items()}
            optimizer.state[weight]["step"] = expected["step"]
    optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}
