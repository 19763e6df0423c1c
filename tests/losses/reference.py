"""What the tests of distillation losses share: random cases, slow float64 arithmetic, and checks of
the contract.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Output(NamedTuple):
    """Stands in for a network's output, with tensors or with float64 arrays."""

    logits: Tensor | np.ndarray
    features: dict


class Case(NamedTuple):
    student: Output
    teacher: Output
    label: Tensor


def make_case(
    num_classes: int = 4,
    spatial: tuple[int, ...] = (4, 3, 2),
    multilabel: bool = False,
    batch: int = 2,
    seed: int = 0,
    student_taps: dict | None = None,
    teacher_taps: dict | None = None,
) -> Case:
    """Random logits and features, all leaves that require a gradient; taps are {name: (channels,
    grid)}.
    """
    rng = torch.Generator().manual_seed(seed)

    def leaf(channels: int, grid: tuple[int, ...], scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(batch, channels, *grid, generator=rng)).requires_grad_()

    def output(taps: dict | None, scale: float) -> Output:
        return Output(
            leaf(num_classes, spatial, scale),
            {name: leaf(*shape) for name, shape in (taps or {}).items()},
        )

    student, teacher = output(student_taps, 1.5), output(teacher_taps, 2.5)
    if multilabel:
        label = torch.rand(batch, num_classes, *spatial, generator=rng) < 0.4
    else:
        label = torch.randint(0, num_classes, (batch, 1, *spatial), generator=rng).float()
    return Case(student, teacher, label)


def channels(taps: dict | None) -> dict[str, int]:
    return {name: shape[0] for name, shape in (taps or {}).items()}


def apply(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    """The case with `change` applied to every student and teacher tensor, as new leaves."""

    def leaf(tensor: Tensor) -> Tensor:
        return change(tensor.detach()).requires_grad_()

    def output(old: Output) -> Output:
        return Output(leaf(old.logits), {name: leaf(value) for name, value in old.features.items()})

    return Case(output(case.student), output(case.teacher), case.label)


def leaves(output: Output) -> dict[str, Tensor]:
    return {"logits": output.logits, **output.features}


def evaluate(module: torch.nn.Module, case: Case) -> dict[str, Tensor]:
    return module(case.student, case.teacher, case.label, 0.5)


def as_arrays(output: Output) -> Output:
    def array(tensor: Tensor) -> np.ndarray:
        return tensor.detach().double().numpy()

    return Output(
        array(output.logits), {name: array(value) for name, value in output.features.items()}
    )


# Slow float64 arithmetic on vectors, written out on purpose.


def softmax(vector: np.ndarray) -> np.ndarray:
    powers = np.exp(vector - vector.max())
    return powers / powers.sum()


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-np.asarray(x, dtype=np.float64)))


def kl(q: np.ndarray, p: np.ndarray) -> float:
    return float(
        sum(a * (np.log(a) - np.log(b)) for a, b in zip(np.ravel(q), np.ravel(p)) if a > 0)
    )


def binary_kl(q: float, p: float) -> float:
    return kl(np.array([q, 1 - q]), np.array([p, 1 - p]))


def columns(array: np.ndarray):
    """Yield (sample, flat voxel, channel vector) of an array (B, C, *spatial)."""
    flat = array.reshape(*array.shape[:2], -1)
    for b in range(flat.shape[0]):
        for v in range(flat.shape[2]):
            yield b, v, flat[b, :, v]


