"""The four terms of ACF-BCKD against float64 loops over samples, classes, voxels and neighbours."""

import itertools
import math
import resource
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

import losses.acf_bckd as acf_bckd
from losses import build_kd
from losses.acf_bckd import (
    ACFBCKD,
    AttentionCorrection,
    boundary_shells,
    hard_boundary_loss,
    hard_boundary_weight,
    hidden_channels,
    soft_boundary_loss,
)
from tests.losses import reference as ref

STUDENT = {"acf": (3, (4, 4, 4))}
TEACHER = {"corrected": (5, (4, 4, 4)), "residual": (5, (4, 4, 4))}
TERMS = ("afd", "cfd", "hbd", "sbd")


# Boundary shells


def slow_shell(mask, border="count"):
    """Voxels with 0 < foreground neighbours < all; every neighbour is looked up."""
    shell = np.zeros(mask.shape, dtype=bool)
    offsets = [offset for offset in itertools.product((-1, 0, 1), repeat=mask.ndim) if any(offset)]
    for voxel in np.ndindex(mask.shape):
        count = 0
        for offset in offsets:
            place = [v + o for v, o in zip(voxel, offset)]
            if border == "ignore":
                place = [min(max(p, 0), n - 1) for p, n in zip(place, mask.shape)]
            if all(0 <= p < n for p, n in zip(place, mask.shape)):
                count += int(mask[tuple(place)])
        shell[voxel] = 0 < count < len(offsets)
    return shell


@pytest.mark.parametrize("border", ["count", "ignore"])
@pytest.mark.parametrize("shape", [(6, 5, 4), (3, 1, 4), (7, 6)])
def test_shells_equal_neighbour_counts(shape, border):
    rng = np.random.default_rng(0)
    masks = np.stack([rng.random(shape) < density for density in (0.0, 0.05, 0.5, 0.95, 1.0)])[None]
    found = boundary_shells(torch.from_numpy(masks), border)
    expected = np.stack([slow_shell(mask, border) for mask in masks[0]])[None]
    np.testing.assert_array_equal(found.numpy(), expected)


def test_shell_quirks():
    mask = torch.zeros(1, 3, 7, 7, 7, dtype=torch.bool)
    mask[0, 0, 3, 3, 3] = True  # an isolated voxel
    mask[0, 1] = True
    mask[0, 1, 3, 3, 3] = False  # a hole of one voxel
    mask[0, 2, :4] = True  # cut by the patch
    counted, ignored = boundary_shells(mask)[0], boundary_shells(mask, "ignore")[0]
    assert not counted[0, 3, 3, 3] and counted[0].sum() == 26
    assert not ignored[1, 3, 3, 3] and ignored[1].sum() == 26
    assert not counted[1, 3, 3, 3] and counted[1, 0, 0, 0] and counted[1, 2, 3, 3]
    # the patch's border counts as background,
    assert counted[2, 0].all() and counted[2, 1:3, 0].all()
    assert not ignored[2, :3].any() and ignored[2, 3:5].all()  # or the class goes on beyond it
    assert counted[2, 3:5].all() and not counted[2, 5:].any()


@pytest.mark.parametrize("border", ["count", "ignore"])
def test_shells_of_more_classes_than_one_integer_holds(border):
    rng = np.random.default_rng(1)
    masks = rng.random((2, 67, 4, 3, 3)) < rng.random((2, 67, 1, 1, 1))
    found = boundary_shells(torch.from_numpy(masks), border)
    alone = [boundary_shells(torch.from_numpy(masks[:, c : c + 1]), border) for c in range(67)]
    assert torch.equal(found, torch.cat(alone, dim=1))
    np.testing.assert_array_equal(found[1, 63].numpy(), slow_shell(masks[1, 63], border))


# Hard boundary


def slow_hard(
    student, teacher, label, multilabel=False, reduction="mean", border="count", label_classes=None
):
    """The formula class by class: the mean over a shell of KL(teacher || student), or of squared
    differences.
    """
    total, classes = 0.0, student.shape[1]
    for b in range(len(student)):
        for c in range(label_classes or classes):
            shell = slow_shell(label[b, c] > 0.5 if multilabel else label[b, 0] == c, border)
            values = []
            for voxel in zip(*np.nonzero(shell)):
                s, t = student[(b, slice(None), *voxel)], teacher[(b, slice(None), *voxel)]
                if multilabel:
                    values.append(np.sum((ref.sigmoid(s) - ref.sigmoid(t)) ** 2))
                else:
                    values.append(ref.kl(ref.softmax(t), ref.softmax(s)))
            if values:
                total += np.mean(values) / (classes if reduction == "mean" else 1)
    return total


