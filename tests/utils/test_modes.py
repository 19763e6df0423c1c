import pytest
import torch
from torch import nn

from utils.modes import evaluating, statistics_kept, weightless


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.InstanceNorm2d(3)
    )


IMAGE = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def modes(network):
    return [module.training for module in network.modules()]


def buffers(network):
    return [buffer.clone() for buffer in network.buffers()]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_evaluating_runs_in_evaluation_mode_and_returns_to_training():
    network, statistics = make(), buffers(make())
    with evaluating(network):
        assert not any(modes(network))
        inside = network(IMAGE)
    assert all(modes(network)) and equal(buffers(network), statistics)
    assert torch.equal(network.eval()(IMAGE), inside)


def test_evaluating_leaves_a_frozen_part_frozen():
    network = make()
    network[1].eval()
    before = modes(network)
    with evaluating(network):
        pass
    assert modes(network) == before and not network[1].training


def test_evaluating_a_network_in_evaluation_mode_leaves_it_there():
    network = make().eval()
    with evaluating(network):
        pass
    assert not any(modes(network))


def test_the_mode_comes_back_after_an_error():
    network = make()
    with pytest.raises(RuntimeError), evaluating(network):
        network(torch.zeros(1, 2, 6, 6))
    assert all(modes(network))


def test_kept_statistics_stay_and_the_output_is_that_of_training():
    network, statistics = make(), buffers(make())
    network[2].p = 0.0
    with statistics_kept(network):
        inside = network(IMAGE)
    assert equal(buffers(network), statistics) and all(modes(network))
    assert torch.equal(network(IMAGE), inside)
    assert not equal(buffers(network), statistics)  # after the block they move again


def test_kept_statistics_still_serve_evaluation_mode():
    network = make()
    network(IMAGE)
    network.eval()
    expected = network(IMAGE)
    with statistics_kept(network):
        assert torch.equal(network(IMAGE), expected)


def test_gradients_are_those_without_the_block():
    network, other = make()[:2], make()[:2]
    with statistics_kept(network):
        network(IMAGE).square().sum().backward()
    other(IMAGE).square().sum().backward()
    assert equal([p.grad for p in network.parameters()], [p.grad for p in other.parameters()])


def test_norms_without_statistics_stay_without():
    network = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.BatchNorm2d(1))
    with statistics_kept(network):
        network(IMAGE)
    assert [norm.track_running_stats for norm in network] == [False, True]


def test_statistics_move_again_after_an_error_and_after_nested_blocks():
    network = make()
    with pytest.raises(RuntimeError), statistics_kept(network):
        network(torch.zeros(1, 2, 6, 6))
    assert network[1].track_running_stats
    with statistics_kept(network):
        with statistics_kept(network):
            pass
        assert not network[1].track_running_stats
    assert network[1].track_running_stats


@pytest.mark.parametrize(
    "norm, shape", [(nn.BatchNorm1d, (4, 2)), (nn.BatchNorm3d, (4, 2, 3, 3, 3))]
)
def test_every_rank_of_batch_norm_is_kept(norm, shape):
    layer = norm(2)
    with statistics_kept(layer):
        layer(torch.randn(shape))
    assert layer.num_batches_tracked == 0 and not layer.running_mean.any()


def test_weightless_modules_have_shapes_and_nothing_else():
    before = torch.get_rng_state()
    with weightless():
        layer = nn.Conv3d(2, 3, 1)
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    assert layer.weight.device.type == layer.bias.device.type == "meta" and layer.weight.shape == (
        3,
        2,
        1,
        1,
        1,
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.zeros(1).normal_().device.type == "cpu"
