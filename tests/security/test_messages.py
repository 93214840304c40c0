"""What ranks tell each other is data, whoever sends it."""

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from arsg_dist.engine import SingleProcessCommunicator
from arsg_dist.engine.messages import MAX_BYTES, check_sizes, decode, encode
from tests.support.hostile import Payload


def _raw(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _with_text(text: str, rest: bytes = b"") -> torch.Tensor:
    return _raw(len(text.encode()).to_bytes(8, "little") + text.encode() + rest)


def test_a_pickle_sent_by_a_stranger_is_not_run(tmp_path: Path) -> None:
    """Catches a message that is unpickled: whoever joins as a rank would run code on all others."""
    pickled = pickle.dumps(Payload(tmp_path / "ran"))
    for message in (pickled, len(pickled).to_bytes(8, "little") + pickled):
        with pytest.raises(ValueError, match="what rank 1 sent is no message"):
            decode([encode("fine"), _raw(message)])
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickled)
    assert (tmp_path / "ran").exists(), "the payload is as harmless as it seems"


@pytest.mark.parametrize(
    "value",
    [
        None,
        [True, 1, -0.0, 1e-320, "ü\n\0", "\udcff", 2**70],
        {"lr": 0.1, 3: (1, (2,)), None: {}, (0, "a"): []},
        [math.inf, -math.inf],
        {"value": {"tensor": ["float32"]}, "refused": "no"},  # what the format itself uses
        (torch.bfloat16, torch.Size([2, 3])),
        ("x",) * 1000,
    ],
)
def test_values_arrive_as_they_were_sent(value: Any) -> None:
    """Catches lists for tuples, texts for numbers as keys, and rounded numbers."""
    (arrived,) = decode([encode(value)])
    assert repr(arrived) == repr(tuple(value) if isinstance(value, torch.Size) else value).replace(
        "torch.Size([2, 3])", "(2, 3)"
    )


def test_tensors_arrive_bit_by_bit() -> None:
    """Catches another dtype, shape or memory layout, and NaN in place of a NaN of other bits."""
    nan = torch.tensor([2143289345, -4194303], dtype=torch.int32).view(torch.float32)
    plain = [torch.tensor(3), torch.zeros(0, 2), torch.ones(3, dtype=torch.bool)]
    dtypes = [torch.arange(3).to(dtype) for dtype in (torch.bfloat16, torch.float64, torch.complex64)]
    strided = torch.arange(96).view(2, 3, 4, 4).to(memory_format=torch.channels_last)
    sent = [nan, *plain, *dtypes, strided, torch.arange(6)[::2]]
    (arrived,) = decode([encode(sent)])
    for one, other in zip(sent, arrived, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.contiguous().view(-1).tolist() == pytest.approx(other.reshape(-1).tolist(), nan_ok=True)
    assert torch.equal(arrived[0].view(torch.int32), nan.view(torch.int32))
    assert arrived[-2].stride() == strided.stride()
    (outline,) = decode([encode(strided.to("meta"))])
    assert (outline.device.type, outline.stride()) == ("meta", strided.stride())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Path("/"), "Path"),
        ([{"a": {1, 2}}], "builtins.set is none of the kinds"),
        (torch.eye(2).to_sparse(), "torch.Tensor is none of the kinds"),
        (lambda: None, "builtins.function"),
        ([[[[[[[[[[[[[[]]]]]]]]]]]]]], "nested deeper"),
    ],
)
def test_what_cannot_be_sent_is_an_error_of_every_rank(value: Any, reason: str) -> None:
    """Catches a rank that raises alone, while the others wait for its message."""
    messages = [encode("fine"), encode(value)]
    with pytest.raises(TypeError, match=f"rank 1 cannot send its value: .*{reason}"):
        decode(messages)
    with pytest.raises(TypeError, match="rank 0 cannot send its value"):
        SingleProcessCommunicator().from_rank_0(value)


@pytest.mark.parametrize(
    "message",
    [
        torch.empty(0, dtype=torch.uint8),
        _raw(b"\xff" * 8),
        _with_text("[" * 100_000),
        _with_text('{"value": 1, "value": 2}'),
        _with_text('{"value": {"os.system": "id"}}'),
        _with_text('{"value": {"tensor": ["float32", [2], []]}}', b"1234567"),
        _with_text('{"value": {"tensor": ["float32", [4611686018427387904, 4], []]}}'),
        _with_text('{"value": {"tensor": ["float32", [-1], []]}}'),
        _with_text('{"value": {"tensor": ["float32", [1.5], []]}}'),
        _with_text('{"value": {"tensor": ["float32", [1], [0, 0, 0]]}}', b"1234"),
        _with_text('{"value": {"dtype": "__class__"}}'),
        _with_text('{"value": {"dict": [[{"dict": []}, 1]]}}'),
        _with_text('{"value": {}}'),
        _with_text('["value"]'),
        _with_text("\x00"),
    ],
)
def test_a_damaged_message_is_one_clear_error(message: torch.Tensor) -> None:
    """Catches memory taken as a stranger says, and errors of other kinds than the callers expect."""
    with pytest.raises(ValueError, match="what rank 0 sent is"):
        decode([message])


def test_no_memory_is_taken_for_sizes_that_cannot_be() -> None:
    """Catches a rank that takes as much memory as a stranger announces."""
    check_sizes([8, MAX_BYTES])
    for size in (-1, 0, MAX_BYTES + 1, 2**62):
        with pytest.raises(ValueError, match="rank 1 announced"):
            check_sizes([8, size])
