"""Gradient shares against a backward pass of each term alone, and what is concluded from a log."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from losses import KD_METHODS, build_kd
from networks import build_network
from utils.diagnosis import (
    FAQ_BACKGROUND,
    FAQ_COLLAPSE,
    Diagnosis,
    findings,
    term_history,
    term_shares,
)
from utils.distributed import World


class Lines:
    def __init__(self):
        self.lines = []

    def scalars(self, step, kind, values):
        self.lines.append((step, kind, values))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def terms_of(network):
    out = network(torch.linspace(-1, 1, 15).view(5, 3))
    return {
        "seg": out.square().mean(),
        "kd": 3 * (out[:, 0] - 1).abs().mean(),
        "l1": -0.5 * network[0].weight.sum(),
    }


def gradient_alone(network, name):
    network.zero_grad()
    terms_of(network)[name].backward()
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in network.parameters()]
    network.zero_grad()
    return torch.cat([part.flatten() for part in parts])


def test_shares_are_those_of_separate_backward_passes(network):
    alone = {name: gradient_alone(network, name) for name in ("seg", "kd", "l1")}
    terms = terms_of(network)
    found = term_shares(terms, list(network.parameters()), World())
    norms = {name: vector.norm().item() for name, vector in alone.items()}
    values = {name: abs(term.item()) for name, term in terms.items()}
    for name, norm in norms.items():
        assert found[f"grad_norm/{name}"] == pytest.approx(norm, rel=1e-5)
        assert found[f"grad_share/{name}"] == pytest.approx(norm / sum(norms.values()), rel=1e-5)
        assert found[f"loss_share/{name}"] == pytest.approx(
            values[name] / sum(values.values()), rel=1e-5
        )
    for name in ("kd", "l1"):
        cosine = torch.dot(alone[name], alone["seg"]) / (norms[name] * norms["seg"])
        assert found[f"cosine/{name}"] == pytest.approx(cosine.item(), abs=1e-5)
    assert "cosine/seg" not in found


def test_doubling_a_term_doubles_its_norm_alone(network):
    terms = terms_of(network)
    once = term_shares(terms, list(network.parameters()), World())
    twice = term_shares(terms | {"kd": 2 * terms["kd"]}, list(network.parameters()), World())
    assert twice["grad_norm/kd"] == pytest.approx(2 * once["grad_norm/kd"], rel=1e-5)
    assert twice["grad_norm/seg"] == once["grad_norm/seg"]
    assert twice["cosine/kd"] == pytest.approx(once["cosine/kd"], rel=1e-5)


def test_a_constant_term_and_one_that_does_not_reach_the_network(network):
    adapter = nn.Linear(2, 1)
    terms = terms_of(network) | {"off": torch.zeros(()), "adapter": adapter.weight.square().sum()}
    found = term_shares(terms, list(network.parameters()), World())
    assert found["grad_norm/off"] == found["grad_norm/adapter"] == 0
    assert found["grad_share/off"] == 0 and math.isnan(found["cosine/off"])


def test_nothing_of_the_training_changes(network):
    terms = terms_of(network)
    random = torch.get_rng_state()
    measured = Diagnosis(1, network.parameters(), World(), Lines())
    measured.measure(0, terms, torch.amp.GradScaler("cpu", enabled=False))
    assert all(p.grad is None for p in network.parameters())
    assert torch.equal(random, torch.get_rng_state())
    sum(terms.values()).backward()
    with_it = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    sum(terms_of(network).values()).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(with_it, network.parameters()))


def test_the_scale_keeps_half_precision_from_underflow_and_gives_way_to_overflow(network):
    half = network.half()

    def shares(weight, scale):
        terms = {
            "seg": half[2].bias.sum().float(),
            "kd": (half[2].bias.square() * weight).sum().float(),
        }
        return term_shares(terms, list(half.parameters()), World(), scale)

    with torch.no_grad():
        half[2].bias.fill_(1.0)
    small = 2.0**-26  # below the smallest half-precision number
    assert shares(small, 1.0)["grad_norm/kd"] == 0
    fine = {"seg": half[2].bias.sum().float(), "kd": half[2].bias.float().sum() * small}
    found = term_shares(fine, list(half.parameters()), World(), 2.0**16)
    assert found["grad_norm/kd"] == pytest.approx(small * math.sqrt(2), rel=1e-3)
    # 2^17 overflows
    assert shares(1.0, 2.0**16)["grad_norm/kd"] == pytest.approx(2 * math.sqrt(2), rel=1e-3)


def test_steps_that_are_measured(network):
    log = Lines()
    diagnosis = Diagnosis(2, network.parameters(), World(), log)
    off = torch.amp.GradScaler("cpu", enabled=False)
    for step in (0, 1, 1, 2, 3):  # a method may make several updates of a batch
        diagnosis.measure(step, terms_of(network), off)
    assert [(step, kind) for step, kind, _ in log.lines] == [(1, "diagnosis"), (3, "diagnosis")]
    diagnosis.measure(5, {"seg": terms_of(network)["seg"]}, off)  # alone: nothing to compare
    never = Diagnosis(0, network.parameters(), World(), log)
    never.measure(0, terms_of(network), off)
    assert len(log.lines) == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", KD_METHODS)
def test_every_method_can_be_measured_and_trained_on(method):
    """The backward pass of each method's terms can run more than once, and gives the step's own
    gradient again.
    """
    torch.manual_seed(0)
    student = build_network("unet", 1, 3, channels=[2, 4, 4, 8])
    teacher = build_network("resunet", 1, 3, channels=[4, 4, 8, 8]).eval().requires_grad_(False)
    kd = build_kd(method, student.feature_channels, teacher.feature_channels, 3)
    image, label = torch.randn(2, 1, 16, 16, 16), torch.randint(0, 3, (2, 1, 16, 16, 16))
    output = student(image, return_features=True)
    terms = {"seg": output.logits.square().mean()} | kd(
        output, teacher(image, return_features=True), label, 0.5
    )
    found = term_shares(terms, list(student.parameters()), World())
    gradients = {}
    for name, term in terms.items():
        parts = torch.autograd.grad(
            term, list(student.parameters()), retain_graph=True, allow_unused=True
        )
        gradients[name] = [0.0 if part is None else part for part in parts]
        assert found[f"grad_norm/{name}"] == pytest.approx(
            math.sqrt(sum(torch.as_tensor(part).square().sum().item() for part in gradients[name])),
            rel=1e-4,
        )
    sum(terms.values()).backward()
    # Some are differences of large numbers: close beside the whole gradient, not each beside
    # itself.
    size = math.sqrt(
        sum(p.grad.square().sum().item() for p in student.parameters() if p.grad is not None)
    )
    for k, parameter in enumerate(student.parameters()):
        expected = sum(parts[k] for parts in gradients.values())
        if parameter.grad is not None:
            assert torch.linalg.vector_norm(parameter.grad - expected).item() < 1e-4 * size


def log_of(shares=(), teacher=None, val=(), cosine=None):
    lines = [] if teacher is None else [{"step": 0, "kind": "teacher", "dice": teacher}]
    for step, kd in enumerate(shares):
        line = {"step": step, "kind": "diagnosis", "grad_share/seg": 1 - kd, "grad_share/kd": kd}
        lines.append(line | ({} if cosine is None else {"cosine/kd": cosine}))
    return lines + [{"step": step, "kind": "val", "dice": dice} for step, dice in enumerate(val)]


@pytest.mark.parametrize(
    "log, expected",
    [
        (log_of(teacher=0.8, val=[0.5, 0.7]), []),
        (log_of(teacher=0.8, val=[0.81, 0.7]), ["teacher is not better", "0.8000 against 0.8100"]),
        (log_of(teacher=0.8), []),
        (log_of(val=[0.8]), []),
        (log_of([0.3, 0.4]), []),
        (
            log_of([0.001, 0.004, math.nan]),
            ["'kd' is negligible: at most 0.4 %", "2 measurements", "'seg' dominates"],
        ),
        (log_of([0.001, 0.02, 0.3]), ["'seg' dominates: 98 %"]),
        (log_of([0.9, 0.95, 0.1]), ["'kd' dominates: 90 %"]),
        (
            log_of([0.0]),
            ["negligible: at most 0 % of the gradient norm in 1 measurement;", "'seg' dominates"],
        ),
        (log_of([0.5, 0.5], cosine=-0.4), ["'kd' works against 'seg'", "-0.40"]),
        (log_of([0.5, 0.5], cosine=0.4), []),
        (log_of([0.5, 0.5], cosine=None), []),
    ],
)
def test_findings(log, expected):
    # undefined: null
    found = findings([{k: None if v != v else v for k, v in line.items()} for line in log])
    assert all(each.what and each.advice for each in found)
    texts = list(map(str, found))
    assert bool(texts) == bool(expected)
    for part in expected:
        assert any(part in text for text in texts), texts


def logged(values, shares, rest=0.5):
    train = [
        {"step": k, "kind": "train", "loss": rest + value, "kd": value}
        for k, value in enumerate(values)
    ]
    return train + log_of(shares)


def test_a_term_that_is_stuck_is_told_from_one_that_was_taken_away():
    """Without gradient to the end while its value stays: a saturated unit. With its value gone: a
    schedule's end.
    """
    expected = (
        "'kd' is stuck: since step 3 it has under 1 % of the gradient norm, while its value stays "
        "at 1.6"
    )
    assert any(
        expected in text
        for text in map(str, findings(logged([1.2, 1.6, 1.6, 1.6], [0.3, 0.3, 0.001, 0.0])))
    )
    assert any(
        "'kd' is stuck: since step 1 " in text
        for text in map(str, findings(logged([1.6] * 4, [0.0, 0.001])))
    )
    for values, shares in (
        ([1.6, 0.5, 0.01, 0.001], [0.3, 0.3, 0.001, 0.0]),  # its weight fell
        ([1.6, 1.6, 1.6, 1.6], [0.3, 0.3, 0.3, 0.0]),  # only lately
        ([1.6, 1.6, 1.6, 1.6], [0.0, 0.0, 0.0, 0.3]),  # it came back
        ([], [0.0, 0.0]),
        ([0.010, 0.009, 0.008, 0.008], [0.004, 0.004]),  # a small weight
        ([0.010, 0.009, 0.008, 0.008], [0.001, 0.005, 0.009]),  # a weight that grows
    ):
        assert not any("stuck" in text for text in map(str, findings(logged(values, shares))))
    for values, shares in (([0.010, 0.009, 0.008], [0.004, 0.004]), ([1e-10, 1e-10], [0.0, 0.0])):
        texts = list(map(str, findings(logged(values, shares))))
        assert any("negligible" in text for text in texts) and not any(
            "stuck" in text for text in texts
        )


def test_history():
    log = [*log_of([0.5]), {"step": 9, "kind": "train", "loss": 1.0}]
    assert term_history(log, "grad_share") == {"seg": [(0, 0.5)], "kd": [(0, 0.5)]}
    assert term_history(log, "cosine") == {}


def pseudo_log(foreground, recalls, dice=(0.3, 0.5, 0.6, 0.7)):
    """Eight lines of training whose truth has 4 % foreground, and a validation of two classes."""
    lines = [
        {"kind": "train", "step": k, "pseudo_foreground": f, "true_foreground": 0.04}
        | {"recall_1": first, "recall_2": second}
        for k, (f, (first, second)) in enumerate(zip(foreground, recalls, strict=True))
    ]
    scores = [{"kind": "val", "step": 8, "dice": d, "heart": d, "a <b>": d} for d in dice]
    return lines + scores


def test_pseudo_labels_that_have_lost_their_foreground_are_named():
    log = pseudo_log([0.24, 0.04, 0.03, 0.02, 0.01, 0.01, 0.004, 0.004], [(0.5, 0.5)] * 8)
    (text,) = map(str, findings(log))
    assert (
        "lost the foreground: 0.40 % of the voxels at the end, where the truth has 4.00 %" in text
    )
    assert "docs/faq.md, 'Few labels: the pseudo-labels collapse'" in text
    assert findings(pseudo_log([0.001] * 6 + [0.011, 0.011], [(0.5, 0.5)] * 8)) == []


def test_a_class_that_pseudo_labels_have_lost_is_named():
    log = pseudo_log([0.04] * 8, [(0.5, 0.5)] * 6 + [(0.6, 0.04), (None, 0.05)])
    (text,) = map(str, findings(log))
    assert (
        "lost the class 'a <b>': only 4.5 % of its voxels are labelled so, with enough "
        "confidence, at the end" in text
    )
    early = pseudo_log([0.04] * 8, [(0.0, 0.0)] * 6 + [(0.5, 0.5)] * 2)
    assert findings(early) == []


def test_a_validation_that_stayed_near_0_is_named():
    for dice, said in (((0.0, 0.0254, 0.01), True), ((0.0, 0.3, 0.0), False)):
        found = findings([{"kind": "val", "step": k, "dice": d} for k, d in enumerate(dice)])
        assert bool(found) is said
        if said:
            assert "stayed near 0: the best mean Dice is 0.0254" in found[0].what
            assert "'The network predicts nothing but background'" in found[0].advice


def test_sections_that_findings_name_are_in_the_faq():
    faq = (Path(__file__).resolve().parents[2] / "docs/faq.md").read_text(encoding="utf-8")
    for place in (FAQ_BACKGROUND, FAQ_COLLAPSE):
        assert f"## {place.split(chr(39))[1]}\n" in faq