def blob_case(multilabel=False, spatial=(6, 5, 4), **arguments):
    """A case whose label has blocks instead of noise, with one class absent from the second
    sample.
    """
    case = ref.make_case(multilabel=multilabel, spatial=spatial, **arguments)
    label = torch.zeros_like(case.label)
    if multilabel:
        label[0, 0, 1:5, 1:4] = label[0, 1, 2:4] = label[1, 0, :3] = True
    else:
        label[0, 0, 1:4, 1:4] = 1
        label[0, 0, 2, 2] = label[1, 0, 4:] = 2
        label[1, 0, 0, 0] = 3
    return case._replace(label=label)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("spatial", [(6, 5, 4), (7, 6)])
@pytest.mark.parametrize(
    "arguments", [{}, {"reduction": "voxel"}, {"border": "ignore"}, {"label_classes": 3}], ids=str
)
def test_hard_boundary_equals_slow_loops(multilabel, spatial, arguments):
    if multilabel and "label_classes" in arguments:
        arguments = {}
    case = blob_case(multilabel, spatial)
    value = hard_boundary_loss(
        case.student.logits, case.teacher.logits, case.label, multilabel, **arguments
    )
    student, teacher = (ref.as_arrays(output).logits for output in (case.student, case.teacher))
    expected = slow_hard(student, teacher, case.label.numpy(), multilabel, **arguments)
    assert value.shape == () and expected > 0
    assert value.item() == pytest.approx(expected, rel=2e-5)

    (gradient,) = torch.autograd.grad(value, case.student.logits)
    flat, step = student.reshape(-1), 1e-4
    scale = gradient.abs().max().item()
    for index in (int(gradient.abs().argmax()), 1, flat.size // 2):
        before, sums = flat[index], []
        for delta in (step, -step):
            flat[index] = before + delta
            sums.append(slow_hard(student, teacher, case.label.numpy(), multilabel, **arguments))
        flat[index] = before
        numeric = (sums[0] - sums[1]) / (2 * step)
        assert gradient.reshape(-1)[index].item() == pytest.approx(numeric, abs=2e-4 * scale)


def test_hard_boundary_hand_value():
    # A line of two voxels, one of each class: both shells are the voxel across. KL((1/2, 1/2) ||
    # (1/4, 3/4)) at each.
    student = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1, 1).repeat(1, 1, 1, 1, 2)
    label = torch.tensor([0.0, 1.0]).view(1, 1, 1, 1, 2)
    divergence = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    value = hard_boundary_loss(student, torch.zeros_like(student), label)
    assert value.item() == pytest.approx(divergence)  # two shells, each divided by two classes
    assert hard_boundary_loss(
        student, torch.zeros_like(student), label, reduction="voxel"
    ).item() == pytest.approx(2 * divergence)


@pytest.mark.parametrize("multilabel", [False, True])
def test_hard_boundary_of_more_classes_than_one_integer_holds(multilabel):
    case = ref.make_case(num_classes=35, spatial=(4, 3, 3), multilabel=multilabel, seed=4)
    if not multilabel:
        case.label[0] = 33  # one class only
    value = hard_boundary_loss(case.student.logits, case.teacher.logits, case.label, multilabel)
    student, teacher = (ref.as_arrays(output).logits for output in (case.student, case.teacher))
    assert value.item() == pytest.approx(
        slow_hard(student, teacher, case.label.numpy(), multilabel), rel=2e-5
    )


def test_ids_outside_the_classes_have_no_shell():
    case = blob_case()
    label = case.label.clone()
    label[0, 0, 0], label[1, 0, 5] = 255, -1
    value = hard_boundary_loss(case.student.logits, case.teacher.logits, label)
    student, teacher = (ref.as_arrays(output).logits for output in (case.student, case.teacher))
    assert value.item() == pytest.approx(slow_hard(student, teacher, label.numpy()), rel=2e-5)


@pytest.mark.parametrize("multilabel", [False, True])
def test_hard_boundary_without_any_boundary_is_an_exact_zero_with_gradient(multilabel):
    case = blob_case(multilabel)
    label = torch.zeros_like(case.label)  # background everywhere; the patch's border is ignored
    value = hard_boundary_loss(
        case.student.logits, case.teacher.logits, label, multilabel, border="ignore"
    )
    value.backward()
    assert value.item() == 0.0 and (case.student.logits.grad == 0).all()


