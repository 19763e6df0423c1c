"""LeFeD against a second, float64 implementation: the terms of each of the three updates, feedback,
its state.
"""

import copy

import pytest
import torch

from methods.lefed import LeFeD
from networks.vnet import VNet
from networks.vnet_dual import LeFeDNet

STEPS = 20
TERMS = ["sup", "side", "consistency"]


def slow_dice(logits, label, eps=1e-5):
    p, total = logits.double().softmax(1), 0.0
    for k in range(1, logits.shape[1]):
        overlap = squares = 0.0
        for b in range(len(logits)):
            is_k = (label[b, 0] == k).double()
            overlap = overlap + (p[b, k] * is_k).sum()
            squares = squares + (p[b, k] ** 2).sum() + is_k.sum()
        total = total + 1 - (2 * overlap + eps) / (squares + eps)
    return total


def reference(network, labelled, unlabelled, feedback, consistency=1.0):
    """Terms of one update, and the differences of the stages (second minus first decoder), deepest
    first.
    """
    count, label = len(labelled["image"]), labelled["label"]
    out = network.all(torch.cat([labelled["image"], unlabelled["weak"]]), feedback)
    first, second = out["logits"]
    side5, side4, side3, side2, side1 = (slow_dice(side[:count], label) for side in out["sides"])
    p, q = first.double().softmax(1), second.double().softmax(1)
    squares = sum(
        ((p[b, k] - q[b, k]) ** 2).sum() for b in range(len(p)) for k in range(p.shape[1])
    )
    terms = {
        "sup": slow_dice(first[:count], label) + slow_dice(second[:count], label),
        "side": 0.8 * side1 + 0.6 * side2 + 0.4 * side3 + 0.2 * side4 + 0.1 * side5,
        "consistency": consistency * squares / p.numel(),
    }
    stages1, stages2 = out["stages"]
    return terms, [stages2[k].detach() - stages1[k].detach() for k in range(5)]


def make(classes=2, dropout=0.0, **arguments):
    """In training mode, with logits that do not all point to one class."""
    torch.manual_seed(13)
    network = LeFeDNet(1, classes, n_filters=2, dropout=dropout, encoder_dropout=dropout)
    for decoder in (network.decoder1, network.decoder2):
        torch.nn.init.normal_(decoder.out_conv.weight, std=1.0)
    return LeFeD(lambda: network, max_steps=STEPS, **arguments).train()


def make_batch(classes=2, seed=0, size=16, count=2):
    rng = torch.Generator().manual_seed(seed)
    shape = (count, 1, size, 16, 16)
    image, weak = (torch.randn(shape, generator=rng) for _ in range(2))
    label, truth = (torch.randint(0, classes, shape, generator=rng).byte() for _ in range(2))
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


def watched(method):
    """What feedback each update of the method passes on."""
    seen, every = [], method.network.all

    def record(image, feedback=()):
        seen.append(list(feedback))
        return every(image, feedback)

    method.network.all = record
    return seen


@pytest.mark.parametrize("preset", ["clean", "as_released"])
@pytest.mark.parametrize("classes", [2, 3])
def test_three_updates_of_two_batches_equal_a_second_implementation(classes, preset):
    method = make(classes, preset=preset, feedback=0.5)
    other = copy.deepcopy(method.network)
    optimizers = [
        torch.optim.SGD(network.parameters(), lr=0.01) for network in (method.network, other)
    ]
    for step in range(2):
        labelled, unlabelled = make_batch(classes, seed=step)
        feedback = []
        for _ in range(method.updates):
            terms = method.loss(labelled, unlabelled, step)
            expected, difference = reference(other, labelled, unlabelled, feedback)
            feedback = [0.5 * part for part in difference]
            assert list(terms) == TERMS
            assert values(terms) == pytest.approx(values(expected), rel=1e-4)
            for optimizer, found in zip(optimizers, (terms, expected)):
                optimizer.zero_grad()
                sum(found.values()).backward()
            compare_gradients(method.network, other)
            other.load_state_dict(method.network.state_dict())
            for ours, theirs in zip(method.network.parameters(), other.parameters()):
                theirs.grad = ours.grad.clone()
            for optimizer in optimizers:
                optimizer.step()


def test_feedback_starts_with_the_second_update_and_anew_with_each_batch():
    method = make()
    seen = watched(method)
    for step in range(2):
        for _ in range(3):
            method.loss(*make_batch(seed=step), step)
    assert [len(feedback) for feedback in seen] == [0, 5, 5, 0, 5, 5]
    assert not any(part.requires_grad for feedback in seen for part in feedback)


@pytest.mark.parametrize("scale", [1e-3, 0.5])
def test_feedback_is_the_scaled_difference_of_the_stages_of_the_update_before(scale):
    method = make(feedback=scale)
    seen, other = watched(method), copy.deepcopy(method.network)
    other.all = LeFeDNet.all.__get__(other)
    labelled, unlabelled = make_batch()
    feedback = []
    for _ in range(3):
        method.loss(labelled, unlabelled, 0)
        for ours, expected in zip(seen[-1], feedback, strict=True):
            torch.testing.assert_close(ours, expected)
        feedback = [scale * part for part in reference(other, labelled, unlabelled, feedback)[1]]
    assert [part.shape[1] for part in seen[-1]] == [32, 16, 8, 4, 2]
    assert all(part.any() for part in seen[-1])


