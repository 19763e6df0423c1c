"""AC-MT against second implementations: each strategy, the whole step, the teacher."""

import copy
import math

import numpy as np
import pytest
import torch

from methods import acmt
from methods.acmt import ACMT, STRATEGIES, far_from_own_prototype, far_from_prototype, label_errors
from networks.unet2d import UNet2D
from networks.vnet import VNet

CLASSES, STEPS = 2, 20
PRESETS = ["clean", "as_released"]


# Slow arithmetic.


def softmax(logits):
    return logits.detach().double().softmax(1)


def slow_entropy(p):
    return -sum(p[:, k] * torch.log(p[:, k] + 1e-6) for k in range(p.shape[1]))


def ramp(t, length=1.0):
    return math.exp(-5 * (1 - min(t, length) / length) ** 2)


def slow_dice(logits, label, eps=1e-5):
    """Of each class."""
    p, losses = logits.double().softmax(1), []
    for k in range(logits.shape[1]):
        is_k = (label == k).double()
        overlap, squares = (p[:, k] * is_k).sum(), (p[:, k] ** 2).sum() + is_k.sum()
        losses.append(1 - (2 * overlap + eps) / (squares + eps))
    return torch.stack(losses)


def slow_cross_entropy(logits, label):
    p = logits.double().softmax(1)
    return -sum(p[:, k][label == k].log().sum() for k in range(logits.shape[1])) / label.numel()


def slow_label_errors(probs, given):
    """Confident joint, calibrated; pruned by class and by noise rate; one voxel and one class at a
    time.
    """
    classes, rows = (
        probs.shape[1],
        probs.double().movedim(1, -1).reshape(-1, probs.shape[1]).tolist(),
    )
    labels = given.flatten().tolist()
    members = [[v for v, label in enumerate(labels) if label == k] for k in range(classes)]
    if not all(members):
        return torch.ones_like(given, dtype=torch.bool)
    thresholds = [sum(rows[v][k] for v in members[k]) / len(members[k]) for k in range(classes)]
    counts = [[0] * classes for _ in range(classes)]
    for row, label in zip(rows, labels):
        passing = [k for k in range(classes) if row[k] >= thresholds[k] - 1e-6]
        if passing:
            counts[label][max(passing, key=lambda k: row[k])] += 1
    for k in range(classes):
        counts[k][k] = max(counts[k][k], 1)
    joint = [
        [n / max(sum(line), 1) * len(members[i]) for n in line] for i, line in enumerate(counts)
    ]
    by_class, by_rate = set(), set()
    for i in range(classes):
        if len(members[i]) <= 5:
            continue
        wrong = round(sum(joint[i][j] for j in range(classes) if j != i))
        by_class |= set(sorted(members[i], key=lambda v: rows[v][i])[:wrong])
        for j in range(classes):
            if j != i:
                order = sorted(members[i], key=lambda v: rows[v][i] - rows[v][j])
                by_rate |= set(order[: round(joint[i][j])])
    errors = {
        v for v in by_class & by_rate if max(range(classes), key=lambda k: rows[v][k]) != labels[v]
    }
    return torch.tensor([v in errors for v in range(len(labels))]).view_as(given)


def enlarged(array, size, corners=True):
    """Linear; the first and last voxels of both grids are at one place (corners), or both grids
    have the same edges, and what lies outside the centres is the nearest one.
    """
    for axis, length in enumerate(size, start=2):
        have = array.shape[axis]
        at = np.linspace(0, have - 1, length)
        if not corners:
            at = (np.arange(length) + 0.5) * have / length - 0.5
        array = np.apply_along_axis(
            lambda row, at=at: np.interp(at, np.arange(len(row)), row), axis, array
        )
    return array


def slow_far(feature, probs, certain, pred):
    """Prototypes by weighted means, then the nearer one, voxel by voxel."""
    feature = enlarged(feature.double().numpy(), pred.shape[1:])
    rows = np.moveaxis(feature, 1, -1).reshape(-1, feature.shape[1])
    p = probs.double().movedim(1, -1).reshape(-1, 2).numpy()
    certain, far = certain.flatten().numpy(), []
    prototypes = []
    for k in range(2):
        chosen = [v for v in range(len(rows)) if certain[v] and p[v].argmax() == k]
        if not chosen:
            return torch.zeros_like(pred, dtype=torch.bool)
        prototypes.append(sum(p[v, k] * rows[v] for v in chosen) / sum(p[v, k] for v in chosen))
    for row, label in zip(rows, pred.flatten().tolist()):
        distances = [np.linalg.norm(row - prototype) for prototype in prototypes]
        far.append((1 if distances[1] < distances[0] else 0) != label)
    return torch.tensor(far).view_as(pred)