@pytest.mark.parametrize("place", [(0, 0, 0), (0, 0, 1)])
def test_a_shell_that_is_only_the_first_voxel_counts(place):
    # The released code skips a shell by the sum of its indices, so one that is only voxel 0 was
    # lost there.
    case = ref.make_case(num_classes=2, spatial=(1, 1, 2), batch=1)
    label = torch.zeros(1, 1, 1, 1, 2)
    label[(0, 0, *place)] = 1
    value = hard_boundary_loss(case.student.logits, case.teacher.logits, label)
    arrays = [ref.as_arrays(output).logits for output in (case.student, case.teacher)]
    assert value.item() == pytest.approx(slow_hard(*arrays, label.numpy()), rel=1e-5)


# Soft boundary


def slow_field(mask):
    if mask.all() or not mask.any():
        return np.zeros(mask.shape)
    return distance_transform_edt(mask) ** 2 + distance_transform_edt(~mask) ** 2


def slow_soft(student, teacher, multilabel=False, fixed=None, absent="count"):
    """log(1 + mean (P - G)^2 (D(P > 0.5)^2 + D(G)^2)); `fixed` logits give P > 0.5, for difference
    quotients. absent 'skip': the mean is over the maps of which P > 0.5 is not empty.
    """
    fixed, terms = student if fixed is None else fixed, []
    probs = ref.sigmoid(student) if multilabel else np.apply_along_axis(ref.softmax, 1, student)
    hard = (ref.sigmoid(fixed) if multilabel else np.apply_along_axis(ref.softmax, 1, fixed)) > 0.5
    for b in range(len(student)):
        for c in range(0 if multilabel else 1, student.shape[1]):
            if absent == "skip" and not hard[b, c].any():
                continue
            target = ref.sigmoid(teacher[b, c]) >= 0.5 if multilabel else teacher[b].argmax(0) == c
            terms.append(
                (probs[b, c] - target) ** 2 * (slow_field(hard[b, c]) + slow_field(target))
            )
    return math.log(1 + np.mean(terms)) if terms else 0.0


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("spatial", [(6, 5, 4), (7, 6)])
def test_soft_boundary_equals_slow_reference(multilabel, spatial):
    case = ref.make_case(multilabel=multilabel, spatial=spatial)
    value = soft_boundary_loss(case.student.logits, case.teacher.logits, multilabel)
    student, teacher = (ref.as_arrays(output).logits for output in (case.student, case.teacher))
    assert value.item() == pytest.approx(slow_soft(student, teacher, multilabel), rel=2e-5)

    (gradient,) = torch.autograd.grad(value, case.student.logits)
    flat, fixed, step = student.reshape(-1), student.copy(), 1e-4
    scale = gradient.abs().max().item()
    for index in (int(gradient.abs().argmax()), 3, flat.size // 2, flat.size - 1):
        before, sums = flat[index], []
        for delta in (step, -step):
            flat[index] = before + delta
            sums.append(slow_soft(student, teacher, multilabel, fixed))
        flat[index] = before
        numeric = (sums[0] - sums[1]) / (2 * step)
        assert gradient.reshape(-1)[index].item() == pytest.approx(numeric, abs=2e-4 * scale)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("spatial", [(6, 5, 4), (7, 6)])
@pytest.mark.parametrize("gone", [[], [(0, 1)], [(0, 1), (0, 3), (1, 2)], "all"])
def test_soft_boundary_without_absent_classes_equals_slow_reference(gone, spatial, multilabel):
    case = ref.make_case(multilabel=multilabel, spatial=spatial)
    logits = case.student.logits.detach()
    for b, c in itertools.product(range(2), range(4)) if gone == "all" else gone:
        logits[b, c] = -3.0 - logits[b, c].abs()  # below a half everywhere
    if gone == "all" and not multilabel:
        logits[:, 0] = 3.0  # background does not count
    inputs = logits.requires_grad_(), case.teacher.logits, multilabel
    value = soft_boundary_loss(*inputs, absent="skip")
    student, teacher = logits.detach().double().numpy(), case.teacher.logits.detach().double()
    teacher = teacher.numpy()
    expected = slow_soft(student, teacher, multilabel, absent="skip")
    assert value.item() == pytest.approx(expected, rel=2e-5)
    assert (expected == 0) == (gone == "all")
    counted = soft_boundary_loss(*inputs).item()
    assert counted == pytest.approx(slow_soft(student, teacher, multilabel), rel=2e-5)
    assert (counted == value.item()) == (gone == [])

    (gradient,) = torch.autograd.grad(value, logits)
    flat, fixed, step = student.reshape(-1), student.copy(), 1e-4
    scale = gradient.abs().max().item()
    assert (scale == 0) == (gone == "all")
    for index in (int(gradient.abs().argmax()), 3, flat.size // 2, flat.size - 1):
        before, sums = flat[index], []
        for delta in (step, -step):
            flat[index] = before + delta
            sums.append(slow_soft(student, teacher, multilabel, fixed, "skip"))
        flat[index] = before
        numeric = (sums[0] - sums[1]) / (2 * step)
        assert gradient.reshape(-1)[index].item() == pytest.approx(numeric, abs=2e-4 * scale)


def test_absent_classes_are_what_the_module_is_told():
    case = make_module_case()
    case.student.logits.data[0, 2] = -9.0
    student, teacher = ref.as_arrays(case.student).logits, ref.as_arrays(case.teacher).logits
    for absent in ("count", "skip"):
        found = make(sbd_absent=absent)(case.student, case.teacher, case.label, 1.0)["sbd"]
        expected = slow_soft(student, teacher, absent=absent)
        assert found.item() == pytest.approx(0.999 * expected, rel=2e-5)
    assert make().options.sbd_absent == "count"


@pytest.mark.parametrize("kind", ["noise", "absent", "voxel", "border"])
def test_soft_boundary_on_hard_predictions_equals_slow_reference(kind):
    shape, rng = (2, 4, 7, 6, 5), torch.Generator().manual_seed(2)
    if kind == "noise":
        label = torch.randint(0, 4, (2, 7, 6, 5), generator=rng)
    else:
        label = torch.zeros(2, 7, 6, 5, dtype=torch.int64)  # absent: background only
        if kind == "voxel":
            label[0, 3, 2, 4], label[1, 6, 5, 4] = 2, 3
        elif kind == "border":
            label[0, :, 0], label[1, 5:] = 1, 3
    teacher = 9.0 * torch.nn.functional.one_hot(label, 4).movedim(-1, 1) + torch.rand(
        shape, generator=rng
    )
    student = (teacher.roll(1, 4) + torch.randn(shape, generator=rng)).requires_grad_()
    value = soft_boundary_loss(student, teacher)
    expected = slow_soft(student.detach().double().numpy(), teacher.double().numpy())
    assert value.item() == pytest.approx(expected, rel=2e-5, abs=1e-7)
    value.backward()
    assert torch.isfinite(student.grad).all()


def test_memory_does_not_grow():
    case = blob_case(spatial=(16, 16, 16))
    call_bytes = 4 * case.student.logits.numel()

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )

    def call():
        hard = hard_boundary_loss(case.student.logits, case.teacher.logits, case.label)
        (hard + soft_boundary_loss(case.student.logits, case.teacher.logits)).backward()
        case.student.logits.grad = None

    for _ in range(10):
        call()
    before = peak()
    for _ in range(200):
        call()
    assert peak() - before < 200 * call_bytes / 4


def test_soft_boundary_hand_value():
    # Sigmoid 1/2 everywhere: the student's mask is empty, its field 0. Teacher: the right one of
    # three voxels.
    teacher = torch.tensor([-9.0, -9.0, 9.0]).view(1, 1, 1, 1, 3)
    value = soft_boundary_loss(torch.zeros_like(teacher), teacher, multilabel=True)
    assert value.item() == pytest.approx(math.log(1 + 0.25 * (4 + 1 + 1) / 3))
    # The teacher counts from sigmoid 0.5 on: a logit of exactly 0 is foreground.
    teacher = torch.tensor([-9.0, -9.0, 0.0]).view(1, 1, 1, 1, 3)
    assert soft_boundary_loss(
        torch.zeros_like(teacher), teacher, multilabel=True
    ).item() == pytest.approx(value.item())


def test_soft_boundary_leaves_the_background_channel_out():
    case = ref.make_case(num_classes=2, spatial=(4, 4, 4))
    value = soft_boundary_loss(case.student.logits, case.teacher.logits)
    student, teacher = case.student.logits, case.teacher.logits
    as_region = soft_boundary_loss(
        student[:, 1:] - student[:, :1], teacher[:, 1:] - teacher[:, :1], multilabel=True
    )
    torch.testing.assert_close(value, as_region)  # two classes by softmax are one region by sigmoid


@pytest.mark.parametrize("multilabel", [False, True])
def test_boundary_terms_vanish_at_the_teacher(multilabel):
    case = blob_case(multilabel)
    sure = 50 * case.teacher.logits.detach().sign() + case.teacher.logits.detach()
    if not multilabel:
        sure = 60 * torch.nn.functional.one_hot(sure.argmax(1), 4).movedim(-1, 1).float()
    assert hard_boundary_loss(sure, sure, case.label, multilabel).item() == pytest.approx(
        0.0, abs=1e-6
    )
    assert soft_boundary_loss(sure, sure, multilabel).item() == pytest.approx(0.0, abs=1e-6)


# Attention correction


def slow_attention(state, feature):
    """Channel gate times spatial gate of one (B, C, H, W, D) float64 array, voxel by voxel."""

    def gate(x):
        return np.clip((x + 3) / 6, 0, 1)

    w1, b1, w2, b2, w7, b7 = (
        state[f"attn.{name}"]
        for name in (
            "ch_attn.1.conv.weight",
            "ch_attn.1.conv.bias",
            "ch_attn.2.conv.weight",
            "ch_attn.2.conv.bias",
            "sp_attn.conv.weight",
            "sp_attn.conv.bias",
        )
    )
    attention = np.zeros_like(feature)
    for b, sample in enumerate(feature):
        pooled = sample.reshape(len(sample), -1).mean(1)
        channel = gate(w2[..., 0, 0, 0] @ np.maximum(w1[..., 0, 0, 0] @ pooled + b1, 0) + b2)
        padded = np.pad(sample.mean(0), 3)
        for x, y, z in np.ndindex(sample.shape[1:]):
            spatial = gate(np.sum(padded[x : x + 7, y : y + 7, z : z + 7] * w7[0, 0]) + b7[0])
            attention[b, :, x, y, z] = channel * spatial
    return attention


def slow_distance(student, teacher, reduction="mean"):
    total = 0.0
    for ours, theirs in zip(student, teacher):
        a, b = (np.mean(x**2, axis=0).ravel() for x in (ours, theirs))
        difference = a / max(np.linalg.norm(a), 1e-12) - b / max(np.linalg.norm(b), 1e-12)
        total += np.sum(difference**2) / len(student) / (a.size if reduction == "mean" else 1)
    return total


def slow_features(module, feature, teacher_feature, teacher_correction, reduction="mean"):
    state = {key: value.double().numpy() for key, value in module.state_dict().items()}
    attention = slow_attention(state, feature)
    projected = np.einsum("oi,bixyz->boxyz", state["convertor2.weight"][..., 0, 0, 0], attention)
    projected += state["convertor2.bias"].reshape(1, -1, 1, 1, 1)
    size = teacher_feature.shape[2:]
    return (
        slow_distance(ref.nearest(attention * feature, size), teacher_feature, reduction),
        slow_distance(ref.nearest(projected, size), teacher_correction, reduction),
    )


def randomised(channels, seed=3):
    """A module whose biases are not 0 and whose gates are neither all open nor all shut."""
    torch.manual_seed(seed)
    module = AttentionCorrection(channels)
    for parameter in module.parameters():
        torch.nn.init.normal_(
            parameter, std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        )
    return module


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "grid", [(4, 4, 4), (8, 8, 8), (2, 2, 2), (6, 4, 3)], ids=["same", "up", "down", "uneven"]
)
def test_attention_correction_equals_slow_reference(grid, reduction):
    module = randomised(3)
    rng = torch.Generator().manual_seed(1)
    feature = (2 * torch.randn(2, 3, 4, 4, 4, generator=rng)).requires_grad_()
    maps = [torch.randn(2, 5, *grid, generator=rng) for _ in range(2)]
    found = module(feature, *maps, reduction)
    array, *targets = (x.detach().double().numpy() for x in (feature, *maps))
    expected = slow_features(module, array, *targets, reduction)
    np.testing.assert_allclose([x.item() for x in found], expected, rtol=2e-5)

    (gradient,) = torch.autograd.grad(found[0] + 2 * found[1], feature)
    flat, step, scale = array.reshape(-1), 1e-5, gradient.abs().max().item()
    for index in (int(gradient.abs().argmax()), 5, 200):
        before, sums = flat[index], []
        for delta in (step, -step):
            flat[index] = before + delta
            afd, cfd = slow_features(module, array, *targets, reduction)
            sums.append(afd + 2 * cfd)
        flat[index] = before
        assert gradient.reshape(-1)[index].item() == pytest.approx(
            (sums[0] - sums[1]) / (2 * step), abs=5e-4 * scale
        )


