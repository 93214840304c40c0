"""Read recipes and flags: plain data becomes a run's typed settings, no more.

A recipe may be written by anybody. Its keys are the fields of `TrainConfig` and `StartConfig`, its values numbers,
booleans, text, null and lists of them: there is no key that names a class, a module or another file.
"""

import argparse
import ast
import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from arsg_dist.imagenet.config import Must, Section, TrainConfig, check_parameter
from arsg_dist.imagenet.named_recipes import recipe_path
from arsg_dist.safe_io.documents import dump_yaml, parse_yaml, read_yaml
from arsg_dist.safe_io.text import printable

_Made = TypeVar("_Made")
_LARGEST = 1 << 16
"""Bytes of a recipe; PyYAML takes seconds for as many, and a recipe has a thousand."""


@dataclass(kw_only=True)
class StartConfig(Section):
    """This start of a run."""

    engine: str = "auto"
    """auto, deepspeed, ddp, fsdp, horovod, horovod-sharded or single."""
    deepspeed_config: str | None = None
    """DeepSpeed JSON config; implies the engine deepspeed."""
    output: str | None = None
    """directory of the run; null: runs/MODEL-ENGINE-TIME."""
    resume: Literal[False, True, "auto"] = False
    """continue the run in --output from its last checkpoint; "auto": continue it where there is a complete checkpoint,
    and start where there is none: for a command that is given again and again."""
    skip_damaged: bool = False
    """with --resume: if the last checkpoint is damaged, continue from the newest one that is not. "auto" does so by
    itself."""
    allow_other_classes: bool = False
    """with --resume: go on though the classes have other names or another order."""
    allow_other_data: bool = False
    """with --resume: go on though files of the data have other names or sizes."""
    allow_other_loss: bool = False
    """with --resume: go on with another label_smoothing, data.mixup or data.cutmix."""
    allow_other_optimizer: bool = False
    """with --resume: go on with other numbers in optimizer.params."""
    allow_other_engine_settings: bool = False
    """with --resume: go on with another precision, clip_grad_norm or setting of DeepSpeed's that changes numbers."""
    max_updates: Annotated[int | None, Must("at least 1", lambda value: value is None or value >= 1)] = None
    """end after this many weight updates, also inside an epoch, with a checkpoint if there is none yet: for trying a
    recipe out."""
    local_rank: int | None = None
    """passed by the deepspeed launcher; the environment is used."""


@dataclass(kw_only=True)
class Settings(TrainConfig, StartConfig):
    """Everything that recipes and flags say: `StartConfig` and `TrainConfig`."""

    def training(self) -> TrainConfig:
        """Return the settings of the training alone."""
        return TrainConfig(**{name: getattr(self, name) for name in TrainConfig.__dataclass_fields__})


_FLAGS_ONLY = (
    *("engine", "deepspeed_config", "resume", "skip_damaged", "local_rank", "allow_other_classes"),
    *("allow_other_data", "allow_other_loss", "allow_other_optimizer", "allow_other_engine_settings"),
)


def read_arguments(arguments: list[str]) -> Settings:
    """Read the arguments of `arsg-imagenet train`, of which later ones win.

    Raises:
        ValueError: an unknown flag or key, a value of another kind or out of range, or a recipe that is not plain
            YAML; the message names the key, and the file that holds it.
        SystemExit: help was asked for, and has been shown.
    """
    return _made(Settings, _given(_parse(arguments)))


def resolved(arguments: list[str]) -> str:
    """Return the settings of the arguments as a recipe, for `--print-config`.

    Raises:
        ValueError, SystemExit: as `read_arguments`.
    """
    options = _parse(arguments)
    defaults, shown = asdict(Settings()), asdict(_made(Settings, _given(options)))
    for keep in filter(None, (options.print_config or "").split(",")):
        if keep not in _KEPT:
            raise ValueError(f"--print-config={keep} is not known; there are {', '.join(_KEPT)}")
        shown = _pruned(shown, defaults, _KEPT[keep])
    return dump_yaml(shown)


_KEPT: dict[str, Callable[[Any, Any], bool]] = {
    "skip_default": lambda value, default: value != default,
    "skip_unset": lambda value, default: value is not None,
}


