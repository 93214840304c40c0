"""Do the ranks that should hold the same numbers still hold the same bits?"""

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from arsg_dist.engine.communicator import Communicator, JobError

_CHUNK = 2**16
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """A number that depends on every bit of a tensor and its place.

    Two tensors that differ in one element never have the same; any other two have with a chance of about 2⁻⁶⁴.

    Args:
        tensor: any shape, dtype and device.

    Returns:
        int64, 0-dim, on the tensor's device; nothing waits for it.
    """
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    words = real.detach().contiguous().view(-1).view(_WORDS[real.element_size()])
    odd = torch.arange(1, 2 * min(_CHUNK, max(1, len(words))), 2, device=tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in torch.split(words, _CHUNK):  # int64 copies of a whole tensor would take twice its memory
        # Arithmetic modulo 2⁶⁴, in which odd factors lose nothing.
        total = total * 6364136223846793005 + (chunk.long() * odd[: len(chunk)]).sum()
    return total


def fingerprints(tensors: Iterable[Tensor]) -> list[int]:
    """`fingerprint` of each, waiting for a device once."""
    found = [fingerprint(tensor) for tensor in tensors]
    return [int(number) for number in torch.stack(found).tolist()] if found else []


def check_replicas(communicator: Communicator, replicated: Iterator[tuple[str, Tensor]]) -> None:
    """Compares tensors bit by bit over the ranks, through their fingerprints. Every rank must call it.

    Args:
        communicator: of the ranks that hold the same.
        replicated: name → tensor, the same names in the same order on every rank.

    Raises:
        JobError: on every rank, naming the ranks that differ from most others and their tensors. Where no value is
            that of most ranks, as among two, nobody can tell who is right: all are named.
    """
    names, tensors = [], []
    for name, tensor in replicated:
        names.append(name)
        tensors.append(tensor)
    of_ranks = [tuple(numbers) for numbers in communicator.all_gather_object(fingerprints(tensors))]
    if len(set(of_ranks)) == 1:
        return
    most, count = Counter(of_ranks).most_common(1)[0]
    if 2 * count > len(of_ranks):
        odd = [rank for rank, numbers in enumerate(of_ranks) if numbers != most]
        who = f"rank {', '.join(map(str, odd))} differs from the {count} others, which agree"
    else:
        odd, most = list(range(1, len(of_ranks))), of_ranks[0]
        who = f"the {len(of_ranks)} ranks differ, and no majority tells which is right"
    differing = [
        name for index, name in enumerate(names) if any(of_ranks[rank][index] != most[index] for rank in odd)
    ]
    raise JobError(
        f"ranks that must hold the same weights do not: {who}; in {len(differing)} of {len(names)} tensors: "
        f"{', '.join(differing[:3])}{' ...' if len(differing) > 3 else ''}. Memory, a link or a collective operation "
        "corrupted data, or the ranks' processors round differently. Resume from a checkpoint of before"
    )