@pytest.mark.parametrize("shape", [(2, 1, 5, 4, 9), (1, 1, 2, 3, 1), (2, 1, 8, 8, 8)])
@pytest.mark.parametrize("size", [3, 7])
def test_gradients_of_the_one_channel_convolution(shape, size):
    rng = torch.Generator().manual_seed(6)
    image = torch.randn(shape, generator=rng).requires_grad_()
    kernel = torch.randn(1, 1, size, size, size, generator=rng).requires_grad_()
    slope = torch.randn(shape, generator=rng)
    expected = torch.nn.functional.conv3d(image, kernel, padding=size // 2)
    found = acf_bckd._OneChannelConv.apply(image, kernel)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad((y * slope).sum(), [image, kernel]) for y in (found, expected))
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels, count", [(16, 896), (32, 1952)])
def test_parameter_names_and_counts(channels, count):
    kd = ACFBCKD({"acf": channels}, {"residual": 64, "corrected": 64}, 4)
    shapes = {name: tuple(parameter.shape) for name, parameter in kd.features.named_parameters()}
    assert shapes == {
        "attn.ch_attn.1.conv.weight": (8, channels, 1, 1, 1),
        "attn.ch_attn.1.conv.bias": (8,),
        "attn.ch_attn.2.conv.weight": (channels, 8, 1, 1, 1),
        "attn.ch_attn.2.conv.bias": (channels,),
        "attn.sp_attn.conv.weight": (1, 1, 7, 7, 7),
        "attn.sp_attn.conv.bias": (1,),
        "convertor2.weight": (channels, channels, 1, 1, 1),
        "convertor2.bias": (channels,),
    }
    assert sum(parameter.numel() for parameter in kd.parameters()) == count
    assert all(
        (parameter == 0).all() for name, parameter in kd.named_parameters() if name.endswith("bias")
    )


