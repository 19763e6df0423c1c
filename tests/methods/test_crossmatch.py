"""CrossMatch against a second, float64 implementation, and what thresholds, boxes, dropout and
modes do.
"""

import copy
import math

import pytest
import torch

import methods.crossmatch
from losses.crkd import pseudo_label
from methods.crossmatch import CrossMatch, crossmatch_terms
from networks.unet2d import UNet2D
from networks.vnet import VNet

CLASSES, STEPS = 3, 20
TERMS = ["sup", "strong1", "strong2", "kd_views", "kd_decoders"]
LOGITS = ["l", "s1", "s2", "w_weak", "w_strong", "s2_weak", "s2_strong"]
TARGETS = ["w", "s1", "s2", "s2_weak", "s2_strong"]
FLAT = {"background": True, "average": True, "eps": 1e-4}


def slow_dice(logits, ids, valid, flat):
    """2D: mean over all classes, eps 1e-4. 3D: sum over the foreground, eps 1e-5."""
    p, total, eps = logits.double().softmax(1), 0.0, 1e-4 if flat else 1e-5
    for k in range(0 if flat else 1, logits.shape[1]):
        overlap = squares = 0.0
        for b in range(len(logits)):
            chosen, is_k = p[b, k][valid[b]], (ids[b][valid[b]] == k).double()
            overlap = overlap + (chosen * is_k).sum()
            squares = squares + (chosen**2).sum() + is_k.sum()
        total = total + 1 - (2 * overlap + eps) / (squares + eps)
    return total / (logits.shape[1] if flat else 1)


def slow_cross_entropy(logits, label):
    p = logits.double().softmax(1)
    return -sum(p[:, k][label == k].log().sum() for k in range(logits.shape[1])) / label.numel()


def slow_label(logits):
    conf, ids = logits.detach().double().softmax(1).max(1)
    return ids, conf


def slow_terms(logits, label, targets, threshold, flat, eta, kd_weight, sup_loss="own"):
    def d(name, target):
        return slow_dice(logits[name], targets[target][0], targets[target][1] >= threshold, flat)

    # CRKD's Dice is the sum over the foreground, and its loss has twice the weight.
    own = sup_loss == "own"
    dice = slow_dice(logits["l"], label, label >= 0, flat and own)
    labelled = (slow_cross_entropy(logits["l"], label) + dice) / 2
    views = d("w_weak", "w") + d("w_strong", "w") + d("s2_weak", "s2") + d("s2_strong", "s2")
    decoders = d("s2_weak", "s2_weak") + d("s2_strong", "s2_strong")
    return {
        "sup": labelled / 2 if own else labelled,
        "strong1": d("s1", "s1") / 4 / 2,
        "strong2": d("s2", "s2") / 4 / 2,
        "kd_views": (1 - eta) / 4 * views * kd_weight / 2,
        "kd_decoders": eta / 2 * decoders * kd_weight / 2,
    }


def random_case(grid, classes):
    rng = torch.Generator().manual_seed(len(grid))
    leaves = {
        name: (2 * torch.randn(2, classes, *grid, generator=rng)).requires_grad_()
        for name in LOGITS
    }
    label = torch.randint(0, classes, (2, *grid), generator=rng)
    targets = {
        name: pseudo_label(2 * torch.randn(2, classes, *grid, generator=rng)) for name in TARGETS
    }
    return leaves, label, targets


def grid_of(dims):
    return (32, 32) if dims == 2 else (16, 16, 16)


def make_network(dims, dropout=0.0):
    """Tiny, with logits that do not all point to one class."""
    torch.manual_seed(10 + dims)
    if dims == 2:
        network = UNet2D(1, CLASSES, channels=(2, 4, 4, 8, 8), dropout=(dropout,) * 5)
    else:
        network = VNet(1, CLASSES, n_filters=2, dropout=dropout)
    torch.nn.init.normal_(network.decoder.out_conv.weight, std=1.0)
    return network


