"""The defects: settings of a script that shows it, and what a report says."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).with_name("script.py").read_text()
_OFFLOADED = {"offload_optimizer": {"device": "cpu"}}


@dataclass(frozen=True)
class Defect:
    """A defect of DeepSpeed.

    Attributes:
        title: of a report.
        says: what happens, and why.
        where: the function that does it.
        remedy: what would mend it.
        stage: of ZeRO.
        shown: the weights that the newest DeepSpeed that has it ends with (several defects may meet in older ones), one
            of each parameter; all of its elements are alike.
        right: those of one process.
        updates: for each update its micro-batches, for each of these each parameter's gradient; None: not used.
        adamw: settings of AdamW.
        config: of DeepSpeed, beside the stage.
        zero: options beside the stage.
        since: first version that had it, as far as was looked (0.18.0).
        until: last one; default the newest.
        ranks: how many it takes to see it.
        close: how far the right weights may be from those of one process, in half precision.
    """

    title: str
    says: str
    where: str
    remedy: str
    stage: int
    shown: list[float]
    right: list[float]
    updates: list[list[tuple[float | None, ...]]]
    adamw: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    since: str = "0.18.0"
    until: str | None = None
    ranks: int = 1
    close: float = 0.002

    def script(self) -> str:
        """The whole script, which needs DeepSpeed and torch only."""
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": len(self.updates[0]),
            "gradient_clipping": 0.0,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": 1000, **self.zero},
            **self.config,
        }
        settings = {"lr": 0.1, "weight_decay": 0.0, **self.adamw}
        before, rest = _SCRIPT.split("# --- the settings")
        after = rest.split("# --- up to here\n")[1]
        listed = "".join(f"    {update},\n" for update in self.updates)
        return (
            before.split('"""\n', 2)[-1].lstrip()
            + "".join(["CONFIG = {\n", *(f"    {key!r}: {value},\n" for key, value in config.items()), "}\n"])
            + f"ADAMW = {settings}\n"
            + "# Updates of micro-batches of one gradient for each parameter; None: the parameter is not used.\n"
            + f"UPDATES = [\n{listed}]\n"
            + after
        ).replace("'", '"')


_FP16 = {"enabled": True, "initial_scale_power": 7, "loss_scale_window": 2, "hysteresis": 1}