def test_a_saturated_gate_leaves_cfd_without_gradient():
    """With the spatial gate at 1 everywhere CFD compares a constant map: a fixed value, no gradient
    to the student. AFD goes on. At high learning rates the gate gets there within a hundred steps.
    """
    torch.manual_seed(0)
    module = AttentionCorrection(8)
    feature = torch.randn(2, 8, 4, 5, 6, requires_grad=True)
    teacher, correction = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6)
    for bias, stuck in ((0.0, False), (30.0, True)):
        torch.nn.init.constant_(module.attn.sp_attn.conv.bias, bias)
        afd, cfd = module(feature, teacher, correction)
        sizes = [
            torch.autograd.grad(term, feature, retain_graph=True)[0].norm().item()
            for term in (afd, cfd)
        ]
        assert sizes[0] > 1e-6
        assert (sizes[1] < 1e-3 * sizes[0]) == stuck
    constant = slow_distance(np.ones((2, 1, 4, 5, 6)), correction.double().numpy())
    assert cfd.item() == pytest.approx(constant, rel=1e-5)


def test_initialisation_is_kaiming_normal_fan_out():
    torch.manual_seed(0)
    module = AttentionCorrection(64)
    assert module.convertor2.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.05)
    assert module.attn.sp_attn.conv.weight.std().item() == pytest.approx(
        math.sqrt(2 / 343), rel=0.15
    )