def test_nothing_leaks_from_one_batch_into_the_next():
    fresh, used = make(feedback=0.5), make(feedback=0.5)
    for _ in range(3):
        used.loss(*make_batch(seed=5), 0)
    used.network.load_state_dict(fresh.network.state_dict())
    for _ in range(3):
        assert values(used.loss(*make_batch(), 1)) == values(fresh.loss(*make_batch(), 1))


def test_batches_may_differ_in_size_and_shape():
    method = make()
    for step, (count, size) in enumerate([(2, 16), (1, 32), (2, 16)]):
        for _ in range(3):
            terms = method.loss(*make_batch(size=size, count=count), step)
            assert all(torch.isfinite(term) for term in terms.values())


def test_feedback_matters():
    found = []
    for scale in (1e-9, 0.5):
        method = make(feedback=scale)
        found.append([values(method.loss(*make_batch(), 0)) for _ in range(2)])
    assert found[0][0] == found[1][0]
    assert all(found[0][1][name] != found[1][1][name] for name in TERMS)


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_the_number_of_updates_is_an_argument(rounds):
    method = make(rounds=rounds)
    seen = watched(method)
    for _ in range(2 * rounds):
        method.loss(*make_batch(), 0)
    assert method.updates == rounds
    assert [len(feedback) for feedback in seen] == ([0] + [5] * (rounds - 1)) * 2


def test_a_checkpoint_holds_the_network_alone():
    method = make()
    before = set(method.state_dict())
    method.loss(*make_batch(), 0)
    assert set(method.state_dict()) == before and {key.split(".")[0] for key in before} == {
        "network"
    }
    assert method.evaluated is method.network


@pytest.mark.parametrize("preset", ["clean", "as_released"])
def test_every_parameter_gets_a_finite_gradient_in_each_update(preset):
    method = make(dropout=0.3, preset=preset)
    for _ in range(3):
        method.zero_grad()
        terms = method.loss(*make_batch(), 0)
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
    found = []
    for label in (unlabelled["label"], 1 - unlabelled["label"]):
        method = make(dropout=0.3)
        torch.manual_seed(1)
        terms = [values(method.loss(labelled, unlabelled | {"label": label}, 0)) for _ in range(3)]
        found.append((terms, method.monitor))
    assert found[0][0] == found[1][0]
    assert found[0][1]["pseudo_accuracy"] != found[1][1]["pseudo_accuracy"]


def test_the_consistency_learns_from_all_images_and_the_dice_terms_from_labelled_ones():
    method = make()
    method.network.eval()
    labelled, unlabelled = make_batch()
    sources = [labelled["image"].requires_grad_(), unlabelled["weak"].requires_grad_()]
    terms = method.loss(labelled, unlabelled, 0)
    for name, reached in (
        ("sup", [True, False]),
        ("side", [True, False]),
        ("consistency", [True, True]),
    ):
        gradients = torch.autograd.grad(terms[name], sources, retain_graph=True)
        assert [bool(gradient.any()) for gradient in gradients] == reached


def test_the_consistency_weight_scales_that_term_alone_and_no_term_changes_with_the_step():
    found = []
    for weight, step in ((1.0, 0), (2.5, 0), (1.0, STEPS - 1)):
        found.append(values(make(consistency=weight).loss(*make_batch(), step)))
    assert found[1]["consistency"] == pytest.approx(2.5 * found[0]["consistency"])
    assert (found[1]["sup"], found[1]["side"]) == (found[0]["sup"], found[0]["side"])
    assert found[2] == found[0]


def test_the_monitor_counts_the_voxels_on_which_the_decoders_agree():
    method = make()
    labelled, unlabelled = make_batch()
    method.loss(labelled, unlabelled, 0)
    with torch.no_grad():
        out = method.network.all(torch.cat([labelled["image"], unlabelled["weak"]]))
    first, second = (logits[2:].argmax(1) for logits in out["logits"])
    assert method.monitor["mask_ratio"] == (first == second).float().mean() < 1
    assert torch.equal(method.pictures["first decoder"][1], first[0])
    assert torch.equal(method.pictures["second decoder"][1], second[0])


def test_the_defaults_are_those_of_the_paper():
    method = make()
    assert (method.scale, method.updates, method.consistency) == (1e-3, 3, 1.0)
    assert (LeFeD.strong_views, LeFeD.mixes) == (0, False)


def test_a_network_with_one_decoder_is_refused():
    with pytest.raises(
        ValueError, match=r"lefed: needs a network with 'all'.*set network: vnet_lefed"
    ):
        LeFeD(lambda: VNet(1, 2, n_filters=2), max_steps=STEPS)


@pytest.mark.parametrize("arguments", [{"feedback": 0.0}, {"feedback": -1.0}, {"rounds": 0}])
def test_arguments_that_are_not_above_zero_are_refused(arguments):
    with pytest.raises(ValueError, match=f"lefed: {next(iter(arguments))} must be above 0"):
        make(**arguments)