def nearest(array: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """Nearest-neighbour resize of (B, C, *spatial): output index i reads floor(i * in / out)."""
    for axis, size in enumerate(grid, start=2):
        index = [i * array.shape[axis] // size for i in range(size)]
        array = np.take(array, index, axis=axis)
    return array


# Checks of the contract that every loss has.


def check_values(module, case: Case, slow: Callable, rtol: float = 2e-5, entries: int = 5) -> None:
    """Terms equal those of `slow(student, teacher, label)` on float64 arrays; gradients its central
    differences.
    """
    student, teacher = as_arrays(case.student), as_arrays(case.teacher)
    label = case.label.numpy()
    expected = slow(student, teacher, label)
    terms = evaluate(module, case)
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        assert term.shape == () and term.dtype == torch.float32
        np.testing.assert_allclose(term.item(), expected[name], rtol=rtol, atol=1e-7, err_msg=name)

    inputs = leaves(case.student)
    gradients = torch.autograd.grad(sum(terms.values()), list(inputs.values()), allow_unused=True)
    arrays = leaves(student)
    picks = np.random.default_rng(7)
    step = 1e-4
    for (name, tensor), gradient in zip(inputs.items(), gradients):
        gradient = torch.zeros_like(tensor) if gradient is None else gradient
        flat, scale = arrays[name].reshape(-1), gradient.abs().max().item()
        largest = int(gradient.abs().argmax())
        for index in [largest, *picks.choice(flat.size, entries, replace=False)]:
            before, sums = flat[index], []
            for delta in (step, -step):
                flat[index] = before + delta
                sums.append(sum(slow(student, teacher, label).values()))
            flat[index] = before
            numeric = (sums[0] - sums[1]) / (2 * step)
            found = gradient.reshape(-1)[index].item()
            assert abs(found - numeric) <= 2e-4 * scale + 1e-7, (name, index, found, numeric)


def check_teacher_constant(module, case: Case) -> None:
    """No gradient reaches the teacher, and some reaches the student."""
    total = sum(evaluate(module, case).values())
    total.backward()
    assert all(tensor.grad is None for tensor in leaves(case.teacher).values())
    student = [tensor.grad for tensor in leaves(case.student).values() if tensor.grad is not None]
    assert student and any(gradient.abs().max() > 0 for gradient in student)


def check_range(module, case: Case) -> None:
    """Finite values and gradients in half precision and at extreme inputs; autocast changes nothing
    but rounding.
    """
    changes = [
        lambda x: x.half(),
        lambda x: x.bfloat16(),
        lambda x: 1e4 * x.sign(),
        lambda x: (1e4 * x.sign()).half(),
        lambda x: 1e4 * x,
        lambda x: 0.0 * x,
    ]
    for change in changes:
        check_finite(module, apply(case, change))
    plain = evaluate(module, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = evaluate(module, case)
    for name in plain:
        torch.testing.assert_close(mixed[name], plain[name], rtol=1e-5, atol=1e-6)


def check_finite(module, case: Case) -> None:
    terms = evaluate(module, case)
    assert all(term.dtype == torch.float32 and torch.isfinite(term) for term in terms.values()), (
        terms
    )
    sum(terms.values()).backward()
    for name, tensor in leaves(case.student).items():
        assert tensor.grad is None or torch.isfinite(tensor.grad).all(), name


def check_batch_invariance(module, case: Case) -> None:
    """A batch of two copies of one sample has the value of that sample."""

    def take(count: int) -> Case:
        one = apply(case, lambda x: torch.cat([x[:1]] * count))
        return one._replace(label=torch.cat([case.label[:1]] * count))

    once, twice = evaluate(module, take(1)), evaluate(module, take(2))
    for name in once:
        torch.testing.assert_close(twice[name], once[name], rtol=2e-5, atol=1e-6)


def check_doubling(make: Callable, case: Case, weights: dict[str, tuple[float, str]]) -> None:
    """Doubling weight argument `key` from its default doubles the terms with its prefix and leaves
    the others.
    """
    plain = evaluate(make(), case)
    for key, (default, prefix) in weights.items():
        doubled = evaluate(make(**{key: 2 * default}), case)
        for name, term in plain.items():
            factor = 2.0 if name.startswith(prefix) else 1.0
            torch.testing.assert_close(doubled[name], factor * term, rtol=1e-6, atol=1e-7)


def same_as_teacher(case: Case) -> Case:
    """The student's tensors are the teacher's (where the teacher has the same shapes)."""
    copied = apply(case, lambda x: x.clone())
    return Case(apply(case, lambda x: x.clone()).teacher, copied.teacher, case.label)
