import copy

import pytest
import torch
from torch import nn

from utils.modes import ema_decay, ema_update


def pair():
    """Two networks that differ in every tensor, batch norm statistics included."""
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)) for _ in range(2)]
    for k, network in enumerate(networks):
        for _ in range(k + 1):
            network(torch.randn(4, 1, 5, 5))
    return networks


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 1.0])
def test_parameters_and_statistics_are_averaged_and_counters_copied(decay):
    average, network = pair()
    before, other = copy.deepcopy(average.state_dict()), copy.deepcopy(network.state_dict())
    ema_update(average, network, decay)
    state = average.state_dict()
    for key in before:
        if key.endswith("num_batches_tracked"):
            assert state[key] == other[key] != before[key]
        else:
            torch.testing.assert_close(state[key], decay * before[key] + (1 - decay) * other[key])
    assert all(torch.equal(value, other[key]) for key, value in network.state_dict().items())


def test_the_update_is_in_place_and_outside_the_graph():
    average, network = pair()
    tensors = {name: p.data_ptr() for name, p in average.named_parameters()}
    ema_update(average, network, 0.5)
    assert {name: p.data_ptr() for name, p in average.named_parameters()} == tensors
    assert all(p.grad_fn is None and p.requires_grad for p in average.parameters())


def test_half_precision_and_frozen_averages_are_updated():
    average, network = (net.half() for net in pair())
    average.requires_grad_(False)
    expected = 0.5 * average[0].weight + 0.5 * network[0].weight
    ema_update(average, network, 0.5)
    torch.testing.assert_close(average[0].weight, expected.detach())
    assert average[0].weight.dtype == torch.float16


def test_networks_of_other_tensors_are_refused():
    average, _ = pair()
    with pytest.raises(ValueError, match="differ in their tensors"):
        ema_update(average, nn.Conv2d(1, 3, 3), 0.5)


def test_decay_starts_at_zero_and_reaches_its_value():
    assert ema_decay(0, 0.99) == 0.0
    assert ema_decay(1, 0.99) == 0.5
    assert ema_decay(98, 0.99) == pytest.approx(0.99 - 0.01 / 99)
    assert ema_decay(100, 0.99) == ema_decay(10**6, 0.99) == 0.99
    values = [ema_decay(step, 0.9) for step in range(30)]
    assert values == sorted(values) and ema_decay(5, 0.0) == 0.0


def test_until_the_decay_is_reached_the_average_is_the_mean_of_all_steps():
    average, network = nn.Linear(2, 2), nn.Linear(2, 2)
    seen = []
    for step in range(8):
        nn.init.normal_(network.weight)
        seen.append(network.weight.detach().clone())
        ema_update(average, network, ema_decay(step, 0.99))
        torch.testing.assert_close(average.weight.detach(), torch.stack(seen).mean(0))


def test_buffers_can_be_left_alone():
    average, network = pair()
    kept = {name: buffer.clone() for name, buffer in average.named_buffers()}
    ema_update(average, network, 0.0, buffers=False)
    assert len(kept) == 3 and all(
        torch.equal(buffer, kept[name]) for name, buffer in average.named_buffers()
    )
    for p, q in zip(average.parameters(), network.parameters()):
        torch.testing.assert_close(p, q)
