"""Sums by chunks against the same function on whole tensors: values, gradients, chunk borders, odd
inputs.
"""

import pytest
import torch
import torch.nn.functional as F

from losses import voxelwise
from losses.voxelwise import voxel_chunks, voxel_sums


def sums(logits, teacher, label):
    """Two different sums, one of which needs the labels."""
    log_p = F.log_softmax(logits.float(), dim=1)
    picked = log_p.gather(1, label.long())
    return torch.stack([-(teacher * log_p).sum(), picked.square().sum()])  # no cancellation


def make(shape=(2, 3, 5, 4, 3), seed=0):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=rng).requires_grad_()
    teacher = torch.rand(shape, generator=rng)
    label = torch.randint(0, shape[1], (shape[0], 1, *shape[2:]), generator=rng).float()
    return logits, teacher, label


@pytest.mark.parametrize("elements", [1, 9, 30, 1 << 18])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4, 3), (1, 4, 7, 3)])
def test_equals_the_whole(monkeypatch, elements, shape):
    monkeypatch.setattr(voxelwise, "CHUNK_ELEMENTS", elements)
    logits, teacher, label = make(shape)
    found = voxel_sums(sums, logits, teacher, label)
    expected = sums(logits, teacher, label)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weights = torch.tensor([0.3, -2.0])
    gradients = [torch.autograd.grad(value @ weights, logits)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_sum_is_evaluated_once(monkeypatch, dtype):
    monkeypatch.setattr(voxelwise, "CHUNK_ELEMENTS", 30)
    logits, teacher, label = make()
    logits = logits.detach().to(dtype).requires_grad_()
    calls = []

    def one(*parts):
        calls.append(1)
        return sums(*parts)[:1]

    found = voxel_sums(one, logits, teacher, label)
    evaluations = len(calls)
    scaled = (3.0 * found.sum()).sqrt()
    first, second = (torch.autograd.grad(scaled, logits, retain_graph=True)[0] for _ in range(2))
    assert len(calls) == evaluations == len(list(voxel_chunks(logits)))
    (expected,) = torch.autograd.grad((3.0 * sums(logits, teacher, label)[0]).sqrt(), logits)
    assert torch.equal(first, second) and first.dtype == dtype
    torch.testing.assert_close(
        first, expected, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-6
    )


def test_chunks_cover_every_voxel_once(monkeypatch):
    monkeypatch.setattr(voxelwise, "CHUNK_ELEMENTS", 21)
    covered = torch.zeros(2, 60)
    for sample, voxels in voxel_chunks(torch.zeros(2, 3, 5, 4, 3)):
        assert voxels.stop - voxels.start <= 7
        covered[sample, voxels] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize(
    "layout", [lambda x: x.to(memory_format=torch.channels_last_3d), lambda x: x.flip(4)]
)
def test_layout_of_memory_does_not_matter(monkeypatch, layout):
    monkeypatch.setattr(voxelwise, "CHUNK_ELEMENTS", 30)
    logits, teacher, label = make()
    changed = layout(logits.detach()).requires_grad_()
    found = voxel_sums(sums, changed, layout(teacher), layout(label))
    torch.testing.assert_close(
        found, sums(changed, layout(teacher), layout(label)), rtol=1e-5, atol=1e-6
    )
    (gradient,) = torch.autograd.grad(found.sum(), changed)
    (expected,) = torch.autograd.grad(sums(logits, teacher, label).sum(), logits)
    torch.testing.assert_close(gradient, layout(expected), rtol=1e-5, atol=1e-6)


def test_constants_get_no_gradient_and_half_precision_keeps_its_type():
    logits, teacher, label = make()
    teacher.requires_grad_()
    half = logits.detach().bfloat16().requires_grad_()
    voxel_sums(sums, half, teacher, label).sum().backward()
    assert teacher.grad is None and half.grad.dtype == torch.bfloat16


def test_without_gradient_nothing_is_recorded():
    logits, teacher, label = make()
    assert not voxel_sums(sums, logits.detach(), teacher, label).requires_grad
    with torch.no_grad():
        assert not voxel_sums(sums, logits, teacher, label).requires_grad