@pytest.mark.parametrize(
    "channels, hidden", [(8, 8), (16, 8), (32, 8), (128, 8), (176, 16), (192, 16), (320, 24)]
)
def test_hidden_channels(channels, hidden):
    assert hidden_channels(channels) == hidden


# Schedule


@pytest.mark.parametrize(
    "epochs, floor, gamma, last",
    [
        (1000, 0.001, 0.001, 0.001),
        (1000, 0.5, 0.0005, 0.5005),
        (300, 0.5, 0.0015, 0.5515),
        (50, 0.5, 0.01, 0.51),
    ],
)
def test_schedule_at_epoch_starts_is_the_published_one(epochs, floor, gamma, last):
    weight, weights = 1.0, []
    for _ in range(epochs):
        weights.append(weight)
        weight = max(floor, weight - gamma)  # after every epoch
    found = [hard_boundary_weight(epoch / epochs, floor, gamma * epochs) for epoch in range(epochs)]
    np.testing.assert_allclose(found, weights, atol=1e-10)
    assert found[-1] == pytest.approx(last) and found[0] == 1.0


def test_schedule_floor():
    assert (
        hard_boundary_weight(1.0) == 0.001
        and hard_boundary_weight(0.9, floor=0.3, decay=1.0) == 0.3
    )


# The module


def make(**arguments):
    torch.manual_seed(5)
    return ACFBCKD(ref.channels(STUDENT), ref.channels(TEACHER), 4, **arguments)


def make_module_case(multilabel=False, **arguments):
    return blob_case(
        multilabel, spatial=(8, 8, 8), student_taps=STUDENT, teacher_taps=TEACHER, **arguments
    )


