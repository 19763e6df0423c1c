import pytest
import torch
import torch._dynamo.testing
from torch import nn

from utils.modes import evaluating, statistics_estimated, statistics_kept, weightless


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


def lagging():
    """A network with two norms, whose weights have moved far since its statistics were made."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.Dropout(0.5),
        nn.Conv2d(3, 2, 1),
        nn.BatchNorm2d(2),
    )
    for _ in range(5):
        network(IMAGE)
    with torch.no_grad():
        network[0].weight.mul_(-4)
        network[3].bias.add_(7)
    return network


def test_estimated_statistics_are_those_of_the_images_under_the_present_weights():
    """In float64, layer by layer: the mean of the batches' means and unbiased variances."""
    network = lagging()
    batches = [torch.randn(2, 1, 6, 6) + k for k in range(3)]
    inputs = [batch.double() for batch in batches]
    expected = []
    for layer in network:
        if isinstance(layer, nn.BatchNorm2d):
            flat = [x.transpose(0, 1).flatten(1) for x in inputs]
            mean = torch.stack([x.mean(1) for x in flat]).mean(0)
            variance = torch.stack([x.var(1, unbiased=True) for x in flat]).mean(0)
            expected.append((mean, variance))
            inputs = [  # training mode: each batch by its own statistics
                (x - x.mean((0, 2, 3), keepdim=True))
                / (x.var((0, 2, 3), unbiased=False, keepdim=True) + layer.eps).sqrt()
                for x in inputs
            ]
        elif isinstance(layer, nn.Conv2d):
            weight, bias = layer.weight.double(), layer.bias.double()
            inputs = [nn.functional.conv2d(x, weight, bias) for x in inputs]
    with statistics_estimated(network, lambda: [network(batch) for batch in batches]):
        found = [(network[k].running_mean, network[k].running_var) for k in (1, 4)]
        for (mean, variance), (own_mean, own_variance) in zip(found, expected):
            torch.testing.assert_close(mean.double(), own_mean, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(variance.double(), own_variance, atol=1e-5, rtol=1e-4)


def test_estimated_statistics_leave_the_training_as_it_was():
    network = lagging()
    before, random = buffers(network), torch.get_rng_state()
    with statistics_estimated(network, lambda: network(IMAGE)):
        assert not equal(buffers(network), before)
    assert equal(buffers(network), before) and all(modes(network))
    assert [network[k].momentum for k in (1, 4)] == [0.1, 0.1]
    assert torch.equal(torch.get_rng_state(), random)  # dropout is off


def test_lagging_statistics_are_mended_inside_the_block_only():
    network = lagging()
    network.eval()
    with torch.no_grad():
        lagged = network(IMAGE).std()
        with statistics_estimated(network, lambda: network(IMAGE)):
            mended = network(IMAGE)
        assert lagged > 1.5 and abs(mended.std() - 1) < 0.05 and mended.mean().abs() < 0.05
        assert network(IMAGE).std() == lagged


def test_a_norm_that_sees_no_image_keeps_its_statistics():
    network = lagging()
    with statistics_estimated(network, lambda: network[:3](IMAGE)):
        inside = network[4].running_mean.clone()
    assert torch.equal(inside, network[4].running_mean) and inside.any()


def test_a_compiled_network_is_not_compiled_again_for_it():
    network, counter = lagging(), torch._dynamo.testing.CompileCounter()
    network.compile(backend=counter)
    network(IMAGE)
    frames = counter.frame_count
    with statistics_estimated(network, lambda: network(IMAGE)):
        pass
    network(IMAGE)
    assert counter.frame_count == frames


def test_a_network_without_running_statistics_asks_for_no_image():
    network = nn.Sequential(nn.InstanceNorm2d(1), nn.BatchNorm2d(1, track_running_stats=False))
    with statistics_estimated(network, lambda: pytest.fail("asked for images")):
        pass


def test_statistics_come_back_after_an_error():
    network = lagging()
    before = buffers(network)
    with (
        pytest.raises(RuntimeError),
        statistics_estimated(network, lambda: network(IMAGE[0, 0, 0])),
    ):
        pass
    assert equal(buffers(network), before) and network[1].momentum == 0.1 and all(modes(network))


def test_estimated_statistics_are_averaged_over_processes():
    network = lagging()

    def average(tensors):  # with a process whose statistics are all zero
        for tensor in tensors:
            tensor.div_(2)

    with statistics_estimated(network, lambda: network(IMAGE)):
        alone = [network[k].running_mean.clone() for k in (1, 4)]
    with statistics_estimated(network, lambda: network(IMAGE), average):
        for mean, k in zip(alone, (1, 4)):
            torch.testing.assert_close(network[k].running_mean, mean / 2)


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
