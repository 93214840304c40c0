"""Plan the flat memory of parameters and its partition (torch only).

Parameters of one dtype and device lie one after another in one flat tensor, an *arena*, in the reverse of the order
they are named in, which is about the order in which a backward pass finishes their gradients; between them are gaps, so
that each begins aligned. An arena is cut into *buckets* of equal size, and each bucket into `world_size` *shards* of
equal size, of which rank r owns the r-th. Cuts fall anywhere, also inside a parameter: the *segment* of a parameter is
its part in one bucket, a *piece* its part in one shard.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from arsg_dist.optim.kernels.cpu_library import is_dense

ALIGNMENT = 256
"""Parameters and shards begin at multiples of so many bytes: what NCCL likes, and more than the 16 that a GPU reads and
writes at once."""


@dataclass(frozen=True)
class ParameterSpec:
    """Describe a parameter as far as the layout depends on it.

    Attributes:
        name: unique.
        shape: in elements.
        stride: of memory that is dense; decides the order of elements in the arena.
        dtype: of the parameter.
        device: type of the device ("cpu", "cuda").
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, name: str, parameter: Tensor) -> "ParameterSpec":
        """Describe a parameter; one whose memory is not dense is laid out row by row."""
        dense = is_dense(parameter)
        stride = parameter.stride() if dense else torch.empty(parameter.shape, device="meta").stride()
        return cls(name, tuple(parameter.shape), tuple(stride), parameter.dtype, parameter.device.type)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    def flat(self, tensor: Tensor) -> Tensor:
        """Flatten a tensor of this shape to the arena's order; shares memory if it can."""
        if tensor.stride() != self.stride or not tensor.numel():
            ordered = torch.empty_strided(self.shape, self.stride, dtype=tensor.dtype, device=tensor.device)
            tensor = ordered.copy_(tensor)
        return tensor.as_strided((self.numel,), (1,))

    def shaped(self, flat: Tensor) -> Tensor:
        """View 1-D memory of `numel` elements as a tensor of this shape."""
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Bucket:
    """Locate a contiguous part of an arena.

    Attributes:
        index: among all buckets.
        arena: index.
        start: first element in the arena.
        shard_numel: elements per rank.
        numel: shard_numel × world_size.
    """

    index: int
    arena: int
    start: int
    shard_numel: int
    numel: int


@dataclass(frozen=True)
class Segment:
    """Locate a contiguous part of a parameter in a bucket, or (a piece) in a shard.

    Attributes:
        parameter: index.
        parameter_start: first element in the parameter's memory.
        bucket: index.
        start: first element in the bucket, or (a piece) in the shard.
        numel: number of elements, > 0.
    """

    parameter: int
    parameter_start: int
    bucket: int
    start: int
    numel: int


@dataclass(frozen=True)
class Layout:
    """Hold the plan; see the module. Make it with `plan`.

    Attributes:
        parameters: in the order given.
        world_size: shards per bucket.
        offsets: each parameter's first element in its arena.
        arena_of: each parameter's arena.
        arenas: per arena its dtype, its device type and its number of elements, with padding.
        buckets: of all arenas.
    """

    parameters: tuple[ParameterSpec, ...]
    world_size: int
    offsets: tuple[int, ...]
    arena_of: tuple[int, ...]
    arenas: tuple[tuple[torch.dtype, str, int], ...]
    buckets: tuple[Bucket, ...]

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Of all parameters."""
        found = []
        for bucket in self.buckets:
            for index, spec in enumerate(self.parameters):
                if self.arena_of[index] != bucket.arena:
                    continue
                first = max(self.offsets[index], bucket.start)
                last = min(self.offsets[index] + spec.numel, bucket.start + bucket.numel)
                if first < last:
                    found.append(
                        Segment(
                            index,
                            first - self.offsets[index],
                            bucket.index,
                            first - bucket.start,
                            last - first,
                        )
                    )
        return tuple(found)

    def gaps(self, bucket: int) -> list[tuple[int, int]]:
        """List where a bucket holds no parameter: from, to (without it)."""
        found, end = [], 0
        for segment in sorted((s for s in self.segments if s.bucket == bucket), key=lambda s: s.start):
            if end < segment.start:
                found.append((end, segment.start))
            end = segment.start + segment.numel
        if end < self.buckets[bucket].numel:
            found.append((end, self.buckets[bucket].numel))
        return found

    def segments_of_parameter(self, parameter: int) -> list[Segment]:
        """List the segments of a parameter in order of memory."""
        return [segment for segment in self.segments if segment.parameter == parameter]

    def pieces(self, rank: int) -> list[Segment]:
        """List the parts of parameters that `rank` owns; `start` counts in its shard."""
        found = []
        for segment in self.segments:
            size = self.buckets[segment.bucket].shard_numel
            first = max(segment.start, rank * size)
            last = min(segment.start + segment.numel, (rank + 1) * size)
            if first < last:
                found.append(
                    Segment(
                        segment.parameter,
                        segment.parameter_start + first - segment.start,
                        segment.bucket,
                        first - rank * size,
                        last - first,
                    )
                )
        return found

    def fingerprint(self) -> str:
        """Digest the layout: equal exactly if the layouts are."""
        return hashlib.sha256(
            repr((self.parameters, self.world_size, self.offsets, self.arenas, self.buckets)).encode()
        ).hexdigest()


def plan(parameters: Sequence[ParameterSpec], world_size: int, bucket_bytes: int) -> Layout:
    """Lay out parameters.

    Args:
        parameters: in the order of the model.
        world_size: number of shards.
        bucket_bytes: largest size of a bucket, rounded to whole shards; at least one aligned shard per rank.
    """
    # Every run of aligned elements has one of a parameter, so no bucket is a gap.
    offsets, arena_of = [0] * len(parameters), [0] * len(parameters)
    filled: dict[tuple[torch.dtype, str], int] = {}
    for index in reversed(range(len(parameters))):
        spec = parameters[index]
        kind = (spec.dtype, spec.device)
        unit = ALIGNMENT // spec.dtype.itemsize
        offsets[index] = -(-filled.setdefault(kind, 0) // unit) * unit
        arena_of[index] = list(filled).index(kind)
        if spec.numel:
            filled[kind] = offsets[index] + spec.numel
    arenas, buckets = [], list[Bucket]()
    for arena, ((dtype, device), used) in enumerate(filled.items()):
        unit = world_size * (ALIGNMENT // dtype.itemsize)
        whole = max(1, bucket_bytes // (dtype.itemsize * unit)) * unit
        start = 0
        while start < used:
            numel = min(whole, -(-(used - start) // unit) * unit)
            buckets.append(Bucket(len(buckets), arena, start, numel // world_size, numel))
            start += numel
        arenas.append((dtype, device, start))
    return Layout(
        tuple(parameters), world_size, tuple(offsets), tuple(arena_of), tuple(arenas), tuple(buckets)
    )
