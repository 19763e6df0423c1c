import itertools

import pytest
import torch

from utils.schedules import (
    OPTIMIZERS,
    SCHEDULES,
    build_optimizer,
    constant_lr,
    poly_lr,
    poly_lr_open,
    set_lr,
    step_lr,
)


@pytest.mark.parametrize(
    "step, published", [(0, 0.01), (1, 0.00999099), (500, 0.00535404), (998, 1.997e-5), (999, 0.0)]
)
def test_poly_lr_at_the_published_samples(step, published):
    assert poly_lr(step, 0.01, 1000) == pytest.approx(
        published, rel=2e-4 if step == 998 else 1e-6, abs=0
    )


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
    optimizer = torch.optim.SGD(
        [{"params": weights[:1]}, {"params": weights[1:], "lr": 1.0}], lr=0.5
    )
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize("max_steps, min_lr", [(300, 1e-6), (100, 0.0), (2, 1e-3), (1, 1e-3)])
def test_open_poly_lr_stays_above_min_lr_until_the_end(max_steps, min_lr):
    values = [poly_lr_open(step, 0.01, max_steps, min_lr) for step in range(max_steps)]
    assert values[0] == pytest.approx(0.01) and values[-1] > min_lr
    assert all(a > b for a, b in itertools.pairwise(values))
    assert poly_lr_open(max_steps, 0.01, max_steps, min_lr) == min_lr
    assert poly_lr_open(5 * max_steps, 0.01, max_steps, min_lr) == min_lr


@pytest.mark.parametrize("step", [0, 1, 500, 999])
def test_open_poly_lr_is_its_formula(step):
    assert poly_lr_open(step, 0.01, 1000) == pytest.approx(
        0.01 * (1 - step / 1000) ** 0.9, rel=1e-12
    )
    assert poly_lr_open(step, 0.01, 1000, 1e-4, 2.0) == pytest.approx(
        0.0099 * (1 - step / 1000) ** 2 + 1e-4, rel=1e-12
    )
    assert poly_lr_open(step, 0.01, 999) == pytest.approx(poly_lr(step, 0.01, 1000), rel=1e-12)


def test_constant_lr_is_constant():
    assert {constant_lr(step, 0.01, 10, 1e-4) for step in range(20)} == {0.01}


def test_schedules_by_name_take_the_same_arguments():
    for schedule in SCHEDULES.values():
        assert schedule(0, 0.01, 10, 1e-4) == pytest.approx(0.01)
        assert 1e-4 <= schedule(9, 0.01, 10, 1e-4) <= 0.01


def test_step_lr_falls_to_a_tenth_after_each_period():
    values = [step_lr(step, 0.01, 5) for step in range(15)]
    assert values == pytest.approx([0.01] * 5 + [0.001] * 5 + [0.0001] * 5, rel=1e-12)
    assert step_lr(14, 0.01, 5, 5e-4) == 5e-4 and step_lr(9, 0.01, 5, 5e-4) == pytest.approx(1e-3)


def test_optimizers_by_name_have_their_settings():
    weight = torch.nn.Parameter(torch.zeros(1))
    built = {name: build_optimizer(name, [weight], 0.1, 0.9, 1e-4, True) for name in OPTIMIZERS}
    assert {name: type(optimizer) for name, optimizer in built.items()} == {
        "sgd": torch.optim.SGD,
        "adamw": torch.optim.AdamW,
    }
    assert all(
        (o.defaults["lr"], o.defaults["weight_decay"]) == (0.1, 1e-4) for o in built.values()
    )
    assert (built["sgd"].defaults["momentum"], built["sgd"].defaults["nesterov"]) == (0.9, True)
