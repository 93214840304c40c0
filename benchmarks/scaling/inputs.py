"""What the scaling model is asked about: clusters that nobody here has run on, and models with their compute time.

Every figure is somebody else's, named in `source`, or an assumption and says so.
"""

from __future__ import annotations

import torch

from benchmarks.common.workloads import resnet50
from benchmarks.scaling.collectives import Cluster, Link
from benchmarks.scaling.traffic import Load

_EFFICIENCY = 0.8
"""Assumed share of the nominal bandwidths that a collective reaches."""
_LATENCIES = (3.4e-6, 14e-6)
"""Seconds per hop over NVLink and over the network, ring, Simple protocol: NCCL's src/graph/tuning.cc (hwLat)."""

CLUSTERS = {
    "hgx-h100": Cluster(
        ranks_per_node=8,
        inside=Link(_LATENCIES[0], _EFFICIENCY * 450e9),
        between=Link(_LATENCIES[1], _EFFICIENCY * 8 * 50e9),
        trees=True,
        memory=80e9,
        memory_bandwidth=0.9 * 3.35e12,
        source="NVLink 4: 900 GB/s both ways; 8 adapters of 400 Gbit/s (system descriptions of MLPerf, "
        "github.com/mlcommons/inference_results_v4.1, closed/NVIDIA); HBM3 3.35 TB/s; 80 % reached: an assumption",
    ),
    "dgx-a100": Cluster(
        ranks_per_node=8,
        inside=Link(_LATENCIES[0], _EFFICIENCY * 300e9),
        between=Link(_LATENCIES[1], _EFFICIENCY * 8 * 25e9),
        trees=True,
        memory=80e9,
        memory_bandwidth=0.9 * 2.0e12,
        source="NVLink 3: 600 GB/s both ways; 8 adapters of 200 Gbit/s; 80 % reached: an assumption",
    ),
}


def _llama_7b() -> tuple[int, ...]:
    width, hidden, vocabulary = 4096, 11008, 32000
    layer = (width, *[width * width] * 4, width, *[width * hidden] * 3)
    return (vocabulary * width, *layer * 32, width, vocabulary * width)


def _resnet50() -> tuple[int, ...]:
    with torch.device("meta"):
        return tuple(parameter.numel() for parameter in resnet50().parameters())


def load_of(name: str) -> Load:
    """A model with its compute time on one GPU; see `source`."""
    if name == "resnet50":
        step = 256 / 2470
        return Load(
            _resnet50(), step / 3, 2 * step / 3, "bf16", units=17,
            source="2,470 images/s on one A100 with AMP (NVIDIA DeepLearningExamples, resnet50v1.5); batch 256 per GPU",
        )  # fmt: skip
    sizes, tokens = _llama_7b(), 8192
    step = 6 * sum(sizes) * tokens / (0.4 * 989e12)
    return Load(
        sizes, step / 3, 2 * step / 3, "bf16", bucket=200 << 20, units=33,
        source="6 × parameters × 8,192 tokens per GPU at 40 % of an H100's 989 TFLOP/s (dense bf16): an assumption",
    )  # fmt: skip