DEFECTS = {
    "first-step": Defect(
        title="Stage 0 in bf16 and fp16 makes an optimizer step before training",
        says="To have the optimizer allocate its state, the wrapper calls its `step` with zero gradients. With "
        "weight decay that moves the fp32 weights before any data was seen, and it counts: the first real update is "
        "corrected for bias as if it were the second.",
        where="FP16_UnfusedOptimizer.initialize_optimizer_states (runtime/fp16/unfused_optimizer.py)",
        remedy="Leave the state to the first step, which makes it; or put parameters and state back after that one.",
        stage=0,
        shown=[0.734],
        right=[0.8],
        updates=[[(1.0,)]],
        adamw={"weight_decay": 1.0},
        config={"bf16": {"enabled": True}},
        close=0.01,
    ),
    "loss-not-scaled": Defect(
        title="Stage 0 in fp16 divides gradients by a loss scale that the loss was never multiplied with",
        says="`engine.backward` scales the loss for optimizers that are `ZeROOptimizer`s only. "
        "`FP16_UnfusedOptimizer` is none, and its step divides by the scale all the same: gradients are too small by "
        "the factor of the scale, and small ones vanish in fp16, which the scale was to prevent. Adam with a tiny eps "
        "hides it.",
        where="DeepSpeedEngine.backward (runtime/engine.py)",
        remedy="Call the wrapper's own `backward`, or scale the loss for it, too (also in `engine.scale`).",
        stage=0,
        shown=[0.999],
        right=[0.9],
        updates=[[(1.0,)], [(1.0,)]],
        adamw={"eps": 1.0, "betas": (0.0, 0.0)},  # else the first step would show, too
        config={"fp16": {"enabled": True, "loss_scale": 128}},
        since="0.18.3",
    ),
    "grown-scale": Defect(
        title="fp16: the gradient of the update in which the loss scale grows is halved",
        says="`step` updates the scale before it divides the gradient by it. Where it grows, the gradient was made "
        "with the old scale and is divided by the new one, twice as large.",
        where="step of DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3 "
        "and FP16_UnfusedOptimizer, by _update_scale",
        remedy="Divide by the scale that the loss was multiplied with, and let it grow after the update.",
        stage=1,
        shown=[0.768],
        right=[0.75],
        updates=[[(1.0,)]] * 5,
        adamw={"eps": 1.0},
        config={"fp16": _FP16},
    ),
    "stage-2-last-only": Defect(
        title="Stage 2 with accumulation: of an update's micro-batches only the last one counts",
        says="The sums of the micro-batches so far are in `all_grad_tensors`. Whether there are any is asked of "
        "`averaged_gradients`, which is filled after the last micro-batch: each one begins the sums anew.",
        where="DeepSpeedZeroOptimizer.independent_gradient_partition_epilogue (runtime/zero/stage_1_and_2.py)",
        remedy="Ask `all_grad_tensors`, as DeepSpeed does from 0.18.3 on.",
        stage=2,
        shown=[0.967],
        right=[0.929],
        updates=[[(4.0,), (1.0,)]],
        adamw={"eps": 1.0},
        until="0.18.2",
    ),
    "overlap-left-out": Defect(
        title="Stage 1 with overlap_comm and accumulation: gradients of parameters that the last micro-batch does "
        "not use are not averaged over the ranks",
        says="With overlap_comm gradients are reduced by the hooks of the last micro-batch's backward pass. A "
        "parameter that only earlier micro-batches used has no hook called there: its gradient is not reduced, and "
        "each rank updates its partition with its own.",
        where="DeepSpeedZeroOptimizer.reduce_gradients (runtime/zero/stage_1_and_2.py)",
        remedy="Reduce what was not reduced, at the end of the last backward pass, as without overlap_comm.",
        stage=1,
        zero={"overlap_comm": True},
        shown=[0.95, 0.96],
        right=[0.95, 0.967],
        updates=[[(1.0, 1.0), (1.0, None)]],
        adamw={"eps": 1.0},
        ranks=2,
    ),
    "offload-older-sum": Defect(
        title="Stages 1 and 2, optimizer offloaded, accumulation: a parameter first used in a later micro-batch gets "
        "the sum of the update before on top",
        says="The sum in CPU memory is begun anew in the first micro-batch only, for the parameters that it uses. Of "
        "any other, the first gradient is added to what the update before left there.",
        where="DeepSpeedZeroOptimizer.async_accumulate_grad_in_cpu_via_gpu (runtime/zero/stage_1_and_2.py)",
        remedy="Begin a parameter's sum with its first gradient of an update.",
        stage=2,
        zero=_OFFLOADED,
        shown=[0.9, 0.839],
        right=[0.9, 0.864],
        updates=[[(1.0, 4.0), (1.0, 4.0)], [(1.0, None), (1.0, 1.0)]],
        adamw={"eps": 1.0},
    ),
    "offload-middle-lost": Defect(
        title="Stage 2, optimizer offloaded, three and more micro-batches: those between the first and the last "
        "are lost",
        says="From the second micro-batch on the sum in CPU memory is added to the gradient, and not written back.",
        where="DeepSpeedZeroOptimizer.async_accumulate_grad_in_cpu_via_gpu (runtime/zero/stage_1_and_2.py)",
        remedy="Write the sum back after each micro-batch, as DeepSpeed does from 0.19.0 on.",
        stage=2,
        zero=_OFFLOADED,
        shown=[0.96],
        right=[0.933],
        updates=[[(1.0,), (4.0,), (1.0,)]],
        adamw={"eps": 1.0},
        until="0.18.9",
    ),
    "offload-unused": Defect(
        title="Stages 1 and 2, optimizer offloaded: a parameter that an update does not use is updated with its "
        "older gradient, and one that the last micro-batch does not use loses its gradient",
        says="The gradients that `step` uses are written by the hooks of the last micro-batch only. Where there is "
        "none, the place keeps the gradient of an update before, infinite after an overflow.",
        where="DeepSpeedZeroOptimizer.copy_grads_in_partition (runtime/zero/stage_1_and_2.py)",
        remedy="Before the step write the sums of parameters that have one and zero for those that have none.",
        stage=2,
        zero=_OFFLOADED,
        shown=[0.9, 0.84, 0.84],
        right=[0.9, 0.87, 0.864],
        updates=[[(1.0, 4.0, 4.0), (1.0, 4.0, 4.0)], [(1.0, None, 1.0), (1.0, None, None)]],
        adamw={"eps": 1.0},
    ),
    "older-gradient": Defect(
        title="Stage 3: a parameter that an update does not use is updated with its older gradient",
        says="The buffer of gradients is overwritten where the backward pass reaches a parameter, and never cleared. "
        "Any other is updated with the gradient of an update before; after an overflow its infinite one makes the "
        "next update be skipped, too.",
        where="DeepSpeedZeroOptimizer_Stage3.step (runtime/zero/stage3.py)",
        remedy="Clear the buffer of gradients after the step.",
        stage=3,
        shown=[0.9, 0.84],
        right=[0.9, 0.87],
        updates=[[(1.0, 4.0)], [(1.0, None)]],
        adamw={"eps": 1.0},
    ),
    "offload-unused-stage-3": Defect(
        title="Stage 3, optimizer offloaded: a parameter that an update does not use is updated with its older "
        "gradient, and one that the last micro-batch does not use loses its gradient",
        says="As at stages 1 and 2: the gradients that `step` uses are written for parameters that the last "
        "micro-batch reaches only.",
        where="DeepSpeedZeroOptimizer_Stage3.partition_grads (runtime/zero/stage3.py)",
        remedy="Before the step write the gradients of all parameters, and clear their buffer after it.",
        stage=3,
        zero=_OFFLOADED,
        shown=[0.9, 0.84, 0.84],
        right=[0.9, 0.87, 0.864],
        updates=[[(1.0, 4.0, 4.0), (1.0, 4.0, 4.0)], [(1.0, None, 1.0), (1.0, None, None)]],
        adamw={"eps": 1.0},
    ),
}