def add_setting_flags(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Declare `--config` and flags of a training's settings, for a program that needs some of them.

    Args:
        parser: to declare them on.
        names: of the settings, with dots.
    """
    parser.set_defaults(given=[])
    parser.add_argument(
        "--config", action=_Give, help="recipe: a YAML file; what only training needs is left aside"
    )
    _add_flags(parser, TrainConfig, "", frozenset(names))


def settings_from(options: argparse.Namespace, beneath: dict[Any, Any], where: str) -> TrainConfig:
    """Make a training's settings of the flags of `add_setting_flags`, which win, and those of a run.

    Args:
        options: what was parsed.
        beneath: settings of a run, from outside; other keys than a recipe's are of its start.
        where: they are from, for messages.

    Raises:
        ValueError: as `read_arguments`.
    """
    settings: dict[str, Any] = {}
    known = {name: value for name, value in beneath.items() if name in TrainConfig.__dataclass_fields__}
    try:
        _assign(settings, TrainConfig, known, "")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return _made(Settings, _given(options, settings)).training()


class Parser(argparse.ArgumentParser):
    """Parse a command's arguments; what is wrong with them is a ValueError."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(message)


class _Give(argparse.Action):
    """Note a flag and its text, in the order of the command line."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.given.append(((option_string or "").removeprefix("--"), values))


_PARAMETERS = ("optimizer.params.", "engine_options.")
"""Beginnings of flags of which another knows the names."""


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="arsg-imagenet train",
        description="Trains an image classifier. Run it alone, under deepspeed, or under horovodrun or mpirun.",
    )
    parser.set_defaults(given=[])
    parser.add_argument(
        "--config",
        action=_Give,
        metavar="RECIPE",
        help="a YAML file with any of the settings below, or the name of one that arsg-imagenet recipes lists",
    )
    parser.add_argument(
        "--print-config",
        "--print_config",
        nargs="?",
        const="",
        metavar=",".join(_KEPT),
        help="show the settings that all arguments make and end",
    )
    parser.add_argument(
        "--print-plan",
        "--print_plan",
        action="store_true",
        help="show which parts of the network the engine gathers one by one, and end",
    )
    _add_flags(parser, StartConfig, "")
    _add_flags(parser, TrainConfig, "")
    open_ended = tuple(f"--{name}" for name in _PARAMETERS)
    named = {argument.partition("=")[0] for argument in arguments if argument.startswith(open_ended)}
    for flag in sorted(named):  # any name: the optimizer and the engine know their own
        parser.add_argument(flag, action=_Give, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _add_flags(
    parser: argparse.ArgumentParser, section: type, prefix: str, only: frozenset[str] | None = None
) -> None:
    documentation = _documentation(section)
    group = parser.add_argument_group(documentation[""])
    if prefix and only is None:
        group.add_argument(
            f"--{prefix[:-1]}", action=_Give, metavar="SETTINGS", help="a mapping, or a YAML file of it"
        )
    inner: list[tuple[Any, str]] = []
    for name, kind in get_type_hints(section).items():
        if is_dataclass(kind):
            inner.append((kind, f"{prefix}{name}."))
            continue
        if only is not None and f"{prefix}{name}" not in only:
            continue
        default = getattr(section, name, None)
        flags = [f"--{prefix}{name}"] + ([f"--{prefix}{name}+"] if get_origin(kind) is list else [])
        text = documentation.get(name, "") + ("" if default is None else f" (default: {default})")
        switch = kind is bool or (get_origin(kind) is Literal and True in get_args(kind))
        options: dict[str, Any] = {"nargs": "?", "const": "true"} if switch else {}
        metavar = "{true,false}" if kind is bool else name.upper()
        if get_origin(kind) is Literal:
            metavar = f"{{{','.join(map(_word, get_args(kind)))}}}"
        group.add_argument(*flags, action=_Give, metavar=metavar, help=text.replace("%", "%%"), **options)
    for kind, inner_prefix in inner:
        if only is None or any(name.startswith(inner_prefix) for name in only):
            _add_flags(parser, kind, inner_prefix, only)


@cache
def _documentation(section: type) -> dict[str, str]:
    """Read the string below each field in the source; "" → what the section is."""
    found = {"": (inspect.getdoc(section) or section.__name__).partition("\n")[0].rstrip(".")}
    try:
        (body,) = (
            node.body
            for node in ast.parse(inspect.getsource(inspect.getmodule(section) or section)).body
            if isinstance(node, ast.ClassDef) and node.name == section.__name__
        )
    except OSError:  # installed without it
        return found
    for field, below in pairwise(body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found


def _given(options: argparse.Namespace, beneath: dict[str, Any] | None = None) -> dict[str, Any]:
    """Collect what recipes and flags say, typed and nested as the settings are; they win over those beneath."""
    settings: dict[str, Any] = beneath or {}
    for name, text in options.given:
        if name == "config":
            content = _read(Path("/dev/stdin") if text == "-" else recipe_path(text))
            try:
                _require_recipe(content)
                _assign(settings, Settings, content, "")
            except ValueError as error:
                raise ValueError(f"recipe {text}: {error}") from None
        else:
            _assign(settings, Settings, {name: _value_of_flag(name, text)}, "")
    return settings


def _require_recipe(content: Any) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"it must be a mapping of settings, not {_shown(content)}")
    start = StartConfig()
    for name in _FLAGS_ONLY:
        if name in content and content[name] != getattr(start, name):
            raise ValueError(f"{name} has no place in a recipe: give --{name}")


def _read(path: Path) -> Any:
    try:
        return read_yaml(path, limit=_LARGEST, follow=True, pipe=True)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _value_of_flag(name: str, text: str) -> Any:
    """Read a section's flag, a mapping or a file with one; leave others as text."""
    if name.startswith(_PARAMETERS):
        return parse_yaml(text, f"--{name}")
    kind: Any = Settings
    for step in name.rstrip("+").split("."):
        kind = get_type_hints(kind)[step]
    if not is_dataclass(kind):
        return text
    content = parse_yaml(text, f"--{name}")
    return _read(Path(text)) if isinstance(content, str) else content


def _assign(settings: dict[str, Any], section: Any, content: Any, prefix: str) -> None:
    """Put what `content` says into `settings`, typed.

    Args:
        settings: what was said before, nested as `section` is; changed in place.
        section: a dataclass.
        content: from outside; a key may have dots, for the settings of inner sections.
        prefix: of the keys, for messages.

    Raises:
        ValueError: a key that is no setting, or a value of another kind.
    """
    if not isinstance(content, dict):
        raise ValueError(
            f"{prefix[:-1]} must be a mapping of its settings, or left out, not {_shown(content)}"
        )
    kinds = get_type_hints(section)
    for key, value in content.items():
        name, dot, rest = str(key).partition(".")
        adds, name = name.endswith("+"), name.removesuffix("+")
        kind = kinds.get(name)
        origin = get_origin(kind)
        if is_dataclass(kind):
            inner = {rest: value} if dot else value
            _assign(settings.setdefault(name, {}), kind, inner, f"{prefix}{name}.")
        elif dot and origin is dict:
            settings[name] = {**settings.get(name, {}), rest: check_parameter(value, f"{prefix}{key}")}
        elif kind is None or dot or (adds and origin is not list):
            raise ValueError(_unknown(str(key), kinds, prefix))
        elif adds:
            value = parse_yaml(value, prefix + name) if isinstance(value, str) else value
            more = _typed(kind, value if isinstance(value, list) else [value], prefix + name)
            settings[name] = [*settings.get(name, []), *more]
        else:
            settings[name] = _typed(kind, value, prefix + name)


def _typed(kind: Any, value: Any, name: str) -> Any:
    """Return the value as one of a kind; text of other kinds is read as YAML.

    Raises:
        ValueError: it is of another kind.
    """
    origin, choices = get_origin(kind), get_args(kind)
    if origin is UnionType:  # X | None
        return None if value is None or value == "null" else _typed(choices[0], value, name)
    if value is None:
        raise ValueError(f"{name} must not be null")
    if origin is Literal:
        known = {_word(choice): choice for choice in choices}
        if not isinstance(value, str | bool) or _word(value) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {_shown(value)}")
        return known[_word(value)]
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text, not {_shown(value)}: put it in quotes if it is meant so")
        return check_parameter(value, name)
    if isinstance(value, str):
        value = parse_yaml(value, name)
    if origin is list and isinstance(value, list):
        return [_typed(choices[0], item, f"an item of {name}") for item in value]
    if origin is dict and isinstance(value, dict):
        return {str(key): check_parameter(item, f"{name}.{key}") for key, item in value.items()}
    check_parameter(value, name)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{name} must be {_WORDS[origin or kind]}, not {_shown(value)}")
    return value


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "a mapping"}


def _word(choice: str | bool) -> str:
    """Return a choice as flags and YAML have it."""
    return str(choice).lower() if isinstance(choice, bool) else choice


def _unknown(key: str, known: Iterable[str], prefix: str) -> str:
    near = difflib.get_close_matches(key[:100], known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    return f"there is no setting {printable(prefix + key, limit=100)}; {hint}"


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return "null" if value is None else printable(repr(value), limit=100)


def _made(section: type[_Made], given: dict[str, Any]) -> _Made:
    """Return a dataclass with these values and its defaults for the others."""
    kinds = get_type_hints(section)
    made = {
        name: _made(kinds[name], value) if is_dataclass(kinds[name]) else value
        for name, value in given.items()
    }
    return section(**made)


def _pruned(
    settings: dict[str, Any], defaults: dict[str, Any], keep: Callable[[Any, Any], bool]
) -> dict[str, Any]:
    pruned = {}
    for name, value in settings.items():
        default = defaults[name]
        if isinstance(default, dict) and default:  # a section, while the optimizer's parameters are one value
            if inner := _pruned(value, default, keep):
                pruned[name] = inner
        elif keep(value, default):
            pruned[name] = value
    return pruned