def make_batch(dims, seed=0):
    rng = torch.Generator().manual_seed(seed)
    grid = grid_of(dims)
    names = ["weak", "strong0", "strong1"]
    labelled = {
        "image": torch.randn(2, 1, *grid, generator=rng),
        "label": torch.randint(0, CLASSES, (2, 1, *grid), generator=rng).byte(),
    }
    unlabelled = {
        name: torch.randn(2, 1, *grid, generator=rng)
        for name in [*names, *(f"mix_{n}" for n in names)]
    }
    unlabelled["label"] = torch.randint(0, CLASSES, (2, 1, *grid), generator=rng).byte()
    return labelled, unlabelled


def make(dims, dropout=0.0, **arguments):
    return CrossMatch(
        lambda: make_network(dims, dropout), max_steps=STEPS, **{"threshold": 0.6} | arguments
    )


def fixed_boxes(dims, monkeypatch):
    """Two unlike boxes, the first in one image only; returns them and the calls that asked for
    them.
    """
    boxes = torch.zeros(2, 2, *grid_of(dims), dtype=torch.bool)
    boxes[0, 0, 2:9, 4:11] = True
    boxes[1, 0, :5] = True
    boxes[1, 1, 6:, 3:12] = True
    left, calls = list(boxes), []
    monkeypatch.setattr(
        methods.crossmatch, "draw_boxes", lambda *arguments: calls.append(arguments) or left.pop(0)
    )
    return boxes, calls


def reference(network, labelled, unlabelled, boxes, threshold, flat, kd_weight, mode, sup_loss):
    """One step of a network without dropout whose `drop` is deterministic."""

    def four(first, second):
        maps = network.encode(torch.cat([first, second]))
        weak, strong = (network.drop([m[2:] for m in maps], p) for p in (0.25, 0.75))
        out = network.decode([torch.cat(group) for group in zip(maps, weak, strong)]).logits
        return out[:2], out[2:4], out[4:6], out[6:]

    network.train(mode == "train")
    with torch.no_grad():
        plain = network(unlabelled["mix_weak"])
        perturbed = four(labelled["image"], unlabelled["mix_weak"])[2:]
        mix = [slow_label(logits) for logits in (plain, *perturbed)]
    network.train()
    strong = []
    for k in range(2):
        strong.append(unlabelled[f"strong{k}"].clone())
        for b in range(2):
            strong[k][b, :, boxes[k, b]] = unlabelled[f"mix_strong{k}"][b, :, boxes[k, b]]
    logits = dict(
        zip(("l", "w", "w_weak", "w_strong"), four(labelled["image"], unlabelled["weak"]))
    )
    logits |= dict(zip(("s1", "s2", "s2_weak", "s2_strong"), four(*strong)))

    def boxed(k, own, source):
        ids, conf = (part.clone() for part in slow_label(logits[own]))
        ids[boxes[k]], conf[boxes[k]] = mix[source][0][boxes[k]], mix[source][1][boxes[k]]
        return ids, conf

    targets = {
        "w": slow_label(logits["w"]),
        "s1": boxed(0, "w", 0),
        "s2": boxed(1, "w", 0),
        "s2_weak": boxed(1, "w_weak", 1),
        "s2_strong": boxed(1, "w_strong", 2),
    }
    label = labelled["label"][:, 0].long()
    return slow_terms(logits, label, targets, threshold, flat, 0.3, kd_weight, sup_loss)


def values(terms):
    return {name: term.item() for name, term in terms.items()}


def compare_gradients(network, other):
    """Of the weights; those of a bias before a batch norm are rounding errors."""
    for (name, ours), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
        if ours.ndim > 1:
            assert torch.linalg.norm(ours.grad - theirs.grad) <= 1e-3 * torch.linalg.norm(
                theirs.grad
            ), name


