import pytest
import torch
from torch import nn

from arsg_dist.engine import SingleProcessCommunicator
from arsg_dist.imagenet.data.sampler import IGNORED, ValidationSampler
from arsg_dist.imagenet.training.metrics import Evaluation, Totals, average_buffers


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


class _Summing(SingleProcessCommunicator):
    """Asked by one rank after the other: the last one gets the sum over all."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self._sum = tensor if self._sum is None else self._sum + tensor
        return self._sum


@pytest.mark.parametrize("images", [1, 2, 7, 21, 25])
def test_an_evaluation_is_the_same_on_any_number_of_ranks(images: int) -> None:
    """Catches images counted twice or left out where sizes do not divide, fillers that count, and means of means."""
    generator = torch.Generator().manual_seed(images)
    ranking = torch.stack([torch.randperm(9, generator=generator) for _ in range(images)])
    labels = torch.randint(9, (images,), generator=generator)
    # The cross-entropy of these is a whole number: sums are exact in any order.
    logits = -20.0 * ranking
    ranks_of_labels = ranking[torch.arange(images), labels].double()
    expected = Evaluation(
        loss=20 * ranks_of_labels.sum().item() / images,
        top1=(ranks_of_labels < 1).sum().item() / images,
        top5=(ranks_of_labels < 5).sum().item() / images,
        images=images,
    )
    for world_size in (1, 2, 3):
        communicator = _Summing()
        for rank in range(world_size):
            totals = Totals(torch.device("cpu"))
            for keys in ValidationSampler(images, batch_size=4, rank=rank, world_size=world_size):
                places = [max(key.image, 0) for key in keys]  # a place without image holds a copy of one
                filler = torch.tensor([key.image == IGNORED for key in keys])
                totals.add(logits[places], labels[places].masked_fill(filler, IGNORED))
            evaluation = totals.over_all_ranks(communicator)
        assert evaluation == expected, world_size


class _TwoRanks(SingleProcessCommunicator):
    """The other rank holds ten times what this one holds."""

    world_size = 2

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return 11 * tensor


def test_running_statistics_are_averaged_and_counters_are_not() -> None:
    """Catches ranks that evaluate with their own batch-norm statistics, or with those of another layer."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(5))
    for norm in module:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.num_batches_tracked.fill_(7)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    average_buffers(module, _TwoRanks())
    for name, buffer in module.named_buffers():
        expected = before[name] if "tracked" in name else (5.5 * before[name].double()).float()
        assert torch.equal(buffer, expected), name


def test_of_equal_logits_one_place_counts() -> None:
    """Catches a tie that counts as right: a network that says the same of every class would be perfect."""
    totals = Totals(torch.device("cpu"))
    totals.add(torch.zeros(3, 3), torch.tensor([0, 1, 2]))
    assert totals.over_all_ranks(SingleProcessCommunicator()).top1 == 1 / 3
    totals = Totals(torch.device("cpu"))
    totals.add(torch.zeros(9, 9), torch.arange(9))
    evaluation = totals.over_all_ranks(SingleProcessCommunicator())
    assert (evaluation.top1, evaluation.top5) == (1 / 9, 5 / 9)


def test_a_batch_without_an_image_counts_nothing_and_no_image_at_all_is_an_error() -> None:
    """Catches NaN from the mean over an empty batch: a rank whose last batch is all places filled up."""
    totals = Totals(torch.device("cpu"))
    totals.add(torch.full((2, 3), torch.nan), torch.full((2,), IGNORED))
    with pytest.raises(ValueError, match="not one image"):
        totals.over_all_ranks(SingleProcessCommunicator())
    totals.add(torch.eye(3)[:1], torch.tensor([0]))
    assert totals.over_all_ranks(SingleProcessCommunicator()).top1 == 1


def test_sums_of_many_images_keep_every_one() -> None:
    """Catches sums in float32, which stand still at 2²⁴: the loss of the last of many images would be lost."""
    totals = Totals(torch.device("cpu"))
    for logit in (2.0**24, 21.0):  # so large is the cross-entropy of the other class
        totals.add(torch.tensor([[logit, 0.0]]), torch.tensor([1]))
    assert totals.over_all_ranks(SingleProcessCommunicator()).loss == (2**24 + 21) / 2


def test_an_average_over_one_rank_or_without_statistics_changes_nothing() -> None:
    """Catches counters averaged, and a collective that some ranks make and some do not."""
    average_buffers(nn.Linear(2, 2), _TwoRanks())
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(3.0)
    average_buffers(norm, SingleProcessCommunicator())
    assert norm.running_mean.tolist() == [3.0, 3.0]
