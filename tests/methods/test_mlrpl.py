"""MLRPL against a second, float64 implementation: reliabilities, mutual loss, Dice, the whole
step.
"""

import copy
import math

import pytest
import torch

from methods.mlrpl import MLRPL, entropy_map, linear_dice, mutual_loss, prototype_reliability
from networks.vnet import VNet
from networks.vnet_dual import DualVNet

STEPS = 20


def slow_entropy(p):
    """Of one voxel's probabilities."""
    return -sum(x * math.log(x + 1e-6) for x in p)


def slow_reliability(feature, probs):
    """Of one sample: rows (voxels, c) and (voxels, C), one voxel and one class at a time."""
    classes, prototypes = probs.shape[1], []
    for k in range(classes):
        members = [v for v in range(len(feature)) if int(probs[v].argmax()) == k]
        total = sum((feature[v] for v in members), torch.zeros_like(feature[0]))
        prototypes.append(total / (len(members) + 1e-6))
    found = []
    for f, p in zip(feature, probs):
        agreement = 0.0
        for k, prototype in enumerate(prototypes):
            norms = float(prototype.norm() * f.norm())
            cosine = float(prototype @ f) / norms if norms > 0 else 0.0
            agreement += (1 - (cosine - float(p[k])) ** 2) / classes
        found.append(agreement)
    return found


def slow_mutual(student_logits, teacher_logits, feature):
    """With a graph to the student's logits."""
    total, count = 0.0, 0
    for student, teacher, maps in zip(
        student_logits.double(), teacher_logits.double(), feature.double()
    ):
        p, q = (logits.flatten(1).T.softmax(1) for logits in (student, teacher))
        reliability = slow_reliability(maps.flatten(1).T.detach(), q.detach())
        for v in range(len(p)):
            if slow_entropy(p[v].tolist()) > slow_entropy(q[v].tolist()):
                total = total - p[v, int(q[v].argmax())].log() * reliability[v]
                count += 1
    return total / (count + 1e-6)


def slow_dice(logits, label):
    p, total = logits.double().softmax(1), 0.0
    for k in range(1, logits.shape[1]):
        is_k = (label[:, 0] == k).double()
        total = (
            total + 1 - (2 * (p[:, k] * is_k).sum() + 1e-8) / (p[:, k].sum() + is_k.sum() + 1e-8)
        )
    return total


def random_case(classes, grid=(3, 4, 2), channels=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(2, classes, *grid, generator=rng) for _ in range(2))
    feature = torch.randn(2, channels, *grid, generator=rng)
    return student.requires_grad_(), teacher.requires_grad_(), feature.requires_grad_()


def make(classes=2, dropout=0.0, **arguments):
    """In training mode, with logits that do not all point to one class."""
    torch.manual_seed(13)
    network = DualVNet(1, classes, n_filters=2, dropout=dropout)
    for decoder in (network.decoder1, network.decoder2):
        torch.nn.init.normal_(decoder.out_conv.weight, std=1.0)
    return MLRPL(lambda: network, max_steps=STEPS, **arguments).train()


def make_batch(classes=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    image, weak = (torch.randn(2, 1, 16, 16, 16, generator=rng) for _ in range(2))
    label, truth = (
        torch.randint(0, classes, (2, 1, 16, 16, 16), generator=rng).byte() for _ in range(2)
    )
    return {"image": image, "label": label}, {"weak": weak, "label": truth}


def values(terms):
    return {name: term.item() for name, term in terms.items()}


def compare_gradients(network, other):
    """Of the weights; those of a bias before a batch norm are rounding errors."""
    for (name, ours), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
        if ours.ndim > 1:
            assert torch.linalg.norm(ours.grad - theirs.grad) <= 1e-3 * torch.linalg.norm(
                theirs.grad
            ), name


def test_entropy_equals_slow_arithmetic():
    probs = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(0)).softmax(1)
    expected = [slow_entropy(p.tolist()) for p in probs.double().movedim(1, -1).reshape(-1, 4)]
    torch.testing.assert_close(
        entropy_map(probs).flatten().double(), torch.tensor(expected, dtype=torch.float64)
    )