@pytest.mark.parametrize("grid, classes, flat", [((5, 4), 4, True), ((3, 4, 2), 2, False)])
@pytest.mark.parametrize(
    "threshold, eta, kd_weight", [(0.0, 0.3, 0.5), (0.8, 0.3, 1.0), (0.8, 0.6, 0.7)]
)
@pytest.mark.parametrize("sup_loss", ["own", "ce_dice"])
def test_terms_and_gradients_equal_slow_arithmetic(
    grid, classes, flat, threshold, eta, kd_weight, sup_loss
):
    leaves, label, targets = random_case(grid, classes)
    assert all(0 < (conf >= 0.8).sum() < label.numel() for _, conf in targets.values())
    dice = FLAT if flat else {}
    terms = crossmatch_terms(leaves, label, targets, threshold, dice, eta, kd_weight, sup_loss)
    expected = slow_terms(leaves, label, targets, threshold, flat, eta, kd_weight, sup_loss)
    assert list(terms) == list(expected) == TERMS
    assert values(terms) == pytest.approx(values(expected), rel=1e-5)
    inputs = list(leaves.values())
    found = torch.autograd.grad(sum(terms.values()), inputs)
    for ours, other in zip(found, torch.autograd.grad(sum(expected.values()), inputs), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-8)


def test_no_trusted_voxel_means_no_unlabelled_loss_and_no_gradient():
    leaves, label, targets = random_case((5, 4), 4)
    terms = crossmatch_terms(leaves, label, targets, 1.0, FLAT, 0.3, 0.5)
    assert [terms[name].item() for name in TERMS[1:]] == [0.0] * 4 and terms["sup"] > 0
    gradients = torch.autograd.grad(sum(terms.values()), list(leaves.values()))
    assert [bool(gradient.any()) for gradient in gradients] == [True] + [False] * 6


def test_without_a_view_weight_the_perturbed_predictions_teach_nothing():
    leaves, label, targets = random_case((5, 4), 4)
    terms = crossmatch_terms(leaves, label, targets, 0.0, FLAT, 0.3, 0.0)
    assert (terms["kd_views"], terms["kd_decoders"]) == (0, 0)
    one = crossmatch_terms(leaves, label, targets, 0.0, FLAT, 1.0, 1.0)
    assert one["kd_views"] == 0 and one["kd_decoders"] > 0


@pytest.mark.parametrize(
    "mode, sup_loss", [("train", "own"), ("eval", "own"), ("train", "ce_dice")]
)
@pytest.mark.parametrize("preset", ["clean", "as_released"])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_whole_step_equals_a_second_implementation(dims, preset, mode, sup_loss, monkeypatch):
    labelled, unlabelled = make_batch(dims)
    boxes, calls = fixed_boxes(dims, monkeypatch)
    method = make(dims, preset=preset, pseudo_mode=mode, sup_loss=sup_loss).train()
    method.network.drop = lambda maps, p: [m * (1.5 - p) for m in maps]
    other = copy.deepcopy(method.network)
    terms = method.loss(labelled, unlabelled, 1)
    released = preset == "as_released" and dims == 3
    threshold = (0.6 + 0.4 * math.exp(-5)) * math.log(2) if released else 0.6
    flat, weight = dims == 2, 0.5 if dims == 2 else 1.0
    expected = reference(
        other, labelled, unlabelled, boxes, threshold, flat, weight, mode, sup_loss
    )
    assert list(terms) == TERMS and 0.1 < method.monitor["mask_ratio"] < 0.95
    assert values(terms) == pytest.approx(values(expected), rel=1e-4)
    assert calls == [(2, torch.Size(grid_of(dims)), 0.5)] * 2
    for (name, ours), theirs in zip(method.network.named_buffers(), other.buffers()):
        torch.testing.assert_close(ours, theirs, msg=name)
    sum(terms.values()).backward()
    sum(expected.values()).backward()
    compare_gradients(method.network, other)


@pytest.mark.parametrize("preset", ["clean", "as_released"])
@pytest.mark.parametrize("dims", [2, 3])
def test_every_parameter_gets_a_finite_gradient(dims, preset):
    method = make(dims, dropout=0.3, preset=preset).train()
    terms = method.loss(*make_batch(dims), 0)
    assert all(
        term.shape == () and term.dtype == torch.float32 and torch.isfinite(term)
        for term in terms.values()
    )
    sum(terms.values()).backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.ndim == 1 or parameter.grad.any(), name