@pytest.mark.parametrize("multilabel", [False, True])
def test_terms_are_the_weighted_losses(multilabel):
    case = make_module_case(multilabel)
    kd = make(multilabel=multilabel, afd=3.0, cfd=5.0, hbd=2.0, sbd=7.0, floor=0.1, decay=0.5)
    terms = kd(case.student, case.teacher, case.label, 0.6)
    student, teacher = ref.as_arrays(case.student), ref.as_arrays(case.teacher)
    afd, cfd = slow_features(
        kd.features,
        student.features["acf"],
        teacher.features["corrected"],
        teacher.features["residual"],
    )
    label = case.label.numpy()
    expected = {
        "afd": 3 * afd,
        "cfd": 5 * cfd,
        "hbd": 2 * 0.7 * slow_hard(student.logits, teacher.logits, label, multilabel),
        "sbd": 7 * 0.3 * slow_soft(student.logits, teacher.logits, multilabel),
    }
    assert tuple(terms) == TERMS
    for name, term in terms.items():
        assert term.shape == () and term.dtype == torch.float32
        assert term.item() == pytest.approx(expected[name], rel=5e-5), name


def test_teacher_gets_no_gradient():
    ref.check_teacher_constant(make(), make_module_case())
    ref.check_teacher_constant(make(multilabel=True), make_module_case(True))


def test_every_parameter_gets_gradient():
    kd, case = make(), make_module_case()
    sum(kd(case.student, case.teacher, case.label, 0.5).values()).backward()
    # The gates are clipped, so that some entries are 0; none of the tensors is.
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in kd.parameters())


def test_doubling_a_weight_doubles_its_term():
    weights = {
        "afd": (25000.0, "afd"),
        "cfd": (25000.0, "cfd"),
        "hbd": (1.0, "hbd"),
        "sbd": (1.0, "sbd"),
    }
    ref.check_doubling(make, make_module_case(), weights)


def test_batch_of_copies():
    kd, case = make(), make_module_case()

    def take(count):
        copied = ref.apply(case, lambda x: torch.cat([x[:1]] * count))
        return ref.evaluate(kd, copied._replace(label=torch.cat([case.label[:1]] * count)))

    once, twice = take(1), take(2)
    for name in TERMS:  # the hard boundary term is a sum over samples, the others are means
        torch.testing.assert_close(
            twice[name], (2 if name == "hbd" else 1) * once[name], rtol=2e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    "arguments, progress, skipped",
    [
        ({}, 0.0, {"soft_boundary_loss"}),
        ({"sbd": 0.0}, 0.5, {"soft_boundary_loss"}),
        ({"hbd": 0.0}, 0.5, {"hard_boundary_loss"}),
        ({"floor": 0.0}, 1.0, {"hard_boundary_loss"}),
        ({}, 0.5, set()),
    ],
)
def test_a_term_of_weight_zero_is_not_computed(monkeypatch, arguments, progress, skipped):
    called = set()
    for name in ("hard_boundary_loss", "soft_boundary_loss"):
        original = getattr(acf_bckd, name)

        def spy(*inputs, name=name, original=original, **options):
            called.add(name)
            return original(*inputs, **options)

        monkeypatch.setattr(acf_bckd, name, spy)
    case = make_module_case()
    terms = make(**arguments)(case.student, case.teacher, case.label, progress)
    assert called == {"hard_boundary_loss", "soft_boundary_loss"} - skipped
    for name in skipped:
        assert terms[{"h": "hbd", "s": "sbd"}[name[0]]].item() == 0.0
    sum(terms.values()).backward()


@pytest.mark.parametrize("tap", ["corrected", "residual"])
def test_each_feature_term_reads_its_own_teacher_tap(tap):
    kd, case = make(), make_module_case()
    plain = ref.evaluate(kd, case)
    features = case.teacher.features | {tap: case.teacher.features[tap].flip(2)}
    changed = ref.evaluate(kd, case._replace(teacher=ref.Output(case.teacher.logits, features)))
    own, other = ("afd", "cfd") if tap == "corrected" else ("cfd", "afd")
    assert changed[own] != plain[own] and changed[other] == plain[other]