def slow_far_own(feature, probs, certain, pred):
    """Prototypes of one sample at a time; certain is of each class."""
    feature, far = enlarged(feature.double().numpy(), pred.shape[1:], corners=False), []
    for b in range(len(pred)):
        rows = np.moveaxis(feature[b], 0, -1).reshape(-1, feature.shape[1])
        p = probs[b].double().movedim(0, -1).reshape(-1, 2).numpy()
        sure = certain[b].movedim(0, -1).reshape(-1, 2).tolist()
        label = [
            1 if sure[v][1] and (not sure[v][0] or p[v, 1] > p[v, 0]) else 0
            for v in range(len(rows))
        ]
        prototypes = []
        for k in range(2):
            total, weight = np.zeros(rows.shape[1]), 1e-5
            for v, row in enumerate(rows):
                if label[v] == k:
                    total, weight = total + p[v, k] * row, weight + p[v, k]
            prototypes.append(total / weight)
        for row, given in zip(rows, pred[b].flatten().tolist()):
            background, foreground = (np.linalg.norm(row - other) for other in prototypes)
            far.append((1 if foreground < background else 0) != given)
    return torch.tensor(far).view_as(pred)


# Tiny methods and batches.


def grid_of(dims):
    return (32, 32) if dims == 2 else (16, 16, 16)


def make_network(dims, dropout=0.0, classes=CLASSES):
    """Tiny, with logits that do not all point to one class."""
    torch.manual_seed(10 + dims)
    if dims == 2:
        network = UNet2D(1, classes, channels=(2, 4, 4, 8, 8), dropout=(dropout,) * 5)
    else:
        network = VNet(1, classes, n_filters=2, dropout=dropout)
    with torch.no_grad():
        out = network.decoder.out_conv
        out.weight.normal_(std=1.0)
        out.bias.zero_()
        out.weight[0, 0].abs_()
        out.weight[0, 1].abs_().neg_()
        out.weight[1] = -out.weight[0]
    return network


def make_batch(dims, classes=CLASSES, seed=0):
    rng = torch.Generator().manual_seed(seed)
    grid = grid_of(dims)
    image, weak = (torch.randn(2, 1, *grid, generator=rng) for _ in range(2))
    label, truth = (
        torch.randint(0, classes, (2, 1, *grid), generator=rng).byte() for _ in range(2)
    )
    return {"image": image, "label": label}, {"weak": weak, "label": truth}


def make(dims, dropout=0.0, classes=CLASSES, **arguments):
    """In training mode, with a teacher that differs from the student."""
    method = ACMT(
        lambda: make_network(dims, dropout, classes), max_steps=STEPS, **arguments
    ).train()
    rng = torch.Generator().manual_seed(20)
    for parameter in method.teacher.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return method


def values(terms):
    return {name: term.item() for name, term in terms.items()}


def compare_gradients(network, other):
    """Of the weights; those of a bias before a batch norm are rounding errors."""
    for (name, ours), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
        if ours.ndim > 1:
            assert torch.linalg.norm(ours.grad - theirs.grad) <= 1e-3 * torch.linalg.norm(
                theirs.grad
            ), name