@pytest.mark.parametrize("dims", [2, 3])
def test_labels_of_unlabelled_images_reach_the_monitor_alone(dims):
    labelled, unlabelled = make_batch(dims)
    found = []
    for label in (unlabelled["label"], 2 - unlabelled["label"]):
        method = make(dims, dropout=0.3).train()
        torch.manual_seed(1)
        found.append(
            (values(method.loss(labelled, unlabelled | {"label": label}, 0)), method.monitor)
        )
    assert found[0][0] == found[1][0]
    assert found[0][1]["pseudo_accuracy"] != found[1][1]["pseudo_accuracy"]


def test_pseudo_labels_get_no_gradient():
    labelled, unlabelled = make_batch(2)
    method = make(2).train()
    sources = [unlabelled["weak"].requires_grad_(), unlabelled["mix_weak"].requires_grad_()]
    terms = method.loss(labelled, unlabelled, 0)
    for name in ("strong1", "strong2", "kd_decoders"):
        assert torch.autograd.grad(terms[name], sources, retain_graph=True, allow_unused=True) == (
            None,
            None,
        )
    weak, mix = torch.autograd.grad(terms["kd_views"], sources, allow_unused=True)
    assert weak.any() and mix is None


def test_without_boxes_the_pasted_images_do_not_matter():
    labelled, unlabelled = make_batch(2)
    found = []
    for scale in (1.0, 3.0):
        method = make(2, cutmix_prob=0.0).train()
        torch.manual_seed(1)
        mixed = {
            name: scale * value for name, value in unlabelled.items() if name.startswith("mix")
        }
        found.append(values(method.loss(labelled, unlabelled | mixed, 0)))
    assert found[0] == found[1]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_pasted_images_are_labelled_in_the_chosen_mode(mode):
    method, modes = make(2, dropout=0.5, pseudo_mode=mode).train(), []
    method.network.encoder.register_forward_hook(lambda module, *_: modes.append(module.training))
    method.loss(*make_batch(2), 0)
    assert modes == [mode == "train"] * 2 + [True, True] and method.network.training


def test_the_four_ways_perturb_the_second_half_weakly_and_strongly():
    method, calls, sizes = make(2).train(), [], []
    drop = method.network.drop
    method.network.drop = lambda maps, p: calls.append((len(maps[0]), p)) or drop(maps, p)
    method.network.decoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0][0])))
    method.loss(*make_batch(2), 0)
    assert calls == [(2, 0.25), (2, 0.75)] * 3 and sizes == [2, 8, 8, 8]


def test_channels_are_dropped_in_evaluation_mode_too():
    method = make(2).eval()
    labelled, unlabelled = make_batch(2)
    with torch.no_grad():
        first = method._four_ways(labelled["image"], unlabelled["weak"])
        again = method._four_ways(labelled["image"], unlabelled["weak"])
    assert [torch.equal(a, b) for a, b in zip(first, again)] == [True, True, False, False]


def test_in_3d_the_four_ways_have_no_dropout_before_the_classifier_and_the_plain_pass_has():
    method, last, classified = make(3, dropout=0.5).train(), [], []
    method.network.decoder.block_nine.register_forward_hook(
        lambda _, args, out: last.append(out.clone())
    )
    method.network.decoder.out_conv.register_forward_pre_hook(
        lambda _, args: classified.append(args[0].clone())
    )
    method.loss(*make_batch(3), 0)
    kept = {}
    for before, after in zip(last, classified, strict=True):
        kept.setdefault(len(before), []).append(torch.equal(before, after))
    assert kept == {8: [True] * 3, 2: [False]}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("threshold, ratio", [(0.0, 1.0), (1.0, 0.0)])
