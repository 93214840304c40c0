import pytest
import torch
from torch import nn

from arsg_dist.engine import Communicator, SingleProcessCommunicator
from arsg_dist.imagenet.data import IGNORED
from arsg_dist.imagenet.metrics import Totals, average_buffers


def test_totals_are_the_means_over_what_counts() -> None:
    """Catches means of batch means (wrong for unequal batches) and places filled up that count."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 9, generator=generator)
    labels = torch.randint(0, 9, (50,), generator=generator)
    totals = Totals(torch.device("cpu"))
    for part in (slice(0, 7), slice(7, 40), slice(40, 50)):
        totals.add(
            torch.cat([logits[part], logits[:3]]), torch.cat([labels[part], torch.full((3,), IGNORED)])
        )
    evaluation = totals.over_all_ranks(SingleProcessCommunicator())
    ranking = logits.argsort(dim=1, descending=True)
    assert evaluation.images == 50
    assert evaluation.loss == pytest.approx(
        nn.functional.cross_entropy(logits.double(), labels).item(), rel=1e-6
    )
    assert evaluation.top1 == (ranking[:, 0] == labels).double().mean().item()
    assert evaluation.top5 == (ranking[:, :5] == labels[:, None]).any(dim=1).double().mean().item()


def test_top5_of_fewer_than_five_classes_is_everything() -> None:
    """Catches topk(5) of three logits."""
    totals = Totals(torch.device("cpu"))
    totals.add(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    assert totals.over_all_ranks(SingleProcessCommunicator()).top5 == 1


class _TwoRanks(SingleProcessCommunicator):
    """The other rank holds the negative of what this one holds, plus 6."""

    world_size = 2

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + (6 - tensor)


def test_running_statistics_are_averaged_and_counters_are_not() -> None:
    """Catches ranks that evaluate with their own batch-norm statistics."""
    module = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(5))
    communicator: Communicator = _TwoRanks()
    average_buffers(module, communicator)
    for norm in module:
        assert torch.equal(norm.running_mean, torch.full_like(norm.running_mean, 3.0))
        assert norm.num_batches_tracked == 0