def reference(
    student_net, teacher_net, labelled, weak, step, strategy, released, noise=0.1, sup_loss="own"
):
    """One step of networks without dropout; draws the noise from the global generator in the order
    of the method.
    """

    def noisy():
        return weak + (noise * torch.randn_like(weak)).clamp(-2 * noise, 2 * noise)

    out = student_net(torch.cat([labelled["image"], weak]))
    classes, t = out.shape[1], step / STEPS
    student, label = out[2:].double().softmax(1), labelled["label"][:, 0].long()
    with torch.no_grad():
        # as released: without noise, with noise, then ten without; else with noise alone
        first = softmax(teacher_net(weak)) if released and strategy == "prototype" else None
        teacher, fixed = softmax(teacher_net(noisy())), student.detach()
        if strategy == "entropy":
            mask = slow_entropy(fixed) / math.log(classes) >= 0.75 + 0.20 * ramp(t)
        elif strategy == "mc_dropout":
            sampled = student_net if released else teacher_net
            mean = torch.stack([softmax(sampled(noisy())) for _ in range(8)]).mean(0)
            mask = slow_entropy(mean) >= (0.75 + 0.15 * ramp(t)) * math.log(classes)
        elif strategy == "confident":
            mask = slow_label_errors(teacher, fixed.argmax(1))
        else:
            inputs = [weak if released else noisy() for _ in range(10)]
            outputs = [teacher_net(image, return_features=True) for image in inputs]
            halves = torch.stack([1 / (1 + torch.exp(-out.logits.double() / 2)) for out in outputs])
            spread = ((halves - halves.mean(0)) ** 2).sum(0).div(9).sqrt()
            feature = torch.stack([out.features["stage6"].double() for out in outputs]).mean(0)
            if released:
                mask = slow_far_own(feature, first, spread < 0.1, fixed.argmax(1))
            else:
                probs = torch.stack([softmax(out.logits) for out in outputs]).mean(0)
                mask = slow_far(feature, probs, (spread < 0.1).all(1), fixed.argmax(1))
    chosen = [(student[:, k] - teacher[:, k])[mask] ** 2 for k in range(classes)]
    times = 1 if released and strategy == "mc_dropout" else classes
    consistency = sum(part.sum() for part in chosen) / (times * mask.sum() + 1e-16)
    weight = 0.1 * (ramp(step // 150, 40) if released else ramp(t, 0.75))
    dice = slow_dice(out[:2], label)
    dice = dice[1:].sum() if sup_loss == "ce_dice" else dice.mean()
    terms = {
        "sup": (slow_cross_entropy(out[:2], label) + dice) / 2,
        "consistency": weight * consistency,
    }
    if strategy == "prototype":
        terms["entropy"] = (
            weight * slow_entropy(student)[~mask].sum() / max((~mask).sum().item(), 1)
        )
    return terms, mask


# Label errors.


@pytest.fixture(params=["cpu", "elsewhere"])
def place(request, monkeypatch):
    """As on the CPU, and as on a device that must not be asked how many voxels are of a class."""
    if request.param != "cpu":
        monkeypatch.setattr(acmt, "readable", lambda values: False)


@pytest.mark.parametrize("classes, grid", [(2, (9, 7)), (3, (9, 7)), (4, (4, 6, 5))])
@pytest.mark.parametrize("seed", range(4))
def test_label_errors_equal_confident_learning_voxel_by_voxel(classes, grid, seed, place):
    rng = torch.Generator().manual_seed(seed)
    given = torch.randint(0, classes, (2, *grid), generator=rng)
    logits = 1.5 * torch.randn(2, classes, *grid, generator=rng)
    logits += 1.5 * torch.nn.functional.one_hot(given, classes).movedim(-1, 1)
    found = label_errors(logits.softmax(1), given)
    assert found.dtype == torch.bool and 0 < found.sum() < 0.5 * found.numel()
    assert torch.equal(found, slow_label_errors(logits.softmax(1), given))


def test_label_errors_finds_the_labels_that_were_flipped(place):
    truth = torch.arange(400).view(1, 20, 20) % 2
    p1 = torch.where(truth == 1, 0.9, 0.1)
    flipped = torch.zeros_like(truth, dtype=torch.bool)
    flipped.view(-1)[::23] = True
    given = torch.where(flipped, 1 - truth, truth)
    assert torch.equal(label_errors(torch.stack([1 - p1, p1], 1), given), flipped)


def test_label_errors_of_certain_and_right_labels_are_none(place):
    given = torch.randint(0, 3, (2, 6, 6), generator=torch.Generator().manual_seed(0))
    probs = torch.nn.functional.one_hot(given, 3).movedim(-1, 1) * 0.94 + 0.02
    assert not label_errors(probs, given).any()


def test_label_errors_are_everywhere_if_a_class_is_absent(place):
    probs = torch.rand(2, 3, 5, 5).softmax(1)
    assert label_errors(probs, torch.randint(0, 2, (2, 5, 5))).all()


@pytest.mark.parametrize("members, marked", [(5, 0), (6, 3)])
def test_label_errors_spare_classes_of_five_voxels(members, marked, place):
    given = torch.zeros(1, 10, 10, dtype=torch.long)
    given.view(-1)[:members] = 1
    p1 = torch.full((1, 10, 10), 0.1)
    # the class's own mean is 0.5 or less, which the other members do not reach
    p1.view(-1)[: members // 2] = 0.9
    probs = torch.stack([1 - p1, p1], 1)
    assert torch.equal(label_errors(probs, given), slow_label_errors(probs, given))
    assert label_errors(probs, given).sum() == marked


# Distance from prototypes.


@pytest.mark.parametrize("grid, size", [((3, 2), (6, 5)), ((2, 3, 2), (4, 6, 3)), ((5, 4), (5, 4))])
def test_far_from_prototype_equals_distances_voxel_by_voxel(grid, size):
    rng = torch.Generator().manual_seed(len(grid))
    feature = torch.randn(2, 3, *grid, generator=rng)
    probs = (2 * torch.randn(2, 2, *size, generator=rng)).softmax(1)
    certain = torch.rand(2, *size, generator=rng) < 0.7
    pred = torch.randint(0, 2, (2, *size), generator=rng)
    found = far_from_prototype(feature, probs, certain, pred)
    assert found.dtype == torch.bool and 0 < found.sum() < found.numel()
    assert torch.equal(found, slow_far(feature, probs, certain, pred))


def test_uncertain_voxels_do_not_move_a_prototype():
    pred = torch.tensor([[[0, 1, 0, 1]]])
    feature = torch.tensor([0.0, 1.0, 0.0, 50.0]).view(1, 1, 1, 4)
    probs = torch.where(pred[:, None] == torch.arange(2).view(1, 2, 1, 1), 0.8, 0.2)
    certain = torch.tensor([[[True, True, True, False]]])
    assert far_from_prototype(feature, probs, certain, pred).tolist() == [[[False] * 4]]
    everywhere = far_from_prototype(feature, probs, torch.ones_like(certain), pred)
    assert everywhere.tolist() == [[[False, True, False, False]]]


@pytest.mark.parametrize("absent", [0, 1])
def test_nothing_is_far_where_a_class_has_no_certain_voxel(absent):
    probs = torch.rand(1, 2, 4, 4).softmax(1)
    certain = probs.argmax(1) != absent
    assert not far_from_prototype(
        torch.randn(1, 3, 4, 4), probs, certain, 1 - probs.argmax(1)
    ).any()


@pytest.mark.parametrize("grid, size", [((3, 2), (6, 5)), ((2, 3, 2), (4, 6, 3)), ((5, 4), (5, 4))])
@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_the_released_prototypes_equal_distances_voxel_by_voxel(grid, size, share):
    rng = torch.Generator().manual_seed(len(grid))
    feature = torch.randn(2, 3, *grid, generator=rng)
    feature[1] += 2.0  # so that prototypes of the batch would not do
    probs = (2 * torch.randn(2, 2, *size, generator=rng)).softmax(1)
    certain = torch.rand(2, 2, *size, generator=rng) < share
    pred = torch.randint(0, 2, (2, *size), generator=rng)
    found = far_from_own_prototype(feature, probs, certain, pred)
    assert found.dtype == torch.bool and 0 < found.sum() < found.numel()
    assert torch.equal(found, slow_far_own(feature, probs, certain, pred))


def test_released_prototypes_count_what_is_not_certain_as_background():
    pred = torch.tensor([[[0, 0, 1, 1]]])
    feature = torch.tensor([-1.0, -1.0, 1.0, 20.0]).view(1, 1, 1, 4)
    probs = torch.where(pred[:, None] == torch.arange(2).view(1, 2, 1, 1), 0.8, 0.2)
    certain = torch.ones(1, 2, 1, 4, dtype=torch.bool)
    far = far_from_own_prototype(feature, probs, certain, pred)
    assert far.tolist() == [[[False, False, True, False]]]  # the foreground is at 10.5
    certain[..., 3] = False  # so the foreground is at 1, and the background at 1.3
    far = far_from_own_prototype(feature, probs, certain, pred)
    assert far.tolist() == [[[True, True, False, True]]]


def test_the_released_prototype_of_a_class_without_voxels_is_zero():
    feature = torch.tensor([0.1, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    probs = torch.tensor([0.9, 0.1]).view(1, 2, 1, 1).expand(1, 2, 1, 4)
    certain = torch.ones(1, 2, 1, 4, dtype=torch.bool)
    far = far_from_own_prototype(feature, probs, certain, torch.zeros(1, 1, 4).long())
    assert far.tolist() == [[[True, False, False, False]]]


def test_released_prototypes_are_found_without_noise_by_a_first_pass_and_ten_last_ones():
    method, seen = make(2, preset="as_released", strategy="prototype"), []
    method.teacher.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    labelled, unlabelled = make_batch(2)
    method.loss(labelled, unlabelled, 6)
    same = [torch.equal(image, unlabelled["weak"]) for image in seen]
    assert same == [True, False] + [True] * 10


# The whole step.


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dims", [2, 3])
def test_a_whole_step_equals_a_second_implementation(dims, preset, strategy):
    method = make(dims, preset=preset, strategy=strategy, noise=0.5)
    labelled, unlabelled = make_batch(dims)
    student, teacher = copy.deepcopy(method.network), copy.deepcopy(method.teacher)
    torch.manual_seed(7)
    terms = method.loss(labelled, unlabelled, 6)
    torch.manual_seed(7)
    expected, mask = reference(
        student,
        teacher,
        labelled,
        unlabelled["weak"],
        6,
        strategy,
        preset == "as_released",
        noise=0.5,
    )
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(method.pictures["ambiguous"][1].bool(), mask[0])
    assert method.monitor["mask_ratio"].item() == pytest.approx((~mask).double().mean().item())
    assert list(terms) == list(expected)
    assert values(terms) == pytest.approx(values(expected), rel=1e-4)
    if preset == "as_released":
        for network, other in ((method.network, student), (method.teacher, teacher)):
            for (name, ours), theirs in zip(network.named_buffers(), other.buffers(), strict=True):
                torch.testing.assert_close(ours, theirs, msg=name)
    sum(terms.values()).backward()
    sum(expected.values()).backward()
    compare_gradients(method.network, student)


@pytest.mark.parametrize(
    "strategy, sup_loss",
    [("entropy", "own"), ("mc_dropout", "own"), ("confident", "own"), ("entropy", "ce_dice")],
)
def test_a_whole_step_of_three_classes_equals_a_second_implementation(strategy, sup_loss):
    method = make(2, classes=3, strategy=strategy, sup_loss=sup_loss)
    labelled, unlabelled = make_batch(2, classes=3)
    student, teacher = copy.deepcopy(method.network), copy.deepcopy(method.teacher)
    torch.manual_seed(7)
    terms = method.loss(labelled, unlabelled, 3)
    torch.manual_seed(7)
    weak = unlabelled["weak"]
    expected, mask = reference(
        student, teacher, labelled, weak, 3, strategy, False, sup_loss=sup_loss
    )
    assert 0 < mask.sum() < mask.numel()
    assert values(terms) == pytest.approx(values(expected), rel=1e-4)
    sum(terms.values()).backward()
    sum(expected.values()).backward()
    compare_gradients(method.network, student)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dims", [2, 3])
def test_every_parameter_of_the_student_and_none_of_the_teacher_gets_a_gradient(
    dims, preset, strategy
):
    method = make(dims, dropout=0.3, preset=preset, strategy=strategy)
    terms = method.loss(*make_batch(dims), 6)
    assert all(
        term.shape == () and term.dtype == torch.float32 and torch.isfinite(term)
        for term in terms.values()
    )
    sum(terms.values()).backward()
    for name, parameter in method.network.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.ndim == 1 or parameter.grad.any(), name
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_labels_of_unlabelled_images_reach_the_monitor_alone(strategy):
    labelled, unlabelled = make_batch(2)
    found = []
    for label in (unlabelled["label"], 1 - unlabelled["label"]):
        method = make(2, dropout=0.3, strategy=strategy)
        torch.manual_seed(1)
        found.append(
            (values(method.loss(labelled, unlabelled | {"label": label}, 6)), method.monitor)
        )
    assert found[0][0] == found[1][0]
    assert found[0][1]["pseudo_accuracy"] != found[1][1]["pseudo_accuracy"]


def test_the_consistency_learns_from_unlabelled_images_and_the_supervision_from_labelled_ones():
    method = make(2)
    method.network.eval()
    labelled, unlabelled = make_batch(2)
    sources = [labelled["image"].requires_grad_(), unlabelled["weak"].requires_grad_()]
    terms = method.loss(labelled, unlabelled, 6)
    for name, reached in (("sup", [True, False]), ("consistency", [False, True])):
        gradients = torch.autograd.grad(terms[name], sources, retain_graph=True)
        assert [bool(gradient.any()) for gradient in gradients] == reached


def test_a_student_that_is_certain_everywhere_is_left_alone_by_the_entropy_strategy():
    method = make(2)
    with torch.no_grad():
        method.network.decoder.out_conv.weight.zero_()
        method.network.decoder.out_conv.bias.copy_(torch.tensor([9.0, -9.0]))
    terms = method.loss(*make_batch(2), 6)
    assert terms["consistency"] == 0 and method.monitor["mask_ratio"] == 1
    with torch.no_grad():
        method.network.decoder.out_conv.bias.zero_()
    terms = method.loss(*make_batch(2), 6)
    assert terms["consistency"] > 0 and method.monitor["mask_ratio"] == 0


@pytest.mark.parametrize(
    "step, level", [(0, 0.75 + 0.2 * math.exp(-5)), (10, 0.75 + 0.2 * math.exp(-1.25)), (20, 0.95)]
)
def test_the_entropy_threshold_rises_with_the_training(step, level):
    method, nats = make(2), math.log(2)
    p = torch.linspace(0.01, 0.99, 197).view(1, 1, 197)
    student = torch.stack([p, 1 - p], 1)
    expected = slow_entropy(student.double()) >= level * nats
    found = method._ambiguous(student, None, None, step / STEPS)
    assert 0 < expected.sum() < 197 and torch.equal(found, expected)


@pytest.mark.parametrize("step, level", [(0, 0.75 + 0.15 * math.exp(-5)), (20, 0.90)])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_threshold_of_the_mean_of_passes_rises_with_the_training(
    preset, step, level, monkeypatch
):
    method = make(2, preset=preset, strategy="mc_dropout")
    p = torch.linspace(0.01, 0.99, 197, dtype=torch.float64)
    seen = []

    def passes(network, image, count):
        seen.append((network, count))
        for k in range(count):
            spread = (k - (count - 1) / 2) * 1e-3
            yield type(
                "Out",
                (),
                {"logits": torch.stack([p + spread, 1 - p - spread]).log().view(1, 2, 1, 197)},
            )

    monkeypatch.setattr(method, "_passes", passes)
    found = method._ambiguous(None, None, torch.zeros(1, 1, 1, 197), step / STEPS)
    expected = slow_entropy(torch.stack([p, 1 - p])[None]) >= level * math.log(2)
    assert 0 < expected.sum() < 197 and torch.equal(found[0], expected)
    assert seen == [(method.network if preset == "as_released" else method.teacher, 8)]


@pytest.mark.parametrize("step, fraction", [(0, 0.0), (5, 1 / 3), (15, 1.0), (19, 1.0)])
def test_the_weight_rises_over_a_fraction_of_the_training(step, fraction):
    expected = 0.1 * math.exp(-5 * (1 - fraction) ** 2)
    assert make(2).weight_at(step) == pytest.approx(expected, rel=1e-12)
    assert make(2, consistency=0.4, ramp_length=1.5).weight_at(15) == pytest.approx(
        0.4 * math.exp(-5 / 4), rel=1e-12
    )


@pytest.mark.parametrize(
    "step, units", [(0, 0), (149, 0), (150, 1), (3149, 20), (6000, 40), (60000, 40)]
)
def test_the_released_weight_rises_in_units_of_150_steps(step, units):
    expected = 0.1 * math.exp(-5 * (1 - units / 40) ** 2)
    assert make(2, preset="as_released").weight_at(step) == pytest.approx(expected, rel=1e-12)


def test_the_entropy_term_is_of_the_prototype_strategy_alone():
    for strategy in STRATEGIES:
        terms = make(2, strategy=strategy).loss(*make_batch(2), 6)
        assert list(terms) == ["sup", "consistency"] + ["entropy"] * (strategy == "prototype")
    found = []
    for weight in (1.0, 2.0):
        method = make(2, strategy="prototype", entropy_weight=weight)
        torch.manual_seed(1)
        found.append(values(method.loss(*make_batch(2), 6)))
    assert found[1]["entropy"] == pytest.approx(2 * found[0]["entropy"]) and found[0]["entropy"] > 0
    assert found[1]["consistency"] == found[0]["consistency"]


# The teacher.


def test_noise_is_clamped_at_twice_its_deviation():
    method, image = make(2, noise=0.3), torch.zeros(1, 1, 100, 100)
    torch.manual_seed(0)
    noise = method._noisy(image)
    assert noise.min() == pytest.approx(-0.6) and noise.max() == pytest.approx(0.6)
    assert noise[noise.abs() < 0.3].numel() / noise.numel() == pytest.approx(0.683, abs=0.02)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_statistics_follow_all_passes_as_released_and_one_of_the_student_otherwise(
    preset, strategy
):
    method = make(2, dropout=0.3, preset=preset, strategy=strategy)
    before = [buffer.clone() for buffer in method.teacher.buffers()]
    method.loss(*make_batch(2), 6)
    counts = {
        name: {int(b) for key, b in network.named_buffers() if key.endswith("num_batches_tracked")}
        for name, network in (("student", method.network), ("teacher", method.teacher))
    }
    released = preset == "as_released"
    student = 1 + 8 if released and strategy == "mc_dropout" else 1
    teacher = (12 if strategy == "prototype" else 1) if released else 0
    assert counts == {"student": {student}, "teacher": {teacher}}
    same = [torch.equal(a, b) for a, b in zip(before, method.teacher.buffers())]
    assert any(same) == all(same) == (preset == "clean")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("step, decay", [(0, 0.0), (3, 0.75), (50, 1 - 1 / 51), (500, 0.99)])
def test_the_teacher_is_averaged_after_each_step(preset, step, decay):
    method = make(2, preset=preset)
    rng = torch.Generator().manual_seed(8)
    for buffer in method.network.buffers():
        buffer.add_(torch.rand(buffer.shape, generator=rng) if buffer.is_floating_point() else 5)
    teacher = {key: value.clone() for key, value in method.teacher.state_dict().items()}
    method.after_step(step)
    parameters = dict(method.network.named_parameters())
    for key, value in method.teacher.state_dict().items():
        new = method.network.state_dict()[key]
        if key not in parameters and preset == "as_released":
            assert torch.equal(value, teacher[key]), key
        elif not value.is_floating_point():
            assert torch.equal(value, new), key
        else:
            torch.testing.assert_close(value, decay * teacher[key] + (1 - decay) * new, msg=key)
    assert all(not p.requires_grad for p in method.teacher.parameters())


def test_the_teacher_starts_as_the_student_and_is_a_network_of_its_own():
    method = ACMT(lambda: make_network(2), max_steps=STEPS)
    for ours, other in zip(
        method.network.state_dict().values(), method.teacher.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, other) and ours.data_ptr() != other.data_ptr()
    assert method.evaluated is method.network
    assert {key.split(".")[0] for key in method.state_dict()} == {"network", "teacher"}


@pytest.mark.parametrize("preset", PRESETS)
def test_both_networks_run_with_dropout(preset):
    method, modes = make(2, dropout=0.3, preset=preset), []
    for network in (method.network, method.teacher):
        network.encoder.register_forward_hook(lambda module, *_: modes.append(module.training))
    method.loss(*make_batch(2), 6)
    assert modes == [True, True]


def test_it_asks_for_weak_views_alone():
    assert (ACMT.strong_views, ACMT.mixes, ACMT.updates, ACMT.uses_unlabelled) == (
        0,
        False,
        1,
        True,
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"strategy": "mu"},
            "acmt: strategy must be one of entropy, mc_dropout, prototype, confident, got 'mu'",
        ),
        ({"sup_loss": "dice"}, "acmt: sup_loss must be one of own, ce_dice, got 'dice'"),
        ({"ema_decay": 1.2}, r"acmt: ema_decay must lie in \[0, 1\]"),
        ({"noise": 0.0}, "acmt: noise must be above 0"),
        (
            {"strategy": "prototype", "classes": 3},
            "'prototype' is for two classes, these data have 3",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(2, **arguments)
