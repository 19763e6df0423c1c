"""Optimisers by name and the step schedule."""

import itertools

import pytest
import torch

from utils.schedules import OPTIMIZERS, SCHEDULES, build_optimizer, step_lr


def parameter():
    return torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))


def build(name, weight, momentum=0.9, weight_decay=0.1, nesterov=False):
    return build_optimizer(name, [weight], 0.5, momentum, weight_decay, nesterov)


def walk(optimizer, weight, gradients):
    path = []
    for gradient in gradients:
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        path.append(weight.item())
    return path


@pytest.mark.parametrize(
    "step, rate", [(0, 0.01), (2499, 0.01), (2500, 1e-3), (4999, 1e-3), (5000, 1e-4), (7500, 1e-5)]
)
def test_the_rate_falls_tenfold_after_each_period(step, rate):
    assert step_lr(step, 0.01, 2500) == pytest.approx(rate, rel=1e-12)


def test_the_rate_does_not_fall_below_the_smallest():
    assert step_lr(5000, 0.01, 2500, 5e-4) == 5e-4
    assert step_lr(2500, 0.01, 2500, 5e-4) == pytest.approx(1e-3)
    assert step_lr(10**6, 0.01, 2500, 5e-4) == 5e-4


def test_the_rate_of_a_training_of_one_period_is_constant():
    assert {step_lr(step, 0.01, 30) for step in range(30)} == {0.01}


def test_the_rate_never_rises():
    rates = [step_lr(step, 0.3, 7, 1e-4) for step in range(50)]
    assert all(a >= b for a, b in itertools.pairwise(rates)) and len(set(rates)) == 5


def test_the_schedule_is_found_by_name():
    assert SCHEDULES["step"] is step_lr


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_settings_arrive(nesterov):
    optimizer = build("sgd", parameter(), nesterov=nesterov)
    assert type(optimizer) is torch.optim.SGD
    group = optimizer.param_groups[0]
    settings = {
        key: group[key] for key in ("lr", "momentum", "weight_decay", "nesterov", "dampening")
    }
    assert settings == {
        "lr": 0.5,
        "momentum": 0.9,
        "weight_decay": 0.1,
        "nesterov": nesterov,
        "dampening": 0,
    }


def test_adamw_settings_arrive_and_momentum_is_of_no_use_to_it():
    optimizer = build("adamw", parameter(), nesterov=True)
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.5, 0.1, (0.9, 0.999))


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_takes_the_steps_of_its_formula(nesterov):
    weight, gradients = parameter(), (1.0, -0.5, 0.25)
    found = walk(build("sgd", weight, nesterov=nesterov), weight, gradients)
    value, velocity, expected = 2.0, 0.0, []
    for gradient in gradients:
        decayed = gradient + 0.1 * value
        velocity = 0.9 * velocity + decayed
        value -= 0.5 * (decayed + 0.9 * velocity if nesterov else velocity)
        expected.append(value)
    assert found == pytest.approx(expected, rel=1e-12)


def test_adamw_decays_apart_from_the_gradient():
    weight = parameter()
    (found,) = walk(build("adamw", weight), weight, [3.0])
    assert found == pytest.approx(2.0 * (1 - 0.5 * 0.1) - 0.5, rel=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_may_come_from_a_generator(name):
    layer = torch.nn.Linear(2, 3)
    optimizer = build_optimizer(name, (p for p in layer.parameters()), 0.1, 0.9, 0.0, False)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for p in layer.parameters()
    ]
