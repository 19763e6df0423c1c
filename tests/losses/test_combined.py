"""Several methods at once: terms, gradients, names and labels are those of the methods by
themselves.
"""

import numpy as np
import pytest
import torch
from torch import nn

import tests.losses.reference as ref
from losses import KD_METHODS, build_kd
from losses.combined import Combined
from losses.incomplete import UNKNOWN

GRID = (4, 4, 4)
STUDENT = {"acf": (3, GRID), "stage1": (3, GRID), "decoder": (3, GRID)}
TEACHER = {"corrected": (5, GRID), "residual": (5, GRID), "stage1": (2, GRID), "decoder": (4, GRID)}
CHANNELS = ref.channels(STUDENT), ref.channels(TEACHER), 4


class Stub(nn.Module):
    """A method that keeps what it was given and reports what it is told to."""

    def __init__(self, terms, monitor=None, incomplete=None):
        super().__init__()
        self.terms, self.monitor = terms, monitor or {}
        if incomplete is not None:
            self.incomplete = incomplete

    def forward(self, student, teacher, label, progress):
        self.label, self.progress = label, progress
        return self.terms


@pytest.mark.parametrize(
    "name, ordered",
    [
        ("dist+acf_bckd", ["acf_bckd", "dist"]),
        ("kd+cwd+dist", ["cwd", "dist", "kd"]),
        ("ifvd+dkd+at+acf_bckd", ["acf_bckd", "at", "dkd", "ifvd"]),
    ],
)
def test_terms_and_gradients_are_those_of_the_methods_alone(name, ordered):
    case = ref.make_case(spatial=GRID, student_taps=STUDENT, teacher_taps=TEACHER)
    arguments = {"dkd": {"warmup": 0.8}, "kd": {"weight": 3.0}, "dist": {"tau": 2.0}}
    arguments = {method: arguments.get(method, {}) for method in ordered}
    together = build_kd(name, *CHANNELS, **arguments)
    assert list(together.methods) == ordered
    expected, inputs = {}, list(ref.leaves(case.student).values())
    gradients = [torch.zeros_like(each, dtype=torch.float64) for each in inputs]
    for method in ordered:
        alone = build_kd(method, *CHANNELS, **arguments[method])
        alone.load_state_dict(together.methods[method].state_dict())
        terms = ref.evaluate(alone, case)
        expected |= terms
        total = sum(terms.values())
        for sums, part in zip(gradients, torch.autograd.grad(total, inputs, allow_unused=True)):
            if part is not None:
                sums += part.double()
    found = ref.evaluate(together, case)
    assert list(found) == list(expected)
    assert all(torch.equal(found[term], expected[term]) for term in expected)
    parts = torch.autograd.grad(sum(found.values()), inputs, allow_unused=True)
    for sums, part in zip(gradients, parts):
        part = torch.zeros_like(sums) if part is None else part.double()
        assert torch.allclose(part, sums, rtol=1e-5, atol=1e-5 * float(sums.abs().max()))


def test_the_sum_against_slow_arithmetic():
    """KD and CWD, voxel by voxel and channel by channel in float64, at weights of their own."""
    case = ref.make_case(spatial=(3, 2, 2))
    module = build_kd("kd+cwd", {}, {}, 4, kd={"weight": 3.0}, cwd={"weight": 0.5, "tau": 2.0})
    student, teacher = ref.as_arrays(case.student).logits, ref.as_arrays(case.teacher).logits
    kd = cwd = 0.0
    for p, q in zip(student, teacher):
        p, q = p.reshape(4, -1), q.reshape(4, -1)
        for voxel in range(p.shape[1]):
            kd += ref.kl(ref.softmax(q[:, voxel]), ref.softmax(p[:, voxel]))
        for channel in range(4):
            cwd += ref.kl(ref.softmax(q[channel] / 2), ref.softmax(p[channel] / 2))
    expected = 3.0 * kd / student.size + 0.5 * 2.0**2 * cwd / (2 * 4)
    found = sum(ref.evaluate(module, case).values())
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_a_combination_learns_what_each_method_learns():
    torch.manual_seed(0)
    first = build_kd("acf_bckd+dist", *CHANNELS)
    torch.manual_seed(0)
    second = build_kd("dist+acf_bckd", *CHANNELS)
    names = {name for name, _ in build_kd("acf_bckd", *CHANNELS).named_parameters()}
    assert {name for name, _ in first.named_parameters()} == {
        f"methods.acf_bckd.{n}" for n in names
    }
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_names_that_meet_carry_the_method():
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    methods = {
        "first": Stub({"kd": one, "own": one}, {"sure": two}),
        "second": Stub({"kd": two, "sure": one}),
    }
    module = Combined(methods)
    found = ref.evaluate(module, ref.make_case())
    assert found == {"first.kd": one, "own": one, "second.kd": two, "second.sure": one}
    assert module.monitor == {"first.sure": two}
    assert [each.progress for each in methods.values()] == [0.5, 0.5]


@pytest.mark.parametrize("multilabel", [False, True])
def test_each_method_gets_the_labels_that_it_can_take(multilabel):
    case = ref.make_case(multilabel=multilabel)
    label = case.label.to(torch.uint8)
    label[:, :, 0] = UNKNOWN
    knows, plain = Stub({}, incomplete=True), Stub({})
    module = Combined({"knows": knows, "plain": plain}, multilabel)
    assert module.incomplete
    module(case.student, case.teacher, label, 0.0)
    assert torch.equal(knows.label, label)
    logits = case.teacher.logits
    predicted = logits >= 0 if multilabel else logits.argmax(1, keepdim=True)
    expected = label.where(label != UNKNOWN, predicted.to(label.dtype))
    assert torch.equal(plain.label, expected)
    knows.incomplete = False
    module(case.student, case.teacher, case.label, 0.0)
    assert not module.incomplete and plain.label is case.label


def test_incomplete_labels_are_announced_to_every_method():
    module = build_kd("kd+dkd", {}, {}, 4, incomplete=True)
    assert module.incomplete and module.methods["dkd"].incomplete
    assert not build_kd("kd+cwd", {}, {}, 4, incomplete=True).incomplete


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("kd+dst", {}, "method: unknown name 'dst'; did you mean 'dist'"),
        ("kd+", {}, "method: unknown name ''; choose from"),
        ("kd+cwd+kd", {}, "'kd[+]cwd[+]kd' has kd twice"),
        ("supervised+kd", {}, "the segmentation loss is part of every distillation"),
        ("kd+cwd", {"dist": {}}, "method kd[+]cwd: unknown name 'dist'"),
        ("kd+cwd", {"cwd": {"mood": 1}}, "method 'cwd' has no argument mood"),
        ("kd+at", {}, "at: no taps to compare"),
    ],
)
def test_mistakes(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_kd(name, {}, {}, 4, **arguments)


def test_all_methods_at_once():
    """No two of the methods have a term of one name."""
    taps = {tap: 4 for tap in ("acf", "corrected", "residual", "decoder", "penultimate")}
    taps |= {f"stage{k}": 4 for k in range(1, 8)}
    small = {"cirkd": {"pixel_queue": 200, "region_queue": 100}}
    module = build_kd("+".join(KD_METHODS), taps, taps, 4, **small)
    maps = {tap: (4, GRID) for tap in taps}
    terms = ref.evaluate(module, ref.make_case(spatial=GRID, student_taps=maps, teacher_taps=maps))
    assert not any("." in term for term in terms)
    assert all(np.isfinite(value.item()) for value in terms.values())
