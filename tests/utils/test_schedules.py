import itertools

import pytest
import torch

from utils.schedules import poly_lr, set_lr


@pytest.mark.parametrize(
    "step, published", [(0, 0.01), (1, 0.00999099), (500, 0.00535404), (998, 1.997e-5), (999, 0.0)]
)
def test_poly_lr_at_the_published_samples(step, published):
    assert poly_lr(step, 0.01, 1000) == pytest.approx(published, rel=2e-4 if step == 998 else 1e-6, abs=0)


@pytest.mark.parametrize("max_steps, min_lr", [(300, 1e-6), (100, 0.0), (50, 1e-4), (2, 1e-3)])
def test_poly_lr_falls_from_lr_to_min_lr(max_steps, min_lr):
    values = [poly_lr(step, 0.01, max_steps, min_lr) for step in range(max_steps)]
    assert values[0] == pytest.approx(0.01) and values[-1] == min_lr
    assert all(a > b for a, b in itertools.pairwise(values))


def test_poly_lr_at_the_edges():
    assert poly_lr(0, 0.01, 1) == 0.01  # a single step runs at the full rate
    assert poly_lr(50, 0.01, 10, 1e-4) == 1e-4  # beyond the end
    assert poly_lr(5, 0.01, 11, power=2.0) == pytest.approx(0.01 / 4)


def test_set_lr_reaches_every_group():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 1.0}], lr=0.5)
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
