"""Version and the compiled kernels for CPUs (everything else is declared in pyproject.toml)."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = Path("arsg_dist/optim/kernels/csrc")


class PlainLibrary(build_ext):
    """Builds a shared library that ctypes loads: it knows neither Python nor torch, so its name says neither."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the file."""
        return str(Path(*fullname.split("."))) + ".so"


class WheelForEveryPython(bdist_wheel):
    """Names the wheel by its platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        """Name Python, its ABI and the platform."""
        return ("py3", "none", super().get_tag()[2])


kernels = Extension(
    "arsg_dist.optim.kernels.arsg_cpu",
    sorted(map(str, CSRC.glob("*.cpp"))),
    depends=sorted(map(str, CSRC.glob("*.h"))),
    # No -march: the sources are multi-versioned. No contraction: same bits on every CPU. No OpenMP: the threads are
    # those of the runtime that torch has loaded (parallel.h). Nothing of C++'s library is used, so none is linked.
    extra_compile_args=[
        "-O3",
        "-std=c++20",
        "-fno-exceptions",
        "-fno-rtti",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-g0",
    ],
    extra_link_args=["-Wl,--as-needed"],
    # Without a compiler the package is installed without its kernels: the optimizer takes its foreach path and says so.
    optional=True,
)

setup(
    version="0.1.0",
    ext_modules=[kernels],
    cmdclass={"build_ext": PlainLibrary, "bdist_wheel": WheelForEveryPython},
)