@pytest.mark.parametrize(
    "preset, hooked, source, tap",
    [
        ("clean", True, None, "residual"),
        ("clean", False, None, "residual"),
        ("as_released", True, None, "hooked_residual"),
        ("as_released", False, None, "residual"),
        ("as_released", True, "residual", "residual"),
        ("clean", True, "output", "corrected"),
    ],
)
def test_preset_and_source_choose_the_correction(preset, hooked, source, tap):
    maps = TEACHER | ({"hooked_residual": TEACHER["residual"]} if hooked else {})
    case = blob_case(spatial=(8, 8, 8), student_taps=STUDENT, teacher_taps=maps)
    torch.manual_seed(5)
    kd = build_kd(
        "acf_bckd",
        ref.channels(STUDENT),
        ref.channels(maps),
        4,
        preset=preset,
        correction_source=source,
    )
    plain = ref.evaluate(kd, case)
    for name in maps:
        features = case.teacher.features | {name: case.teacher.features[name].flip(2)}
        changed = ref.evaluate(kd, case._replace(teacher=ref.Output(case.teacher.logits, features)))
        assert (changed["cfd"] != plain["cfd"]) == (name == tap), name


def test_missing_taps_are_errors_at_construction():
    with pytest.raises(ValueError, match="acf of the student"):
        ACFBCKD({"stage1": 8}, ref.channels(TEACHER), 4)
    with pytest.raises(
        ValueError, match=r"acf_bckd needs the tap residual of the teacher.*corrected"
    ):
        ACFBCKD({"acf": 8}, {"corrected": 8}, 4)
    with pytest.raises(ValueError, match="corrected"):
        ACFBCKD({"acf": 8}, {"residual": 8}, 4)


def test_without_the_feature_terms_no_tap_is_needed():
    kd = ACFBCKD({}, {}, 4, afd=0.0, cfd=0.0)
    assert list(kd.parameters()) == []
    case = blob_case()
    student, teacher = (
        SimpleNamespace(logits=output.logits) for output in (case.student, case.teacher)
    )
    terms = kd(student, teacher, case.label, 0.5)
    assert (
        terms["afd"].item() == terms["cfd"].item() == 0.0 and terms["hbd"] > 0 and terms["sbd"] > 0
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"border": "wrap"}, "border must be one of count, ignore, got 'wrap'"),
        ({"feature_reduction": "voxel"}, "feature_reduction"),
        ({"boundary_reduction": "sum"}, "boundary_reduction"),
        ({"correction_source": "input"}, "correction_source"),
        ({"sbd_absent": "drop"}, "sbd_absent must be one of count, skip, got 'drop'"),
        ({"floor": 1.5}, r"floor must lie in \[0, 1\]"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_build_kd_errors():
    channels = ref.channels(STUDENT), ref.channels(TEACHER), 4
    with pytest.raises(ValueError, match=r"unknown method 'acf'; choose from .*acf_bckd"):
        build_kd("acf", *channels)
    with pytest.raises(
        ValueError, match="unknown preset 'released'; choose from clean, as_released"
    ):
        build_kd("acf_bckd", *channels, preset="released")
    with pytest.raises(ValueError, match="no argument temperature; it takes afd, cfd"):
        build_kd("acf_bckd", *channels, temperature=2.0)


# Half precision


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_finite_in_half_precision(dtype, multilabel):
    case = make_module_case(multilabel)
    for change in (
        lambda x: x.to(dtype),
        lambda x: (1e4 * x.sign()).to(dtype),
        lambda x: 0 * x.to(dtype),
    ):
        changed = ref.apply(case, change)
        with torch.autocast("cpu", dtype=dtype):
            terms = ref.evaluate(make(multilabel=multilabel), changed)
        assert all(
            term.dtype == torch.float32 and torch.isfinite(term) for term in terms.values()
        ), terms
        sum(terms.values()).backward()
        for name, tensor in ref.leaves(changed.student).items():
            assert torch.isfinite(tensor.grad).all(), name


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boundary_terms_are_float32_under_autocast(dtype, multilabel):
    case = blob_case(multilabel, spatial=(9, 8, 7))
    inputs = case.student.logits, case.teacher.logits
    hard = hard_boundary_loss(*inputs, case.label, multilabel)
    soft = soft_boundary_loss(*inputs, multilabel)
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(
            hard_boundary_loss(*inputs, case.label, multilabel), hard, rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            soft_boundary_loss(*inputs, multilabel), soft, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_labels_may_be_of_any_type(dtype):
    case = blob_case()
    inputs = case.student.logits, case.teacher.logits
    assert hard_boundary_loss(*inputs, case.label.to(dtype)) == hard_boundary_loss(
        *inputs, case.label
    )
    case = blob_case(True)
    inputs = case.student.logits, case.teacher.logits
    assert hard_boundary_loss(*inputs, case.label.to(dtype), True) == hard_boundary_loss(
        *inputs, case.label, True
    )
