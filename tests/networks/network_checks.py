"""What the network tests share: deterministic weights, the digest of a state dict, checks that hold
for every network.

Digests, counts and output statistics in the tests were taken from the released ACF-BCKD networks.
"""

import hashlib
import re

import numpy as np
import pytest
import torch
from torch import nn

DATASETS = {"btcv": (1, 14), "word": (1, 17), "brats": (4, 3)}  # input channels, classes


def shape_fill(net: nn.Module) -> nn.Module:
    """Fill every tensor of the state dict from its shape alone, whatever its name; batch norms get
    sane statistics.
    """
    filled = {}
    for key, tensor in net.state_dict().items():
        n = tensor.numel()
        wave = np.cos(1.7 * np.arange(n) + 0.3 * n)
        if not tensor.is_floating_point():
            wave = np.zeros(n)
        elif tensor.ndim > 1:
            wave = wave * np.sqrt(2 * tensor.shape[0] / n)
        elif key.endswith("weight"):
            wave = 0.5 + 0.2 * wave
        elif key.endswith("running_var"):
            wave = 1 + 0.3 * np.abs(wave)
        else:
            wave = 0.1 * wave
        filled[key] = torch.from_numpy(wave).to(tensor.dtype).reshape(tensor.shape)
    net.load_state_dict(filled)
    return net


def golden_image(in_channels: int = 1) -> torch.Tensor:
    noise = np.random.RandomState(123).randn(1, in_channels, 32, 32, 32)
    return torch.from_numpy(noise).float()


def digest(net: nn.Module) -> str:
    """SHA-256 of the sorted `name:shape` lines of the state dict."""
    lines = sorted(
        f"{key}:{'x'.join(map(str, tensor.shape))}" for key, tensor in net.state_dict().items()
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_statistics(net: nn.Module, mean: float, std: float) -> None:
    with torch.no_grad():
        logits = shape_fill(net).eval()(golden_image()).double()
    assert logits.mean().item() == pytest.approx(mean, rel=1e-5)
    assert logits.std(unbiased=False).item() == pytest.approx(std, rel=1e-5)


def check_taps(net: nn.Module, size: tuple[int, int, int], divisors: dict[str, int]) -> None:
    """Taps have the channels of `feature_channels` and the grid `size / divisor`; logits do not
    depend on asking.
    """
    image = torch.randn(1, net.in_channels, *size)
    net.eval()
    with torch.no_grad():
        plain = net(image)
        logits, features = net(image, return_features=True)
    assert logits.shape == (1, net.num_classes, *size)
    assert torch.equal(plain, logits)
    assert set(features) == set(net.feature_channels) == set(divisors)
    for tap, divisor in divisors.items():
        expected = (1, net.feature_channels[tap], *(side // divisor for side in size))
        assert features[tap].shape == expected, tap


def check_taps_keep_their_values(net: nn.Module, sources: dict[str, str]) -> None:
    """Each tap equals a copy made the moment its module (`name:in` or `name:out`) saw it: nothing
    changes it later.
    """
    copies = {}
    handles = []
    for tap, source in sources.items():
        name, side = source.split(":")
        module = net.get_submodule(name)
        if side == "in":
            hook = module.register_forward_pre_hook(
                lambda _, args, tap=tap: copies.update({tap: args[0].clone()})
            )
        else:
            hook = module.register_forward_hook(
                lambda _, args, out, tap=tap: copies.update({tap: out.clone()})
            )
        handles.append(hook)
    with torch.no_grad():
        features = net.eval()(golden_image(net.in_channels), return_features=True).features
    for handle in handles:
        handle.remove()
    for tap in sources:
        assert torch.equal(features[tap], copies[tap]), tap


def check_gradients(net: nn.Module, unused_keys: tuple[str, ...] = ()) -> None:
    """The parameters that get no gradient are those that match `unused_keys`."""
    net.train()
    net(torch.randn(2, net.in_channels, 32, 32, 32)).square().mean().backward()
    for name, parameter in net.named_parameters():
        unused = any(re.search(pattern, name) for pattern in unused_keys)
        assert (parameter.grad is None) == unused, name
        assert unused or torch.isfinite(parameter.grad).all(), name


def check_rejects_bad_input(net: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"multiple of {net.stride}"):
        net(torch.zeros(1, net.in_channels, 32, 32, net.stride // 2))
    with pytest.raises(ValueError, match="in_channels"):
        net(torch.zeros(1, net.in_channels + 1, 32, 32, 32))
    with pytest.raises(ValueError, match="in_channels"):
        net(torch.zeros(net.in_channels, 32, 32, 32))