@pytest.mark.parametrize("certain", [0, 2])
def test_entropy_of_a_certain_voxel_is_finite_and_nearly_zero(certain):
    probs = torch.eye(3)[certain].view(1, 3, 1)
    assert entropy_map(probs).item() == pytest.approx(0.0, abs=2e-6)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_reliability_equals_slow_arithmetic(classes, seed):
    _, teacher, feature = random_case(classes, seed=seed)
    probs = teacher.detach().softmax(1)
    found = prototype_reliability(feature.detach(), probs)
    for b in range(2):
        expected = slow_reliability(
            feature[b].detach().double().flatten(1).T, probs[b].double().flatten(1).T
        )
        assert found[b].flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_the_prototype_of_an_absent_class_has_similarity_zero():
    feature = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    probs = torch.tensor([0.7, 0.2, 0.1]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    found = prototype_reliability(feature, probs).flatten()
    prototype = feature.flatten(2)[0].mean(1)
    cosine = torch.nn.functional.cosine_similarity(feature.flatten(2)[0], prototype[:, None], dim=0)
    torch.testing.assert_close(found, ((1 - (cosine - 0.7) ** 2) + (1 - 0.2**2) + (1 - 0.1**2)) / 3)


def test_prototypes_are_of_each_sample_alone():
    _, teacher, feature = random_case(2)
    probs = teacher.detach().softmax(1)
    together = prototype_reliability(feature.detach(), probs)
    alone = [
        prototype_reliability(feature[b : b + 1].detach(), probs[b : b + 1])[0] for b in range(2)
    ]
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_mutual_loss_and_its_gradient_equal_slow_arithmetic(classes, seed):
    student, teacher, feature = random_case(classes, seed=seed)
    loss, expected = mutual_loss(student, teacher, feature), slow_mutual(student, teacher, feature)
    assert loss.shape == () and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (found,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(
        found, torch.autograd.grad(expected, student)[0], rtol=1e-4, atol=1e-8
    )


def test_the_mutual_loss_has_no_gradient_to_the_teacher_nor_through_its_weight():
    student, teacher, feature = random_case(3)
    loss = mutual_loss(student, teacher, feature)
    found, *others = torch.autograd.grad(loss, (student, teacher, feature), allow_unused=True)
    assert found.any() and others == [None, None]
    untaught = entropy_map(student.softmax(1)) <= entropy_map(teacher.softmax(1))
    assert untaught.any() and not found.movedim(1, -1)[untaught].any()


def test_a_teacher_that_is_nowhere_surer_teaches_nothing():
    student, teacher, feature = random_case(3)
    for logits, other in ((student, torch.zeros_like(teacher)), (teacher, teacher)):
        loss = mutual_loss(logits, other, feature)
        assert loss.item() == 0.0
        assert not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("classes", [2, 4])
def test_dice_and_its_gradient_equal_slow_arithmetic(classes):
    logits, _, _ = random_case(classes)
    label = torch.randint(
        0, classes, (2, 1, 3, 4, 2), generator=torch.Generator().manual_seed(1)
    ).byte()
    loss, expected = linear_dice(logits, label), slow_dice(logits, label)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(
        found, torch.autograd.grad(expected, logits)[0], rtol=1e-4, atol=1e-8
    )


def test_dice_without_any_foreground_is_one_where_some_is_predicted():
    logits, _, _ = random_case(2)
    label = torch.zeros(2, 1, 3, 4, 2)
    assert linear_dice(logits, label).item() == pytest.approx(1.0, abs=1e-6)
    background = torch.tensor([200.0, -200.0]).view(1, 2, 1, 1, 1).expand(2, 2, 3, 4, 2)
    assert linear_dice(background, label) == 0


@pytest.mark.parametrize(
    "preset, weight", [("clean", math.exp(-5 / 16)), ("as_released", math.exp(-5))]
)
@pytest.mark.parametrize("classes", [2, 3])
def test_a_whole_step_equals_a_second_implementation(classes, preset, weight):
    method = make(classes, preset=preset)
    labelled, unlabelled = make_batch(classes)
    other = copy.deepcopy(method.network)
    terms = method.loss(labelled, unlabelled, 6)
    image = torch.cat([labelled["image"], unlabelled["weak"]])
    (first, first_map), (second, second_map) = (
        decoder.classify(decoder(other.encoder(image))[-1])
        for decoder in (other.decoder1, other.decoder2)
    )
    mutual = slow_mutual_of_many(first, second, second_map) + slow_mutual_of_many(
        second, first, first_map
    )
    dice = slow_dice(first[:2], labelled["label"]) + slow_dice(second[:2], labelled["label"])
    expected = {"sup": dice / 2, "mutual": weight * mutual}
    assert list(terms) == list(expected)
    assert values(terms) == pytest.approx(values(expected), rel=1e-4)
    sum(terms.values()).backward()
    sum(expected.values()).backward()
    compare_gradients(method.network, other)


def slow_mutual_of_many(student_logits, teacher_logits, feature):
    """As slow_mutual, a class and a sample at a time, for maps of thousands of voxels."""
    total, count = 0.0, 0.0
    for student, teacher, f in zip(
        student_logits.double(), teacher_logits.double(), feature.double().detach()
    ):
        p, q, f = (
            student.flatten(1).softmax(0),
            teacher.flatten(1).softmax(0).detach(),
            f.flatten(1),
        )
        agreement, pseudo = 0.0, q.argmax(0)
        for k in range(len(q)):
            prototype = f[:, pseudo == k].sum(1) / ((pseudo == k).sum() + 1e-6)
            norms = prototype.norm() * f.norm(dim=0)
            cosine = torch.where(norms > 0, prototype @ f / norms.clamp(min=1e-300), 0.0)
            agreement = agreement + (1 - (cosine - q[k]) ** 2) / len(q)
        h = [-(x * torch.log(x + 1e-6)).sum(0) for x in (p.detach(), q)]
        for k in range(len(q)):
            taught = (h[0] > h[1]) & (pseudo == k)
            total = total - (p[k].log() * agreement)[taught].sum()
            count += taught.sum().item()
    return total / (count + 1e-6)


def test_the_two_slow_implementations_agree():
    student, teacher, feature = random_case(3)
    assert slow_mutual_of_many(student, teacher, feature).item() == pytest.approx(
        slow_mutual(student, teacher, feature).item(), rel=1e-9
    )


@pytest.mark.parametrize("preset", ["clean", "as_released"])
def test_every_parameter_gets_a_finite_gradient(preset):
    method = make(dropout=0.3, preset=preset)
    terms = method.loss(*make_batch(), 6)
    assert all(
        term.shape == () and term.dtype == torch.float32 and torch.isfinite(term)
        for term in terms.values()
    )
    sum(terms.values()).backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.ndim == 1 or parameter.grad.any(), name


def test_labels_of_unlabelled_images_reach_the_monitor_alone():
    labelled, unlabelled = make_batch()
    method, found = make(dropout=0.3), []
    for label in (unlabelled["label"], 1 - unlabelled["label"]):
        torch.manual_seed(1)
        found.append(
            (values(method.loss(labelled, unlabelled | {"label": label}, 6)), method.monitor)
        )
    assert found[0][0] == found[1][0]
    assert found[0][1]["pseudo_accuracy"] != found[1][1]["pseudo_accuracy"]


def test_the_mutual_term_learns_from_labelled_and_unlabelled_images():
    method = make()
    method.network.eval()
    labelled, unlabelled = make_batch()
    sources = [labelled["image"].requires_grad_(), unlabelled["weak"].requires_grad_()]
    terms = method.loss(labelled, unlabelled, 6)
    for name, reached in (("sup", [True, False]), ("mutual", [True, True])):
        gradients = torch.autograd.grad(terms[name], sources, retain_graph=True)
        assert [bool(gradient.any()) for gradient in gradients] == reached


def test_the_monitor_counts_the_voxels_on_which_the_decoders_agree():
    method = make()
    labelled, unlabelled = make_batch()
    method.loss(labelled, unlabelled, 0)
    first, second = (method.pictures[f"{name} decoder"][1] for name in ("first", "second"))
    assert not torch.equal(first, second) and not first.requires_grad
    with torch.no_grad():
        out = method.network.both(torch.cat([labelled["image"], unlabelled["weak"]]))
    pred, other = (logits[2:].argmax(1) for logits, _ in out)
    assert method.monitor["mask_ratio"] == (pred == other).float().mean()
    assert torch.equal(first, pred[0]) and torch.equal(second, other[0])


@pytest.mark.parametrize("step, fraction", [(0, 0.0), (4, 0.5), (8, 1.0), (19, 1.0)])
def test_the_weight_rises_over_a_fraction_of_the_training(step, fraction):
    expected = math.exp(-5 * (1 - fraction) ** 2)
    assert make().weight_at(step) == pytest.approx(expected, rel=1e-12)
    assert make(weight=0.3, ramp_length=0.8).weight_at(2 * step) == pytest.approx(
        0.3 * expected, rel=1e-12
    )


@pytest.mark.parametrize(
    "step, units", [(0, 0), (149, 0), (150, 1), (3149, 20), (6000, 40), (15000, 40)]
)
def test_the_released_weight_rises_in_units_of_150_steps(step, units):
    expected = math.exp(-5 * (1 - units / 40) ** 2)
    assert make(preset="as_released").weight_at(step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("step", [0, 6000, 15000])
def test_over_the_released_length_both_presets_end_their_ramp_at_one_step(step):
    clean, released = (
        MLRPL(lambda: DualVNet(1, 2, n_filters=1), 15000, name) for name in ("clean", "as_released")
    )
    assert clean.weight_at(step) == pytest.approx(released.weight_at(step), rel=1e-12)


def test_without_weight_the_mutual_term_is_zero():
    assert make(weight=0.0).loss(*make_batch(), 6)["mutual"] == 0


def test_the_network_is_evaluated_as_it_is_and_nothing_else_is_kept():
    method = make()
    assert method.evaluated is method.network
    assert {key.split(".")[0] for key in method.state_dict()} == {"network"}
    assert (MLRPL.strong_views, MLRPL.mixes, MLRPL.updates) == (0, False, 1)


def test_a_network_with_one_decoder_is_refused():
    with pytest.raises(
        ValueError, match=r"mlrpl: needs a network with 'both'.*set network: vnet_dual"
    ):
        MLRPL(lambda: VNet(1, 2, n_filters=2), max_steps=STEPS)
