"""The layout of flat buckets, without any ranks."""

import itertools

import pytest
import torch

pytest.importorskip("horovod.torch")

from arsg_dist.horovod.sharded.buckets import ALIGNMENT, Layout, ParameterSpec, plan
from tests.horovod.jobs.sharded_cases import Patchwork


def layout(world_size: int, bucket_bytes: int, model: torch.nn.Module | None = None) -> Layout:
    model = model or Patchwork()
    return plan([ParameterSpec.of(*named) for named in model.named_parameters()], world_size, bucket_bytes)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("bucket_bytes", [1, 5_000, 16 << 20])
def test_every_element_has_one_owner(world_size: int, bucket_bytes: int) -> None:
    """Catches pieces that overlap, are lost at a cut, or run past the end of a shard."""
    plan_ = layout(world_size, bucket_bytes)
    owners = [torch.zeros(spec.numel, dtype=torch.int64) for spec in plan_.parameters]
    used = [torch.zeros(world_size, bucket.shard_numel, dtype=torch.int64) for bucket in plan_.buckets]
    for rank in range(world_size):
        for piece in plan_.pieces(rank):
            assert piece.start + piece.numel <= plan_.buckets[piece.bucket].shard_numel
            owners[piece.parameter][piece.parameter_start : piece.parameter_start + piece.numel] += 1
            used[piece.bucket][rank, piece.start : piece.start + piece.numel] += 1
    assert all((count == 1).all() for count in owners)
    assert all((count <= 1).all() for count in used)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_pieces_lie_where_the_parameter_lies_in_the_arena(world_size: int) -> None:
    """Catches a rank that updates elements other than those gathered into the parameter."""
    plan_ = layout(world_size, 5_000)
    arenas = [torch.arange(numel) for _, _, numel in plan_.arenas]
    for rank in range(world_size):
        for piece in plan_.pieces(rank):
            bucket = plan_.buckets[piece.bucket]
            place = bucket.start + rank * bucket.shard_numel + piece.start
            offset = plan_.offsets[piece.parameter] + piece.parameter_start
            assert arenas[bucket.arena][place] == offset


def test_buckets_are_padded_to_equal_aligned_shards_and_no_larger_than_asked() -> None:
    """Catches shards of unequal size, which Horovod's exchanges would cut elsewhere, and buckets that grow."""
    plan_ = layout(3, 5_000)
    assert len(plan_.buckets) > 3
    for bucket in plan_.buckets:
        assert bucket.numel == 3 * bucket.shard_numel
        assert bucket.shard_numel * 4 % ALIGNMENT == 0
        assert bucket.numel * 4 <= 5_000
    for (_, _, numel), (arena, buckets) in zip(
        plan_.arenas, itertools.groupby(plan_.buckets, key=lambda bucket: bucket.arena), strict=True
    ):
        assert numel == sum(bucket.numel for bucket in buckets)
        assert arena == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_parameters_and_pieces_begin_where_a_gpu_reads_128_bits_at_once(dtype: torch.dtype) -> None:
    """Catches pieces that the kernels can only read element by element, which is what follows an odd bias."""
    shapes = [(7,), (0,), (33, 5), (1,), (64,), (1000,)]
    specs = [ParameterSpec.of(str(i), torch.empty(shape, dtype=dtype)) for i, shape in enumerate(shapes)]
    plan_ = plan(specs, 3, 3000)
    assert all(offset * dtype.itemsize % ALIGNMENT == 0 for offset in plan_.offsets)
    for rank in range(3):
        assert all(piece.start * dtype.itemsize % ALIGNMENT == 0 for piece in plan_.pieces(rank))
    assert len(plan_.buckets) > 1
    for bucket in plan_.buckets:
        held = torch.zeros(bucket.numel, dtype=torch.int64)
        for segment in plan_.segments:
            if segment.bucket == bucket.index:
                held[segment.start : segment.start + segment.numel] += 1
        for begin, end in plan_.gaps(bucket.index):
            assert begin < end
            held[begin:end] += 1
        assert (held == 1).all()
    assert sum(spec.numel for spec in specs) == sum(segment.numel for segment in plan_.segments)


def test_memory_order_survives_the_way_through_flat_memory() -> None:
    """Catches channels_last weights and gradients that come back transposed."""
    weight = torch.randn(5, 3, 2, 2).to(memory_format=torch.channels_last)
    spec = ParameterSpec.of("weight", weight)
    for tensor in (weight, weight.contiguous()):
        assert torch.equal(spec.shaped(spec.flat(tensor).clone()), weight)
    assert spec.flat(weight).data_ptr() == weight.data_ptr()
    gapped = torch.randn(4, 6)[:, ::2]
    spec = ParameterSpec.of("gapped", gapped)
    assert torch.equal(spec.shaped(spec.flat(gapped).clone()), gapped)


def test_the_fingerprint_knows_names_shapes_order_and_ranks() -> None:
    """Catches ranks with different models that would exchange each other's parameters."""
    plain = layout(2, 5_000)
    assert plain.fingerprint() == layout(2, 5_000).fingerprint()
    assert plain.fingerprint() != layout(3, 5_000).fingerprint()
    assert plain.fingerprint() != layout(2, 6_000).fingerprint()
    parameters = list(Patchwork().named_parameters())
    other = plan([ParameterSpec.of(*named) for named in parameters[::-1]], 2, 5_000)
    assert plain.fingerprint() != other.fingerprint()
    assert plain.fingerprint() != layout(2, 5_000, Patchwork().to(torch.bfloat16)).fingerprint()
