"""Labels that are not complete: the segmentation losses of both halves and every distillation term
that takes a label, against loops in float64 and against the labelled voxels cut out by hand.
"""

import itertools

import numpy as np
import pytest
import torch

from losses import KD_METHODS, build_kd
from losses.acf_bckd import hard_boundary_loss
from losses.consistency import ce_dice_loss
from losses.crkd import class_semantic_distillation
from losses.incomplete import UNKNOWN, certain_label, completed
from losses.segmentation import SegmentationLoss
from methods.mlrpl import linear_dice
from tests.losses import reference as ref

# Sample 0 has all four classes, sample 1 misses two of them, of sample 2 nobody labelled a voxel.
ANNOTATED = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
TAPS = {"decoder": (3, (4, 3, 2)), "stage1": (3, (4, 3, 2)), "penultimate": (3, (4, 3, 2))}
BOUNDARIES = {"afd": 0.0, "cfd": 0.0, "floor": 0.5, "decay": 0.0}


def incomplete_case(multilabel=False, **arguments):
    """Three samples as ANNOTATED says; a third of the voxels is UNKNOWN."""
    case = ref.make_case(batch=3, multilabel=multilabel, **arguments)
    label = case.label.to(torch.uint8)
    if not multilabel:
        label[1][(label[1] == 1) | (label[1] == 3)] = 0
    unknown = torch.rand(label[:, :1].shape, generator=torch.Generator().manual_seed(1)) < 1 / 3
    unknown[2] = True
    return case._replace(label=label.masked_fill(unknown, UNKNOWN))


def probabilities(logits, annotated, multilabel):
    """p~, column by column."""
    if multilabel:
        return ref.sigmoid(logits)
    result = np.zeros_like(logits)
    flat = result.reshape(*result.shape[:2], -1)
    for b, v, column in ref.columns(logits):
        for k, p in enumerate(ref.softmax(column)):
            flat[b, k if annotated[b, k] else 0, v] += p
    return result


def slow_parts(logits, label, annotated, multilabel=False):
    """-> mean cross-entropy over the labelled voxels, and for each (sample, annotated class) with
    some the sums of p, g, p g, p^2 over them.
    """
    probs = probabilities(logits, annotated, multilabel)
    entropy, sums = [], {}
    for b, k in itertools.product(range(len(logits)), range(logits.shape[1])):
        p, own = probs[b, k].ravel(), label[b, k if multilabel else 0].ravel()
        g = (own == (1 if multilabel else k)).astype(float)
        voxels = [v for v in range(p.size) if own[v] != UNKNOWN]
        if not multilabel:
            entropy += [-np.log(p[v]) for v in voxels if g[v]]
        if annotated[b, k] and voxels:
            terms = [(p[v], g[v], p[v] * g[v], p[v] ** 2) for v in voxels]
            sums[b, k] = np.array(terms).sum(0)
    return float(np.mean(entropy)) if entropy else 0.0, sums


def slow_segmentation(logits, label, annotated, multilabel):
    entropy, sums = slow_parts(logits, label, annotated, multilabel)
    dice = [1 - (2 * pg + 1e-5) / (p + g + 1e-5) for p, g, pg, _ in sums.values()]
    return entropy + float(np.mean(dice))


def slow_ce_dice(logits, label, annotated, background, average):
    """Sums over the batch, squared denominators."""
    entropy, sums = slow_parts(logits, label, annotated)
    dice = []
    for k in range(0 if background else 1, logits.shape[1]):
        of_class = [sums[key] for key in sums if key[1] == k]
        if annotated[:, k].any():
            _, g, pg, squares = np.sum(of_class, axis=0) if of_class else np.zeros(4)
            dice.append(1 - (2 * pg + 1e-5) / (squares + g + 1e-5))
    return 0.5 * (entropy + (np.mean(dice) if average else np.sum(dice)))


def slow_linear_dice(logits, label, annotated):
    sums = slow_parts(logits, label, annotated)[1]
    per_class = []
    for k in range(1, logits.shape[1]):
        of_class = [sums[key] for key in sums if key[1] == k]
        p, g, pg, _ = np.sum(of_class, axis=0) if of_class else np.zeros(4)
        per_class.append(1 - (2 * pg + 1e-8) / (p + g + 1e-8))
    return np.sum(per_class)


