"""UniMatch against a second, float64 implementation, and what its thresholds, boxes and
perturbation do.
"""

import copy

import pytest
import torch

import methods.unimatch
from losses.crkd import pseudo_label
from methods.unimatch import UniMatch, unimatch_terms
from networks.unet2d import UNet2D
from networks.vnet import VNet

CLASSES, STEPS = 3, 20
TERMS = ["sup", "strong1", "strong2", "perturbed"]


def slow_dice(logits, ids, valid, eps=1e-5):
    """Of each class; the voxels that count are collected one image at a time."""
    p, losses = logits.double().softmax(1), []
    for k in range(logits.shape[1]):
        overlap = squares = 0.0
        for b in range(len(logits)):
            chosen, is_k = p[b, k][valid[b]], (ids[b][valid[b]] == k).double()
            overlap = overlap + (chosen * is_k).sum()
            squares = squares + (chosen**2).sum() + is_k.sum()
        losses.append(1 - (2 * overlap + eps) / (squares + eps))
    return torch.stack(losses)


def slow_cross_entropy(logits, label):
    p = logits.double().softmax(1)
    return -sum(p[:, k][label == k].log().sum() for k in range(logits.shape[1])) / label.numel()


def slow_label(logits):
    conf, ids = logits.detach().double().softmax(1).max(1)
    return ids, conf


def slow_terms(logits_l, label, logits_s, targets, logits_fp, target_w, threshold, sup_loss="own"):
    entropy = slow_cross_entropy(logits_l, label)
    dice = slow_dice(logits_l, label, torch.ones_like(label, dtype=torch.bool))
    if sup_loss == "ce_dice":
        terms = {"sup": (entropy + dice[1:].sum()) / 2}
    else:
        terms = {"sup": (entropy + dice.mean()) / 2 / 2}
    for k in range(2):
        ids, conf = targets[k]
        terms[f"strong{k + 1}"] = slow_dice(logits_s[k], ids, conf >= threshold).mean() / 4 / 2
    terms["perturbed"] = slow_dice(logits_fp, target_w[0], target_w[1] >= threshold).mean() / 2 / 2
    return terms


def random_case(grid, classes):
    rng = torch.Generator().manual_seed(len(grid))
    leaves = [
        (2 * torch.randn(2, classes, *grid, generator=rng)).requires_grad_() for _ in range(4)
    ]
    label = torch.randint(0, classes, (2, *grid), generator=rng)
    targets = [pseudo_label(2 * torch.randn(2, classes, *grid, generator=rng)) for _ in range(3)]
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
    return UniMatch(
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
        methods.unimatch, "draw_boxes", lambda *arguments: calls.append(arguments) or left.pop(0)
    )
    return boxes, calls


def reference(network, labelled, unlabelled, boxes, threshold, released, sup_loss):
    """One step of a network without dropout whose `drop` is deterministic."""
    network.eval()
    with torch.no_grad():
        mix = slow_label(network(unlabelled["mix_weak"]))
    network.train()
    strong = []
    for k in range(2):
        strong.append(unlabelled[f"strong{k}"].clone())
        for b in range(2):
            strong[k][b, :, boxes[k, b]] = unlabelled[f"mix_strong{k}"][b, :, boxes[k, b]]
    maps = network.encode(torch.cat([labelled["image"], unlabelled["weak"]]))
    dropped = network.drop(maps if released else [m[2:] for m in maps], 0.5)
    out = network.decode([torch.cat([a, b]) for a, b in zip(maps, dropped)]).logits
    out_s = network(torch.cat(strong))
    own, targets = slow_label(out[2:4]), []
    for k in range(2):
        ids, conf = own[0].clone(), own[1].clone()
        ids[boxes[k]], conf[boxes[k]] = mix[0][boxes[k]], mix[1][boxes[k]]
        targets.append((ids, conf))
    label = labelled["label"][:, 0].long()
    strong = out_s[:2], out_s[2:]
    return slow_terms(out[:2], label, strong, targets, out[-2:], own, threshold, sup_loss)


def values(terms):
    return {name: term.item() for name, term in terms.items()}


def compare_gradients(network, other):
    """Of the weights; those of a bias before a batch norm are rounding errors."""
    for (name, ours), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
        if ours.ndim > 1:
            assert torch.linalg.norm(ours.grad - theirs.grad) <= 1e-3 * torch.linalg.norm(
                theirs.grad
            ), name


@pytest.mark.parametrize("grid, classes", [((5, 4), 4), ((3, 4, 2), 2)])
@pytest.mark.parametrize("threshold, sup_loss", [(0.0, "own"), (0.8, "own"), (0.8, "ce_dice")])
def test_terms_and_gradients_equal_slow_arithmetic(grid, classes, threshold, sup_loss):
    leaves, label, targets = random_case(grid, classes)
    assert 0 < (targets[0][1] >= 0.8).sum() < label.numel()
    arguments = (
        leaves[0],
        label,
        leaves[1:3],
        targets[:2],
        leaves[3],
        targets[2],
        threshold,
        sup_loss,
    )
    terms, expected = unimatch_terms(*arguments), slow_terms(*arguments)
    assert list(terms) == list(expected) == TERMS
    assert values(terms) == pytest.approx(values(expected), rel=1e-5)
    found = torch.autograd.grad(sum(terms.values()), leaves)
    for ours, other in zip(found, torch.autograd.grad(sum(expected.values()), leaves), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-8)