def test_the_threshold_decides_which_voxels_count(dims, threshold, ratio):
    method = make(dims, threshold=threshold).train()
    method.network.decoder.out_conv.weight.data.mul_(0.1)  # confidences stay below 1 in float32
    terms = method.loss(*make_batch(dims), 0)
    assert method.monitor["mask_ratio"] == ratio
    assert all((terms[name] > 0) == bool(ratio) for name in TERMS[1:])


@pytest.mark.parametrize(
    "step, ramp", [(1, math.exp(-5)), (8501, math.exp(-1.25)), (17001, 1.0), (60000, 1.0)]
)
def test_the_released_threshold_of_3d_rises_from_the_second_step_on(step, ramp):
    method = make(3, preset="as_released", threshold=None)
    assert method.threshold_at(0) == 0.75
    assert method.threshold_at(step) == pytest.approx((0.75 + 0.25 * ramp) * math.log(2), rel=1e-12)


@pytest.mark.parametrize("dims, preset", [(2, "clean"), (2, "as_released"), (3, "clean")])
def test_the_other_thresholds_are_constant(dims, preset):
    method = make(dims, preset=preset, threshold=None)
    assert {method.threshold_at(step) for step in (0, 1, 500, 17001)} == {
        0.95 if dims == 2 else 0.75
    }


def test_the_released_threshold_is_the_one_that_the_loss_uses():
    strict, ratios = make(3, preset="as_released", threshold=0.9).train(), []
    for step in (0, 1):
        torch.manual_seed(1)
        strict.loss(*make_batch(3), step)
        ratios.append(strict.monitor["mask_ratio"])
    assert ratios[0] < ratios[1]


@pytest.mark.parametrize("dims, weight", [(2, 0.5), (3, 1.0)])
def test_the_defaults_are_those_of_the_paper(dims, weight):
    method = CrossMatch(lambda: make_network(dims), max_steps=STEPS)
    assert (method.kd_weight, method.eta, method.pseudo_mode) == (weight, 0.3, "train")
    assert method.sup_loss == "own"
    assert (method.perturb_weak, method.perturb_strong, method.cutmix_prob) == (0.25, 0.75, 0.5)
    assert method.dice == (FLAT if dims == 2 else {})
    assert method.evaluated is method.network


def test_a_weight_of_zero_is_not_replaced_by_the_default():
    method = make(2, kd_weight=0.0, threshold=0.0)
    assert (method.kd_weight, method.threshold) == (0.0, 0.0)


def test_pictures_show_the_pasted_views_and_have_no_gradient(monkeypatch):
    labelled, unlabelled = make_batch(2)
    boxes, _ = fixed_boxes(2, monkeypatch)
    method = make(2).train()
    method.loss(labelled, unlabelled, 0)
    for k, name in enumerate(("strong 1, its prediction", "strong 2, its prediction")):
        image, ids = method.pictures[name]
        expected = torch.where(
            boxes[k, 0], unlabelled[f"mix_strong{k}"][0], unlabelled[f"strong{k}"][0]
        )
        assert torch.equal(image, expected) and not ids.requires_grad


def test_it_asks_for_two_strong_views_and_a_second_batch():
    assert (CrossMatch.strong_views, CrossMatch.mixes, CrossMatch.updates) == (2, True, 1)


@pytest.mark.parametrize(
    "name", ["threshold", "eta", "perturb_weak", "perturb_strong", "cutmix_prob"]
)
@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_fractions_outside_the_unit_interval_are_refused(name, value):
    with pytest.raises(ValueError, match=f"crossmatch: {name} must lie in"):
        make(2, **{name: value})


def test_an_unknown_supervised_loss_lists_the_known_ones():
    with pytest.raises(ValueError, match="crossmatch: sup_loss must be one of own, ce_dice, got 1"):
        make(2, sup_loss=1)


def test_an_unknown_mode_lists_the_known_ones():
    with pytest.raises(ValueError, match="pseudo_mode must be one of train, eval, got 'test'"):
        make(2, pseudo_mode="test")