def check_loss(loss, slow, case):
    """Value, gradient by central differences, no gradient where nobody labelled."""
    logits, array = case.student.logits, case.student.logits.detach().double().numpy()
    value = loss(logits)
    assert value.item() == pytest.approx(slow(array), rel=2e-5)
    (gradient,) = torch.autograd.grad(value, logits)
    unknown = (case.label == UNKNOWN).all(1, keepdim=True).expand_as(gradient)
    assert torch.isfinite(gradient).all() and not gradient[unknown].any()
    flat, step = array.reshape(-1), 1e-4
    for index in (int(gradient.abs().argmax()), *range(0, flat.size, flat.size // 7)):
        sums = []
        for delta in (step, -step):
            changed = flat.copy()
            changed[index] += delta
            sums.append(slow(changed.reshape(array.shape)))
        numeric = (sums[0] - sums[1]) / (2 * step)
        assert gradient.reshape(-1)[index].item() == pytest.approx(numeric, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("multilabel", [False, True])
def test_segmentation_loss(multilabel):
    case, annotated = incomplete_case(multilabel), ANNOTATED.numpy()
    loss, label = SegmentationLoss(multilabel, incomplete=True), case.label.numpy()
    check_loss(
        lambda logits: loss(logits, case.label, ANNOTATED),
        lambda logits: slow_segmentation(logits, label, annotated, multilabel),
        case,
    )
    case = ref.make_case(multilabel=multilabel)
    ordinary = SegmentationLoss(multilabel)(case.student.logits, case.label)
    torch.testing.assert_close(loss(case.student.logits, case.label), ordinary)
    nothing = torch.full_like(case.label, UNKNOWN, dtype=torch.uint8)
    loss(case.student.logits, nothing).backward()
    assert loss(case.student.logits, nothing) == 0 and not case.student.logits.grad.any()


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("background", [False, True])
def test_few_label_loss(background, average):
    case = incomplete_case()
    # class 3 is annotated in no sample
    annotated = ANNOTATED.clone()
    annotated[:, 3] = False
    label = case.label.where(case.label != 3, 0)
    how = {"background": background, "average": average}
    check_loss(
        lambda logits: ce_dice_loss(logits, label, annotated=annotated, **how),
        lambda logits: slow_ce_dice(logits, label.numpy(), annotated.numpy(), **how),
        case,
    )
    complete = ref.make_case()
    logits, ones = complete.student.logits, torch.ones(2, 4, dtype=torch.bool)
    torch.testing.assert_close(
        ce_dice_loss(logits, complete.label, annotated=ones, **how),
        ce_dice_loss(logits, complete.label, **how),
    )


def test_linear_dice():
    case = incomplete_case()
    check_loss(
        lambda logits: linear_dice(logits, case.label, ANNOTATED),
        lambda logits: slow_linear_dice(logits, case.label.numpy(), ANNOTATED.numpy()),
        case,
    )


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("multilabel", [False, True])
def test_the_teacher_completes_a_label(multilabel, fill):
    case = incomplete_case(multilabel)
    found = completed(case.label, case.teacher.logits, ANNOTATED, multilabel, fill)
    assert found.dtype == case.label.dtype and found.shape == case.label.shape
    teacher, expected = case.teacher.logits.detach().numpy(), case.label.numpy().copy()
    flat = expected.reshape(*expected.shape[:2], -1)
    for b, v, column in ref.columns(teacher):
        for c in range(expected.shape[1]):
            told = flat[b, c, v]
            if told == UNKNOWN:
                own = column[c] >= 0 if multilabel else column.argmax()
                flat[b, c, v] = own if fill else UNKNOWN
            elif multilabel and not ANNOTATED[b, c]:
                flat[b, c, v] = column[c] >= 0
            elif not multilabel and told == 0:
                open_classes = [0, *(k for k in range(4) if not ANNOTATED[b, k])]
                flat[b, c, v] = max(open_classes, key=lambda k: column[k])
    assert np.array_equal(found.numpy(), expected)
    if not multilabel:
        changed = certain_label(case.label[:, 0], ANNOTATED) != case.label[:, 0]
        assert torch.equal(
            changed, (case.label[:, 0] == 0) & (torch.arange(3) == 1)[:, None, None, None]
        )


# The terms that take a label, of methods with arguments that make them plain; None: all terms
LABEL_TERMS = {
    "nkd": ({}, None),
    "dkd": ({"warmup": 0.0}, None),
    "ifvd": ({}, {"ifvd"}),
    "emkd": ({"taps": ["stage1"]}, {"emkd_region"}),
    "cirkd": (
        {
            "pool": 1,
            "pixel_queue": 20,
            "region_queue": 8,
            "pixel_contrast": 4,
            "region_contrast": 4,
        },
        {"cirkd_pixel", "cirkd_region"},
    ),
    "acf_bckd": (BOUNDARIES | {"sbd": 0.0}, None),
}


def module_of(name, multilabel, preset="clean"):
    torch.manual_seed(3)
    taps = ref.channels(TAPS | {"acf": (3, ()), "corrected": (3, ()), "residual": (3, ())})
    how = {"multilabel": multilabel, "preset": preset, "incomplete": True}
    return build_kd(name, taps, taps, 4, **how, **LABEL_TERMS[name][0]).eval()


def label_terms(name, module, case):
    torch.manual_seed(4)  # of what is drawn from memories
    terms, wanted = ref.evaluate(module, case), LABEL_TERMS[name][1]
    return {key: value for key, value in terms.items() if wanted is None or key in wanted}


def labelled_voxels(case):
    """The labelled voxels of a case of one sample, in a row."""
    known = (case.label[0] != UNKNOWN).all(0)

    def cut(tensor):
        return tensor[:, :, known][..., None, None].detach().requires_grad_()

    def output(old):
        return ref.Output(cut(old.logits), {name: cut(f) for name, f in old.features.items()})

    label = case.label[:, :, known][..., None, None]
    return ref.Case(output(case.student), output(case.teacher), label)


@pytest.mark.parametrize(
    "name, multilabel, preset",
    [
        *((n, m, "clean") for n in LABEL_TERMS if n != "acf_bckd" for m in (False, True)),
        ("dkd", True, "as_released"),
    ],
)
def test_unlabelled_voxels_are_not_there_for_terms_that_take_a_label(name, multilabel, preset):
    case = ref.make_case(
        multilabel=multilabel, batch=1, seed=2, student_taps=TAPS, teacher_taps=TAPS
    )
    unknown = torch.rand(case.label[:, :1].shape) < 0.3
    case = case._replace(label=case.label.to(torch.uint8).masked_fill(unknown, UNKNOWN))
    module = module_of(name, multilabel, preset)
    found = label_terms(name, module, case)
    expected = label_terms(name, module, labelled_voxels(case))
    if preset == "as_released":  # the squared difference of all sigmoids needs no label
        del found["dkd_target"], expected["dkd_target"]
    assert found.keys() == expected.keys() and all(value > 0 for value in found.values())
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-7)
    inputs = list(ref.leaves(case.student).values())
    gradients = torch.autograd.grad(sum(found.values()), inputs, allow_unused=True)
    gradients = [gradient for gradient in gradients if gradient is not None]
    assert gradients and any(gradient.any() for gradient in gradients)
    assert not any(gradient[unknown.expand_as(gradient)].any() for gradient in gradients)


def test_what_needs_no_label_is_the_same_whatever_the_label():
    """Every method takes UNKNOWN, and no term without a label changes by it."""
    taps = {f"stage{k}": (3, (4, 4, 4)) for k in range(1, 8)}
    taps |= {name: (3, (4, 4, 4)) for name in ("decoder", "penultimate", "acf")}
    taps |= {name: (3, (4, 4, 4)) for name in ("corrected", "residual")}
    case = ref.make_case(spatial=(4, 4, 4), student_taps=taps, teacher_taps=taps)
    nothing = torch.full_like(case.label, UNKNOWN, dtype=torch.uint8)
    with_label = {"nkd", "dkd", "ifvd", "emkd", "cirkd", "acf_bckd"}
    named = {"nkd_target", "nkd_nontarget", "dkd_target", "dkd_nontarget", "ifvd", "emkd_region"}
    named |= {"cirkd_pixel", "cirkd_region", "hbd"}
    for name in KD_METHODS:
        arguments = {"pixel_queue": 200, "region_queue": 100} if name == "cirkd" else {}
        channels = ref.channels(taps)
        module = build_kd(name, channels, channels, 4, incomplete=True, **arguments).eval()
        assert getattr(module, "incomplete", False) == (name in with_label)
        plain, blind = (
            ref.evaluate(module, case._replace(label=label)) for label in (case.label, nothing)
        )
        for key in plain:
            if key in named:
                assert plain[key] > 0 and blind[key] == 0, key
            else:
                torch.testing.assert_close(blind[key], plain[key], rtol=0, atol=0)


def slow_shell(member, unknown, border):
    """The shell of one class: voxels with labelled neighbours of both kinds; arrays (H, W, D)."""
    shell = np.zeros(member.shape, bool)
    for voxel in itertools.product(*map(range, member.shape)):
        kinds = set()
        for offset in itertools.product((-1, 0, 1), repeat=3):
            place = tuple(a + b for a, b in zip(voxel, offset))
            inside = all(0 <= p < n for p, n in zip(place, member.shape))
            if not inside and border == "ignore":
                place = tuple(min(max(p, 0), n - 1) for p, n in zip(place, member.shape))
                inside = True
            if offset == (0, 0, 0) or (inside and unknown[place]):
                continue
            kinds.add(bool(inside and member[place]))
        shell[voxel] = len(kinds) == 2 and not unknown[voxel]
    return shell


@pytest.mark.parametrize("border", ["count", "ignore"])
@pytest.mark.parametrize("multilabel", [False, True])
def test_the_hard_boundary_is_one_between_labelled_voxels(multilabel, border):
    case = incomplete_case(multilabel, spatial=(6, 5, 4))
    # blocks, so that not every voxel lies on a shell
    label = case.label.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :6, :5]
    student, teacher = (ref.as_arrays(output).logits for output in (case.student, case.teacher))
    expected, shown = 0.0, 0
    for b, k in itertools.product(range(3), range(4)):
        own = label[b, k if multilabel else 0].numpy()
        shell = slow_shell(own == (1 if multilabel else k), own == UNKNOWN, border)
        shown += shell.any()
        divergences = []
        for place in np.argwhere(shell):
            p, q = (logits[(b, slice(None), *place)] for logits in (student, teacher))
            if multilabel:
                divergences.append(((ref.sigmoid(p) - ref.sigmoid(q)) ** 2).sum())
            else:
                divergences.append(ref.kl(ref.softmax(q), ref.softmax(p)))
        expected += np.mean(divergences) / 4 if divergences else 0.0
    assert shown >= 4
    logits = case.student.logits, case.teacher.logits
    value = hard_boundary_loss(*logits, label, multilabel, border=border, incomplete=True)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(value, logits[0])
    unknown = (label == UNKNOWN).all(1, keepdim=True).expand_as(gradient)
    assert gradient.any() and not gradient[unknown].any()


@pytest.mark.parametrize("use_tp", [False, True])
def test_unlabelled_voxels_are_no_anchors(use_tp):
    rng = torch.Generator().manual_seed(5)
    features = [torch.randn(2, 4, 6, 6, generator=rng, requires_grad=True) for _ in range(3)]
    pred_l, pred_u = (torch.randint(0, 3, (2, 6, 6), generator=rng) for _ in range(2))
    unknown = torch.rand(2, 6, 6, generator=rng) < 0.5
    label_l, conf_u = pred_l.masked_fill(unknown, UNKNOWN), torch.rand(2, 6, 6, generator=rng)
    loss = class_semantic_distillation(
        *features, pred_l, label_l, pred_u, conf_u, 3, samples=90, use_tp=use_tp, generator=rng
    )
    (gradient,) = torch.autograd.grad(loss, features[0])
    assert gradient.any() and not gradient[unknown[:, None].expand_as(gradient)].any()
