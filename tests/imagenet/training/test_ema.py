import pytest
import torch
from torch import nn

from arsg_dist.imagenet.training.ema import WeightAverage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_follows_its_formula_in_float32(dtype: torch.dtype) -> None:
    """Catches an average in half precision, in which 0.999 and a small step round to no change at all."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    average = WeightAverage(model, 0.999)
    expected = None
    trained = model.to(dtype)
    for step in range(20):
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(0.01 * (step + 1))
            trained[1].running_mean.add_(0.5)
        now = {name: tensor.detach().double() for name, tensor in trained.state_dict().items()}
        average.update(trained)
        expected = now if expected is None else {k: 0.999 * expected[k] + 0.001 * v for k, v in now.items()}
    assert expected is not None
    for name, tensor in average.module.state_dict().items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float32
            assert torch.allclose(tensor.double(), expected[name], rtol=1e-5, atol=1e-6), name
    assert not average.module.training


def test_a_saved_average_goes_on_exactly() -> None:
    """Catches a count of updates that is lost: the next update would overwrite the average by the weights."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    first = WeightAverage(model, 0.9)
    for _ in range(3):
        nn.init.normal_(model.weight)
        first.update(model)
    second = WeightAverage(model, 0.9)
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    nn.init.normal_(model.weight)
    first.update(model)
    second.update(model)
    assert torch.equal(first.module.weight, second.module.weight)
    assert not torch.equal(first.module.weight, model.weight)