def test_no_trusted_pixel_means_no_unlabelled_loss_and_no_gradient():
    leaves, label, targets = random_case((5, 4), 4)
    terms = unimatch_terms(leaves[0], label, leaves[1:3], targets[:2], leaves[3], targets[2], 1.0)
    assert [terms[name].item() for name in TERMS[1:]] == [0.0] * 3 and terms["sup"] > 0
    gradients = torch.autograd.grad(sum(terms.values()), leaves)
    assert [bool(gradient.any()) for gradient in gradients] == [True, False, False, False]


def test_a_confidence_equal_to_the_threshold_is_trusted():
    leaves, label, targets = random_case((5, 4), 4)
    level = 0.5
    exact = [(ids, torch.full_like(conf, level)) for ids, conf in targets]
    at, zero = (
        unimatch_terms(leaves[0], label, leaves[1:3], exact[:2], leaves[3], exact[2], threshold)
        for threshold in (level, 0.0)
    )
    assert values(at) == values(zero)


@pytest.mark.parametrize(
    "preset, sup_loss", [("clean", "own"), ("as_released", "own"), ("clean", "ce_dice")]
)
@pytest.mark.parametrize("dims", [2, 3])
def test_a_whole_step_equals_a_second_implementation(dims, preset, sup_loss, monkeypatch):
    labelled, unlabelled = make_batch(dims)
    boxes, calls = fixed_boxes(dims, monkeypatch)
    method = make(dims, preset=preset, sup_loss=sup_loss).train()
    method.network.drop = lambda maps, p: [m * p for m in maps]
    other = copy.deepcopy(method.network)
    terms = method.loss(labelled, unlabelled, 0)
    released = preset == "as_released"
    expected = reference(other, labelled, unlabelled, boxes, 0.6, released, sup_loss)
    assert list(terms) == TERMS and 0.1 < method.monitor["mask_ratio"] < 0.9
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
    for name in ("weak", "mix_weak"):
        unlabelled[name].requires_grad_()
    terms = method.loss(labelled, unlabelled, 0)
    sources = [unlabelled["weak"], unlabelled["mix_weak"]]
    for name in ("strong1", "strong2"):
        assert torch.autograd.grad(terms[name], sources, retain_graph=True, allow_unused=True) == (
            None,
            None,
        )
    weak, mix = torch.autograd.grad(terms["perturbed"], sources, allow_unused=True)
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


def test_pasted_images_are_labelled_in_evaluation_mode():
    method, modes = make(2, dropout=0.5).train(), []
    method.network.encoder.register_forward_hook(lambda module, *_: modes.append(module.training))
    method.loss(*make_batch(2), 0)
    assert modes == [False, True, True] and method.network.training


@pytest.mark.parametrize("preset, decoded", [("clean", [2, 6, 4]), ("as_released", [2, 8, 4])])
def test_the_released_code_perturbs_the_labelled_images_too(preset, decoded):
    method, sizes, perturbed = make(2, preset=preset, perturb=0.25).train(), [], []
    drop = method.network.drop
    method.network.drop = lambda maps, p: perturbed.append((len(maps[0]), p)) or drop(maps, p)
    method.network.decoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0][0])))
    method.loss(*make_batch(2), 0)
    assert sizes == decoded and perturbed == [(decoded[1] - 4, 0.25)]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("threshold, ratio", [(0.0, 1.0), (1.0, 0.0)])
def test_the_threshold_decides_which_voxels_count(dims, threshold, ratio):
    method = make(dims, threshold=threshold).train()
    terms = method.loss(*make_batch(dims), 0)
    assert method.monitor["mask_ratio"] == ratio
    assert all((terms[name] > 0) == bool(ratio) for name in TERMS[1:])


def test_the_weights_do_not_change_with_the_step():
    found = []
    for step in (0, 7, STEPS - 1):
        method = make(2).train()
        torch.manual_seed(1)
        found.append(values(method.loss(*make_batch(2), step)))
    assert found[0] == found[1] == found[2]


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
    assert torch.equal(method.pictures["weak, truth"][1], unlabelled["label"][0, 0])


def test_it_asks_for_two_strong_views_and_a_second_batch():
    assert (UniMatch.strong_views, UniMatch.mixes, UniMatch.updates, UniMatch.uses_unlabelled) == (
        2,
        True,
        1,
        True,
    )


def test_the_defaults_are_those_of_the_paper():
    method = UniMatch(lambda: make_network(2), max_steps=STEPS)
    assert (method.threshold, method.cutmix_prob, method.perturb, method.preset) == (
        0.95,
        0.5,
        0.5,
        "clean",
    )
    assert method.sup_loss == "own" and method.evaluated is method.network


def test_an_unknown_supervised_loss_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="unimatch: sup_loss must be one of own, ce_dice, got 'ce'"
    ):
        make(2, sup_loss="ce")


@pytest.mark.parametrize("name", ["threshold", "cutmix_prob", "perturb"])
@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_fractions_outside_the_unit_interval_are_refused(name, value):
    with pytest.raises(ValueError, match=f"unimatch: {name} must lie in"):
        make(2, **{name: value})
