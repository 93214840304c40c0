"""Read site profiles: files of settings, each with the page that says so."""

import tomllib
from dataclasses import dataclass, field
from importlib.resources import files

_KEYS = ("environment", "slurm", "pbs", "mpiexec", "cores_per_rank", "source")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a site or network wants.

    Attributes:
        environment: variables of every rank.
        slurm: options of sbatch.
        pbs: resources of qsub's -l.
        mpiexec: options of the PBS mpiexec.
        cores_per_rank: for PBS; 0 if nothing is said.
        sources: setting → where it is documented.
    """

    environment: dict[str, str] = field(default_factory=dict)
    slurm: tuple[str, ...] = ()
    pbs: tuple[str, ...] = ()
    mpiexec: tuple[str, ...] = ()
    cores_per_rank: int = 0
    sources: dict[str, str] = field(default_factory=dict)


def profile_names() -> list[str]:
    """Name the profiles that come with the package."""
    folder = files("arsg_dist.cli.launch") / "profiles"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def load_profile(name: str | None) -> Profile:
    """Read a profile; None is the empty one.

    Raises:
        ValueError: there is no such profile.
    """
    if name is None:
        return Profile()
    if name not in profile_names():
        raise ValueError(f"--profile {name} is not known; there are {', '.join(profile_names())}")
    content = tomllib.loads((files("arsg_dist.cli.launch") / "profiles" / f"{name}.toml").read_text())
    environment: dict[str, str] = {}
    options: dict[str, list[str]] = {"slurm": [], "pbs": [], "mpiexec": []}
    sources = {}
    cores_per_rank = 0
    for setting in content["setting"]:
        assert set(setting) <= set(_KEYS), f"{name}.toml: {sorted(setting)}"
        environment |= setting.get("environment", {})
        for key, values in options.items():
            values += setting.get(key, [])
        cores_per_rank = setting.get("cores_per_rank", cores_per_rank)
        for key in setting.keys() - {"source"}:
            shown = str(setting[key]) if isinstance(setting[key], int) else " ".join(setting[key])
            sources[f"{key}: {shown}"] = setting["source"]
    return Profile(
        environment=environment,
        sources=sources,
        cores_per_rank=cores_per_rank,
        **{key: tuple(values) for key, values in options.items()},
    )
