"""Say what makes a checkpoint this run's, and name what differs at a resume.

A checkpoint holds the record that `identity_of` makes; `differences` compares it with that of the run that is to go on.
Only what both say is compared: checkpoints of earlier versions say less, and other engines have other settings.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Final

from arsg_dist.engine import Communicator, EngineBuilder
from arsg_dist.imagenet.config import TrainConfig
from arsg_dist.imagenet.data.dataset import Split
from arsg_dist.imagenet.data.decoding import Contents
from arsg_dist.imagenet.training.optimization import optimizer_settings
from arsg_dist.safe_io.text import printable

ALLOWED: Final = ("classes", "data", "loss", "optimizer", "engine_settings")
"""Kinds of difference that a flag `--allow_other_KIND` lets pass."""

OPTIMIZER: Final = "optimizer.params."


@dataclass(frozen=True)
class Difference:
    """Something that a checkpoint and the run that asks to go on from it do not have alike.

    Attributes:
        key: of the record.
        what: was and is, for the user.
        remedy: what to do.
        kind: of `ALLOWED`; "" for what no flag lets pass.
    """

    key: str
    what: str
    remedy: str
    kind: str = ""

    @property
    def text(self) -> str:
        """Return what a refusal says."""
        return f"{self.what}; {self.remedy}"


@dataclass(frozen=True)
class _Rule:
    why: str
    kind: str = ""


_RULES: Final = {
    "seed": _Rule("with another one images of this epoch would be seen twice or never"),
    "batch_size": _Rule(
        "schedules count its updates (accumulation_steps and the number of ranks may change)"
    ),
    "num_classes": _Rule("the network has one output for each class"),
    "model": _Rule("the checkpoint holds the weights of that network"),
    "zero_init_gamma": _Rule("its weights began so"),
    "label_smoothing": _Rule("the loss would be another one", "loss"),
    "data.mixup": _Rule("the loss would be another one", "loss"),
    "data.cutmix": _Rule("the loss would be another one", "loss"),
    "optimizer.type": _Rule("the checkpoint holds the state of that optimizer"),
    "optimizer.decay_norm_and_bias": _Rule("the optimizer's groups would be others"),
    OPTIMIZER: _Rule("updates would be others", "optimizer"),
    "precision": _Rule("forward and backward passes would round otherwise", "engine_settings"),
    "clip_grad_norm": _Rule("updates would be others", "engine_settings"),
    "engine_options.": _Rule("the engine would compute otherwise", "engine_settings"),
    "deepspeed.": _Rule("DeepSpeed would compute otherwise", "engine_settings"),
}
"""Key of the record, or how it begins → what is wrong with a difference."""
_NUMBERS: Final = (
    *("lr", "mu", "betas", "eps", "weight_decay", "alpha", "dampening", "lookahead_alpha"),
    *("remote_mu", "remote_beta1", "remote_cautious_weight_decay"),
)
_FILES: Final = {"train_files": "training", "val_files": "validation"}


def identity_of(
    config: TrainConfig, builder: EngineBuilder, train: Split, val: Split, communicator: Communicator
) -> dict[str, Any]:
    """Record what makes the checkpoints of a run its own, in what JSON has. Collective.

    Every rank looks at a share of the files.
    """
    mine = [split.contents(communicator.rank, communicator.world_size) for split in (train, val)]
    shares = communicator.all_gather_object([(c.images, c.size, f"{c.digest:032x}") for c in mine])
    files = {}
    for index, key in enumerate(_FILES):
        found = [share[index] for share in shares]
        total = sum((Contents(count, size, int(digest, 16)) for count, size, digest in found), Contents())
        files[key] = {"images": total.images, "bytes": total.size, "digest": f"{total.digest:032x}"}
    return {
        **{name: getattr(config, name) for name in ("seed", "batch_size", "model", "zero_init_gamma")},
        "num_classes": len(train.classes),
        "classes": hashlib.sha256("\n".join(train.classes).encode()).hexdigest(),
        **files,
        "label_smoothing": config.label_smoothing,
        "data.mixup": config.data.mixup,
        "data.cutmix": config.data.cutmix,
        "optimizer.type": config.optimizer.type,
        "optimizer.decay_norm_and_bias": config.optimizer.decay_norm_and_bias,
        **{f"{OPTIMIZER}{name}": value for name, value in optimizer_settings(config.optimizer).items()},
        "clip_grad_norm": config.clip_grad_norm,
        **builder.numeric_settings(),
    }


def differences(saved: Any, now: dict[str, Any]) -> list[Difference]:
    """Name what differs between the record of a checkpoint, perhaps somebody else's, and that of this run.

    Raises:
        ValueError: the checkpoint's is no record.
    """
    if not isinstance(saved, dict):
        raise ValueError("the checkpoint's record of what made it is none")
    found = []
    for key, value in now.items():
        if key not in saved or saved[key] == value:
            continue
        if key in _FILES:
            found.append(_of_files(key, saved[key], value))
        elif key == "classes":
            what = "the names of the classes or their order are not those of the run, and labels would mean others"
            found.append(
                Difference(
                    key, what, f"give the directories their names back, or {_let('classes')}", "classes"
                )
            )
        else:
            found.append(_of_setting(key, saved[key], value))
    if any(difference.key == "num_classes" for difference in found):
        found = [difference for difference in found if difference.key != "classes"]
    return found


def _of_setting(key: str, before: Any, now: Any) -> Difference:
    rule = next(
        rule for name, rule in _RULES.items() if key == name or (name[-1] == "." and key.startswith(name))
    )
    shown = _shown(before)
    what = f"this run was made with {key}={shown}, not {_shown(now)}, and {rule.why}"
    if key == "num_classes":
        return Difference(key, what, "start a new run in another --output")
    kind = rule.kind
    if key.startswith(OPTIMIZER) and not _fits_any_state(key.removeprefix(OPTIMIZER), before):
        kind = ""
    back = f"give {key.removeprefix('deepspeed.')} its value back in the DeepSpeed config"
    if not key.startswith("deepspeed."):
        back = f"resume with --{key} {shown}"
    return Difference(key, what, f"{back}, or {_let(kind)}", kind)


def _fits_any_state(name: str, before: Any) -> bool:
    """Tell whether a setting of an optimizer may change while its state stays."""
    # Without momentum there is no buffer of it.
    return name in _NUMBERS or (name == "momentum" and bool(before))


def _of_files(key: str, before: Any, now: dict[str, Any]) -> Difference:
    then = before if isinstance(before, dict) else {}
    same = all(then.get(name) == now[name] for name in ("images", "bytes"))
    what = (
        f"the {_FILES[key]} split had {_shown(then.get('images'))} images of {_shown(then.get('bytes'))} bytes and has "
        f"{now['images']} of {now['bytes']} now{', with other names or sizes' if same else ''}"
    )
    if key == "train_files" and then.get("images") != now["images"]:
        what += ": the order of images cannot be continued"
        return Difference(key, what, "put them back, or start a new run in another --output")
    return Difference(key, what, f"put them back, or {_let('data')}", "data")


def _let(kind: str) -> str:
    if not kind:
        return "start a new run in another --output"
    return f"go on with what is there now by --allow_other_{kind}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return printable(value, limit=100)
