"""Version and the optional CPU kernel (everything else is declared in pyproject.toml)."""

import warnings
from typing import Any

from setuptools import setup

BUILD_OPTIONS: dict[str, Any] = {}
try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    warnings.warn(
        "torch is not importable while building: arsg-dist is installed without its CPU kernel. "
        "Install torch first, then `pip install --no-build-isolation`.",
        stacklevel=1,
    )
else:

    class OptionalBuildExtension(BuildExtension):
        """Builds the CPU kernel, or installs without it: the optimizer then takes its foreach path."""

        def run(self) -> None:
            """Build all extensions; an error becomes a warning."""
            try:
                super().run()
            except Exception as error:
                warnings.warn(f"arsg-dist is installed without its CPU kernel: {error}", stacklevel=1)

    BUILD_OPTIONS = {
        "ext_modules": [
            CppExtension(
                "arsg_dist._C",
                ["arsg_dist/optim/kernels/csrc/fused_cpu.cpp"],
                # No -march: the source is multi-versioned. No contraction: same bits on every CPU. OpenMP's
                # runtime is not linked: torch has loaded the one that torch.set_num_threads governs.
                extra_compile_args=[
                    "-O3",
                    "-std=c++20",
                    "-fopenmp",
                    "-fno-math-errno",
                    "-fno-trapping-math",
                    "-ffp-contract=off",
                    "-fvisibility=hidden",
                    "-g0",
                ],
                py_limited_api=True,
            )
        ],
        "cmdclass": {"build_ext": OptionalBuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }

setup(version="0.1.0", **BUILD_OPTIONS)
