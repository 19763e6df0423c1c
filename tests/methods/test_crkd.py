"""CRKD against a second implementation written from its description, and what each argument
changes.
"""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from losses.crkd import ProjectionHead, pseudo_label
from methods.base import pseudo_label_report
from methods.crkd import CRKD
from networks.unet2d import UNet2D
from networks.vnet import VNet
from utils.config import ConfigError, check_arguments

CLASSES, STEPS = 3, 20
TERMS = ["sup", "pseudo_s", "pseudo_fp", "lec", "csd", "ckd_pixel", "ckd_feature"]
WEIGHTED = ["lec", "csd", "ckd_pixel", "ckd_feature"]


def norms(network):
    return [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def grid_of(dims):
    return (32, 32) if dims == 2 else (16, 16, 16)


def make_network(dims, dropout=False):
    """Tiny, with statistics that fit the data and logits that do not all point to one class."""
    torch.manual_seed(10 + dims)
    if dims == 2:
        network = UNet2D(
            1, CLASSES, channels=(2, 4, 4, 8, 8), dropout=(0.3 if dropout else 0.0,) * 5
        )
        out = network.decoder.out_conv
    else:
        network = VNet(1, CLASSES, n_filters=2, dropout=0.3 if dropout else 0.0)
        out = network.decoder.out_conv
    nn.init.normal_(out.weight, std=1.0)
    nn.init.zeros_(out.bias)
    for norm in norms(network):
        norm.momentum = None  # cumulative average
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(2, 1, *grid_of(dims)))
    for norm in norms(network):
        norm.momentum = 0.1
    return network


def make_batch(dims, seed=0, unlabelled=2):
    rng = torch.Generator().manual_seed(seed)
    grid = grid_of(dims)

    def randn(count):
        return torch.randn(count, 1, *grid, generator=rng)

    weak = randn(unlabelled)
    labelled = {
        "image": randn(2),
        "label": torch.randint(0, CLASSES, (2, 1, *grid), generator=rng).byte(),
    }
    truth = torch.randint(0, CLASSES, (unlabelled, 1, *grid), generator=rng).byte()
    return labelled, {"weak": weak, "strong0": 0.8 * weak + 0.3 * randn(unlabelled), "label": truth}


def make(dims, dropout=False, network=None, **arguments):
    """A CRKD whose CSD is cheap and whose threshold lets a part of the voxels pass."""
    network = make_network(dims, dropout) if network is None else network
    cheap = {"csd_pool": 4, "csd_samples": 24, "projection_channels": 8, "threshold": 0.6}
    torch.manual_seed(5)
    return CRKD(lambda: network, max_steps=STEPS, **cheap | arguments)


def off(**kept):
    """Every weight of the ramped terms 0 but those given."""
    return dict.fromkeys(WEIGHTED, 0.0) | kept


def gradients(terms, method):
    method.zero_grad()
    sum(terms.values()).backward()
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def run(method, batch, step=7, seed=0):
    torch.manual_seed(seed)
    return method.loss(*batch, step)


# --- the second implementation ---


def slow_cross_entropy(p, y):
    return -p[torch.arange(len(y)), y].log().mean() if len(y) else p.sum()


def slow_dice(p, y, background=False, average=False, absent=True):
    losses = []
    for k in range(0 if background else 1, p.shape[1]):
        one = (y == k).double()
        if absent or one.sum() > 0:
            losses.append(
                1 - (2 * (p[:, k] * one).sum() + 1e-5) / ((p[:, k] ** 2).sum() + one.sum() + 1e-5)
            )
    return sum(losses) / (len(losses) if average else 1)


def voxels(values):
    """(B, C, *grid) -> (voxels, C) float64."""
    return values.movedim(1, -1).reshape(-1, values.shape[1]).double()


def slow_pseudo(logits, y, valid, kind, **dice):
    keep = valid.flatten()
    p, y = voxels(logits).softmax(1)[keep], y.flatten()[keep]
    if kind == "ce":
        return slow_cross_entropy(p, y)
    if kind == "dice":
        return slow_dice(p, y, **dice)
    return 0.5 * slow_cross_entropy(p, y) + 0.5 * slow_dice(p, y, **dice)


def slow_lec(logits_s, logits_fp, beta, distance, mask=None, eps=1e-8):
    probs = [voxels(logits).softmax(1) for logits in (logits_s, logits_fp)]
    raw = [(p * (p + eps).log()).sum(1).exp() * p.amax(1) ** beta for p in probs]
    alphas = [w / (raw[0] + raw[1] + eps) for w in raw]
    mean = sum(a[:, None] * p for a, p in zip(alphas, probs))
    if distance == "kl":
        distances = [(p * ((p + eps) / (mean + eps)).log()).sum(1) for p in probs]
    else:
        distances = [(p - mean).abs().sum(1) for p in probs]
    per_voxel = sum(a * d for a, d in zip(alphas, distances)) / (sum(alphas) + eps)
    return per_voxel.mean() if mask is None else per_voxel[mask.flatten()].mean()


def slow_csd(
    features, pred_l, y_l, pred_u, conf_u, head, pool, tau, use_tp, normalise, threshold, samples
):
    """With more rows wanted than there are, so that nothing is drawn; halves in order of
    position.
    """
    dims = features[0].ndim - 2
    pooling = F.avg_pool2d if dims == 2 else F.avg_pool3d
    features = [voxels(pooling(f, pool)) for f in features]
    pred_l, y_l, pred_u = (
        v[(slice(None), *[slice(None, None, pool)] * dims)].flatten() for v in (pred_l, y_l, pred_u)
    )
    align = {"mode": "bilinear", "align_corners": True} if dims == 2 else {"mode": "trilinear"}
    conf = F.interpolate(conf_u[:, None], scale_factor=1 / pool, **align).flatten()
    reliable = conf >= (conf.mean() if threshold is None else threshold)
    picked = []  # (stream, class, rows)
    for k in range(CLASSES):
        anchors = (pred_l == k) & ((y_l == k) if use_tp else True)
        contrast = [i for i in range(len(pred_u)) if pred_u[i] == k and reliable[i]]
        half = len(contrast) // 2
        picked.append((0, k, anchors.nonzero()[:, 0].tolist()))
        picked += [(1, k, contrast[:half]), (2, k, contrast[half:])]
    picked = [entry for entry in picked if entry[2]]
    assert len({k for stream, k, _ in picked if stream}) > 1, (
        "a case without two classes tests nothing"
    )
    projected = head(
        torch.cat([features[stream][rows] for stream, _, rows in picked]).float()
    ).double()
    sides = {"anchor": ([], []), "contrast": ([], [])}
    for (stream, k, rows), z in zip(picked, projected.split([len(rows) for _, _, rows in picked])):
        wanted = samples // CLASSES + (samples % CLASSES if k == CLASSES - 1 else 0)
        assert len(rows) < wanted
        mean = z.mean(0) / (z.mean(0).norm() if normalise else 1)
        vectors, classes = sides["contrast" if stream else "anchor"]
        vectors += [z[i % len(rows)] for i in range(wanted)] + [mean]
        classes += [k] * (wanted + 1)
    (a, a_class), (v, v_class) = ((torch.stack(z), torch.tensor(k)) for z, k in sides.values())
    similarity = a @ v.T / tau
    log_p = similarity - similarity.exp().sum(1, keepdim=True).log()
    losses = [
        -row[v_class == k].mean() if (v_class == k).any() else row.sum() * 0
        for row, k in zip(log_p, a_class)
    ]
    return torch.stack(losses).mean()


def slow_ckd(logits_s, logits_fp, f_s, f_fp, y, valid, temperature, feature_tau, detach):
    p_s, p_fp = voxels(logits_s).softmax(1), voxels(logits_fp).softmax(1)
    rows = torch.arange(len(p_s))
    better = -p_s[rows, y.flatten()].log() < -p_fp[rows, y.flatten()].log()
    valid = valid.flatten()
    soft = [(voxels(z) / temperature).log_softmax(1) for z in (logits_s, logits_fp)]
    f_s, f_fp = voxels(f_s), voxels(f_fp)
    pixel = feature = 0.0
    for teaches, teacher, student, f_teacher, f_student in (
        (better & valid, soft[0], soft[1], f_s, f_fp),
        (~better & valid, soft[1], soft[0], f_fp, f_s),
    ):
        if not teaches.any():
            continue
        log_q, log_p = teacher.detach()[teaches], student[teaches]
        pixel = pixel + (temperature**2 / CLASSES * (log_q.exp() * (log_q - log_p)).sum(1)).mean()
        a, b = f_student[teaches], f_teacher.detach()[teaches] if detach else f_teacher[teaches]
        feature = feature + (1 - F.cosine_similarity(a, b, dim=1) / feature_tau).mean()
    return pixel, feature, (better & valid).sum() / valid.sum()


def ramp(t, length):
    return math.exp(-5 * (1 - min(t / length, 1)) ** 2) if length else 1.0


def exchanged(values, pairs, box):
    mixed = values.clone()
    for a, b in pairs:
        for to, source in ((a, b), (b, a)):
            mixed[to][(..., *box)] = values[source][(..., *box)]
    return mixed


def slow_crkd(method, batch, step, pairs=(), box=(), **options):
    """The terms and `s_better`; uses the networks and the head of `method` and none of its
    losses.
    """
    o = {
        "threshold": 0.6,
        "pseudo_loss": "ce_dice",
        "dice": {},
        "pseudo_weight": 0.5,
        "pseudo_ramp": 0.2,
        "pseudo_mode": "train",
        "warmup": 0.0,
        "consistency": 0.1,
        "ramp_length": 2 / 3,
        "lec": 1.0,
        "lec_beta": 1.0,
        "lec_distance": "kl",
        "lec_masked": False,
        "csd": 1.0,
        "csd_tau": 0.1,
        "csd_use_tp": True,
        "csd_threshold": None,
        "normalise": True,
        "ckd_pixel": 1.0,
        "ckd_feature": 1.0,
        "temperature": 1.0,
        "feature_tau": 1.0,
        "detach": True,
        "feature_space": "raw",
        "perturb": 0.5,
        "fp_input": "mixed",
        "labeller": None,
        "statistics": "all",
        "csd_pool": 4,
        "csd_samples": 400,
    } | options
    labelled, unlabelled = batch
    network, labeller = method.network, o["labeller"] or method.network
    x_l, y_l, x_w, x_s = (
        labelled["image"],
        labelled["label"][:, 0].long(),
        unlabelled["weak"],
        unlabelled["strong0"],
    )
    if o["pseudo_mode"] == "joint":
        both = network(torch.cat([x_l, x_w]), return_features=True)
        logits_l, f_l, logits_w = (
            both.logits[:2],
            both.features["decoder"][:2],
            both.logits[2:].detach(),
        )
    else:
        labeller.train(o["pseudo_mode"] == "train")
        with torch.no_grad():
            logits_w = labeller(x_w)
        labeller.train()
        logits_l, taps = network(x_l, return_features=True)
        f_l = taps["decoder"]
    conf, y_u = logits_w.float().softmax(1).max(1)
    x_w_mixed, x_s, y_u, conf = (exchanged(v, pairs, box) for v in (x_w, x_s, y_u, conf))
    logits_s, taps_s = network(x_s, return_features=True)
    x_fp = x_w_mixed if o["fp_input"] == "mixed" else x_w
    logits_fp, taps_fp = network(x_fp, return_features=True, perturb=o["perturb"])
    f_s, f_fp = taps_s["decoder"], taps_fp["decoder"]
    valid = conf >= o["threshold"]
    assert 0 < valid.sum() < valid.numel(), "a case where all or nothing counts tests nothing"

    t = step / STEPS
    w = o["consistency"] * ramp(t, o["ramp_length"])
    pseudo = o["pseudo_weight"] * ramp(max(t - o["warmup"], 0), o["pseudo_ramp"])
    everywhere = torch.ones_like(y_l, dtype=torch.bool)
    pixel, _, s_better = slow_ckd(
        logits_s, logits_fp, f_s, f_fp, y_u, valid, o["temperature"], o["feature_tau"], o["detach"]
    )
    terms = {
        "sup": slow_pseudo(logits_l, y_l, everywhere, "ce_dice"),
        "pseudo_s": 0.5 * pseudo * slow_pseudo(logits_s, y_u, valid, o["pseudo_loss"], **o["dice"]),
        "pseudo_fp": 0.5
        * pseudo
        * slow_pseudo(logits_fp, y_u, valid, o["pseudo_loss"], **o["dice"]),
        "lec": w
        * o["lec"]
        * slow_lec(
            logits_s,
            logits_fp,
            o["lec_beta"],
            o["lec_distance"],
            valid if o["lec_masked"] else None,
        ),
        "csd": w
        * o["csd"]
        * slow_csd(
            (f_l, f_s, f_fp),
            logits_l.argmax(1),
            y_l,
            y_u,
            conf,
            method.head,
            o["csd_pool"],
            o["csd_tau"],
            o["csd_use_tp"],
            o["normalise"],
            o["csd_threshold"],
            o["csd_samples"],
        ),
        "ckd_pixel": w * o["ckd_pixel"] * pixel,
    }
    if o["feature_space"] == "projected":
        f_s, f_fp = method.head(f_s), method.head(f_fp)
    _, feature, _ = slow_ckd(
        logits_s, logits_fp, f_s, f_fp, y_u, valid, o["temperature"], o["feature_tau"], o["detach"]
    )
    return terms | {"ckd_feature": w * o["ckd_feature"] * feature}, s_better


@pytest.fixture
def settled(monkeypatch):
    """Fixed boxes, halves and dropped channels, float64 throughout; returns dims -> the pairs and
    the box exchanged.
    """
    pairs = [(0, 1)]

    def box(shape):
        return tuple(slice(side // 4, side // 2 + 1 + i) for i, side in enumerate(shape))

    def draw_exchange(batch, shape, prob, generator):
        partner, mask = torch.arange(batch), torch.zeros(batch, *shape, dtype=torch.bool)
        partner[:2] = torch.tensor([1, 0])
        mask[(slice(0, 2), *box(shape))] = True
        return partner, mask

    def drop_channels(features, probability):
        kept = [(torch.arange(f.shape[1]) % 3 != 1).view(-1, *[1] * (f.ndim - 2)) for f in features]
        return [f * k.to(f.dtype) / (1 - probability) for f, k in zip(features, kept)]

    # the losses work in float32 otherwise
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr("losses.crkd.draw_exchange", draw_exchange)
    monkeypatch.setattr("losses.crkd._permutation", lambda count, generator: torch.arange(count))
    monkeypatch.setattr("networks.unet2d.drop_channels", drop_channels)
    monkeypatch.setattr("networks.vnet.drop_channels", drop_channels)
    return lambda dims: {"pairs": pairs, "box": box(grid_of(dims))}


# What the second implementation is told in place of an argument of its own name.
TRANSLATED = {
    "dice_background": {"dice": {"background": True}},
    "dice_average": {"dice": {"average": True}},
    "dice_absent": {"dice": {"absent": False}},
    "detach_better": {"detach": False},
    "preset": {
        "csd_tau": 1.0,
        "csd_use_tp": False,
        "normalise": False,
        "feature_tau": 0.07,
        "detach": False,
    },
}
VARIANTS = [
    {},
    {"pseudo_mode": "eval"},
    {"pseudo_mode": "joint"},
    {"pseudo_ramp": 0.0},
    {"statistics": "all"},
    {"preset": "as_released"},
    {"pseudo_loss": "ce"},
    {"pseudo_loss": "dice"},
    {"dice_background": True},
    {"dice_average": True},
    {"dice_absent": False},
    {"pseudo_weight": 1.5, "pseudo_ramp": 0.7},
    {"lec_masked": True},
    {"lec_distance": "l1"},
    {"lec_beta": 2.0},
    {"csd_tau": 0.5},
    {"csd_use_tp": False},
    {"csd_threshold": 0.5},
    {"temperature": 2.0},
    {"feature_tau": 0.5},
    {"detach_better": False},
    {"feature_space": "projected"},
    {"fp_input": "weak"},
    {"perturb": 0.2},
    {"threshold": 0.8},
    {"consistency": 0.7, "ramp_length": 0.9},
    {"lec": 2.0, "csd": 0.5, "ckd_pixel": 3.0, "ckd_feature": 0.2},
    {"warmup": 0.3, "pseudo_ramp": 0.5},
]


@pytest.mark.parametrize(
    "dims, variant",
    [*((dims, variant) for dims in (2, 3) for variant in VARIANTS), (2, {"csd_pool": 8})],
    ids=lambda v: (
        ",".join(f"{key}={value}" for key, value in v.items()) or "defaults"
        if isinstance(v, dict)
        else None
    ),
)
def test_terms_and_gradients_equal_the_second_implementation(settled, dims, variant):
    network = make_network(dims)
    for norm in norms(network):
        norm.momentum = 0.0  # statistics stand still: every pass sees the same ones
    method = make(dims, network=network, csd_samples=400, **variant).double()
    labelled, unlabelled = make_batch(dims, unlabelled=3)
    batch = (
        labelled | {"image": labelled["image"].double()},
        {key: value.double() if key != "label" else value for key, value in unlabelled.items()},
    )
    other = copy.deepcopy(method)
    options = {}
    for key, value in variant.items():
        options |= TRANSLATED.get(key, {key: value})
    terms = method.loss(*batch, 7)
    expected, s_better = slow_crkd(other, batch, 7, **settled(dims), **options)
    assert list(terms) == TERMS and all(term.shape == () for term in terms.values())
    values = {name: term.item() for name, term in terms.items()}
    assert values == pytest.approx({name: term.item() for name, term in expected.items()}, rel=1e-9)
    assert method.monitor["s_better"].item() == pytest.approx(s_better.item())
    found, wanted = gradients(terms, method), gradients(expected, other)
    assert found.keys() == wanted.keys()
    largest = max(gradient.abs().max() for gradient in wanted.values()).item()
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10 * largest)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("ema_for", ["labels", "evaluation", "both"])
def test_pseudo_labels_come_from_the_average_where_it_is_meant_to(settled, dims, ema_for):
    network = make_network(dims)
    for norm in norms(network):
        norm.momentum = 0.0
    method = make(dims, network=network, csd_samples=400, ema_decay=0.9, ema_for=ema_for).double()
    with torch.no_grad():  # another network altogether
        for p in method.average.parameters():
            p.mul_(
                1 + 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
            )
    batch = tuple(
        {k: v.double() if k != "label" else v for k, v in part.items()} for part in make_batch(dims)
    )
    other = copy.deepcopy(method)
    values = {name: term.item() for name, term in method.loss(*batch, 7).items()}
    by = {}
    for name in ("average", "network"):
        terms, _ = slow_crkd(other, batch, 7, labeller=getattr(other, name), **settled(dims))
        by[name] = {key: term.item() for key, term in terms.items()}
    right, wrong = ("network", "average") if ema_for == "evaluation" else ("average", "network")
    assert values == pytest.approx(by[right], rel=1e-9)
    assert all(
        values[key] != pytest.approx(by[wrong][key], rel=1e-3)
        for key in ("pseudo_s", "pseudo_fp", "csd")
    )


# --- views, ramps, weights ---


@pytest.mark.parametrize("dims", [2, 3])
def test_equal_views_agree_and_teach_each_other_nothing(dims):
    method = make(dims, perturb=0.0)
    if dims == 3:  # the last ReLU lets every voxel have a feature, whose cosine with itself is 1
        nn.init.constant_(method.network.decoder.block_nine.conv[1].bias, 9.0)
    labelled, unlabelled = make_batch(dims)
    terms = run(method, (labelled, unlabelled | {"strong0": unlabelled["weak"].clone()}))
    assert method.monitor["s_better"] == 0  # ties do not count
    assert terms["pseudo_s"].item() == terms["pseudo_fp"].item() > 0
    assert {key: terms[key].item() for key in ("lec", "ckd_pixel", "ckd_feature")} == pytest.approx(
        {"lec": 0.0, "ckd_pixel": 0.0, "ckd_feature": 0.0}, abs=1e-6
    )


@pytest.mark.parametrize("ramp_length", [0.0, 0.5, 2 / 3, 1.0])
def test_ramped_terms_follow_the_step_and_the_others_do_not(ramp_length):
    method, batch = make(2, ramp_length=ramp_length, pseudo_ramp=0.0), make_batch(2)
    full = run(copy.deepcopy(method), batch, STEPS)
    for step in (0, 1, 9, 14, 19):
        terms = run(copy.deepcopy(method), batch, step)
        for name in WEIGHTED:
            expected = ramp(step / STEPS, ramp_length) * full[name].item()
            assert terms[name].item() == pytest.approx(expected, rel=1e-5)
        for name in ("sup", "pseudo_s", "pseudo_fp"):
            assert torch.equal(terms[name], full[name])


@pytest.mark.parametrize("warmup", [0.0, 0.25])
@pytest.mark.parametrize("pseudo_ramp", [0.0, 0.4])
def test_pseudo_terms_rise_from_the_end_of_the_warmup(warmup, pseudo_ramp):
    method, batch = make(2, warmup=warmup, pseudo_ramp=pseudo_ramp), make_batch(2)
    full = run(copy.deepcopy(method), batch, STEPS)
    for step in (5, 8, 12, 13, 19):
        terms = run(copy.deepcopy(method), batch, step)
        for name in ("pseudo_s", "pseudo_fp"):
            expected = ramp(step / STEPS - warmup, pseudo_ramp) * full[name].item()
            assert terms[name].item() == pytest.approx(expected, rel=1e-5)


def test_warmup_has_labels_only():
    method, batch = make(2, warmup=0.3), make_batch(2)
    run(method, batch, 19)
    expected = run(copy.deepcopy(method), batch, 6)["sup"]
    for step in (0, 5):
        terms = copy.deepcopy(method).loss(batch[0], None, step)
        assert list(terms) == ["sup"]
        torch.testing.assert_close(terms["sup"], expected)
    method.loss(batch[0], None, 5)
    assert method.monitor == {}
    assert list(run(method, batch, 6)) == TERMS


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_weight_scales_its_own_term_alone(name):
    batch = make_batch(2)
    once, thrice = (run(make(2, **{name: weight}), batch) for weight in (1.0, 3.0))
    for term in TERMS:
        factor = 3.0 if term == name else 1.0
        assert thrice[term].item() == pytest.approx(factor * once[term].item(), rel=1e-6)


def test_consistency_scales_all_ramped_terms():
    batch = make_batch(2)
    small, large = (run(make(2, consistency=value), batch) for value in (0.1, 0.4))
    for term in TERMS:
        factor = 4.0 if term in WEIGHTED else 1.0
        assert large[term].item() == pytest.approx(factor * small[term].item(), rel=1e-6)


def test_pseudo_weight_scales_both_pseudo_terms():
    batch = make_batch(2)
    small, large = (run(make(2, pseudo_weight=value), batch) for value in (0.5, 2.0))
    for term in TERMS:
        factor = 4.0 if term in ("pseudo_s", "pseudo_fp") else 1.0
        assert large[term].item() == pytest.approx(factor * small[term].item(), rel=1e-6)


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_weight_of_zero_removes_the_term_and_leaves_the_others(name):
    batch = make_batch(2)
    every, fewer = run(make(2), batch), run(make(2, **{name: 0.0}), batch)
    assert list(fewer) == [term for term in TERMS if term != name]
    for term in fewer:
        assert torch.equal(fewer[term], every[term])


@pytest.mark.parametrize("arguments", [{"pseudo_loss": "none"}, {"pseudo_weight": 0.0}])
def test_pseudo_terms_can_be_left_out(arguments):
    batch = make_batch(2)
    every, fewer = run(make(2), batch), run(make(2, **arguments), batch)
    assert list(fewer) == ["sup", *WEIGHTED]
    assert all(torch.equal(fewer[term], every[term]) for term in fewer)


def test_with_every_weight_zero_only_the_labels_are_left():
    method = make(2, pseudo_loss="none", **off())
    batch = make_batch(2)
    terms = run(method, batch)
    assert list(terms) == ["sup"] and "s_better" not in method.monitor
    found = gradients(terms, method)
    alone = make(2, warmup=0.9)
    expected = gradients(run(alone, batch, 0), alone)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


# --- every option ---


CHOICES = [
    {},
    {"preset": "as_released"},
    {"pseudo_loss": "ce_dice"},
    {"pseudo_loss": "ce"},
    {"pseudo_loss": "dice"},
    {"pseudo_loss": "none"},
    {"dice_background": True},
    {"dice_average": True},
    {"dice_absent": False},
    {"dice_background": True, "dice_average": True, "dice_absent": False},
    {"pseudo_mode": "eval"},
    {"pseudo_mode": "train"},
    {"pseudo_mode": "joint"},
    {"statistics": "all"},
    {"statistics": "clean"},
    {"statistics": "clean", "pseudo_mode": "joint"},
    {"lec_distance": "kl"},
    {"lec_distance": "l1"},
    {"lec_masked": True},
    {"lec_beta": 0.0},
    {"csd_pool": 1},
    {"csd_pool": 2},
    {"csd_use_tp": False},
    {"csd_threshold": 0.9},
    {"csd_tau": 1.0},
    {"csd_samples": 3},
    {"feature_space": "projected"},
    {"feature_space": "projected", "preset": "as_released"},
    {"fp_input": "weak"},
    {"cutmix_prob": 0.0},
    {"cutmix_prob": 1.0},
    {"perturb": 0.0},
    {"perturb": 0.9},
    {"threshold": 0.0},
    {"threshold": 1.0},
    {"temperature": 4.0},
    {"feature_tau": 0.1},
    {"detach_better": False},
    {"ema_decay": 0.9, "ema_for": "labels"},
    {"ema_decay": 0.9, "ema_for": "evaluation"},
    {"ema_decay": 0.9, "ema_for": "both"},
    {"ema_decay": 0.9, "pseudo_mode": "train"},
    {"ema_decay": 0.9, "ema_for": "evaluation", "pseudo_mode": "joint"},
    {"warmup": 0.1},
    {"pseudo_ramp": 1.0},
]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    "arguments", CHOICES, ids=lambda v: ",".join(f"{k}={x}" for k, x in v.items()) or "defaults"
)
def test_every_option_trains_with_finite_numbers(dims, arguments):
    method = make(dims, dropout=True, **arguments)
    terms = run(method, make_batch(dims, unlabelled=3))
    assert list(terms) == [
        term
        for term in TERMS
        if not (term[:6] == "pseudo" and method.options.pseudo_loss == "none")
    ]
    assert all(
        term.shape == () and term.dtype == torch.float32 and torch.isfinite(term)
        for term in terms.values()
    )
    found = gradients(terms, method)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    assert found.keys() == trained and all(
        name.startswith(("network.", "head.")) for name in trained
    )
    method.after_step(7)
    assert all(torch.isfinite(value).all() for value in method.state_dict().values())


@pytest.mark.parametrize(
    "option, value",
    [
        ("pseudo_loss", "foo"),
        ("pseudo_mode", "foo"),
        ("statistics", "foo"),
        ("lec_distance", "l2"),
        ("feature_space", "foo"),
        ("fp_input", "strong"),
        ("ema_for", "foo"),
        ("threshold", 1.5),
        ("threshold", -0.1),
        ("threshold", math.nan),
        ("pseudo_ramp", 2),
        ("warmup", 1),
        ("ramp_length", -1),
        ("cutmix_prob", 1.1),
        ("perturb", 1),
        ("ema_decay", 1),
        ("ema_decay", -0.5),
        ("csd_samples", 0),
        ("csd_pool", 0),
        ("temperature", 0.0),
    ],
)
def test_bad_options_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"crkd: {option} must"):
        make(2, **{option: value})


@pytest.mark.parametrize("ema_for", ["labels", "both"])
def test_an_average_cannot_label_in_the_joint_pass(ema_for):
    with pytest.raises(ValueError, match="pseudo_mode 'joint' labels with the trained network"):
        make(2, pseudo_mode="joint", ema_decay=0.9, ema_for=ema_for)


def test_the_head_has_the_rank_of_the_network():
    for dims, kind in ((2, nn.Conv2d), (3, nn.Conv3d)):
        method = make(dims)
        assert isinstance(method.head, ProjectionHead) and isinstance(method.head.final_conv, kind)
        assert method.head.final_conv.out_channels == 8


@pytest.mark.parametrize("dims", [2, 3])
def test_half_precision_gives_float32_terms_and_finite_gradients(dims):
    method = make(dims, dropout=True)
    # oneDNN's weight gradient of a bfloat16 Conv3d on 2x2x2 voxels is at times NaN (torch 2.13).
    with torch.backends.mkldnn.flags(enabled=False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            terms = run(method, make_batch(dims))
        found = gradients(terms, method)
    assert all(term.dtype == torch.float32 and torch.isfinite(term) for term in terms.values())
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("pseudo_loss", ["ce_dice", "ce", "dice"])
def test_without_a_confident_voxel_the_terms_that_need_one_are_zero(dims, pseudo_loss):
    method = make(dims, threshold=1.0, pseudo_loss=pseudo_loss, lec_masked=True)
    terms = run(method, make_batch(dims))
    for name in ("pseudo_s", "pseudo_fp", "lec", "ckd_pixel", "ckd_feature"):
        assert terms[name].item() == 0.0 and terms[name].requires_grad
    assert terms["sup"] > 0 and terms["csd"] > 0


# --- modes, statistics, gradients ---


def statistics(network):
    return [value.clone() for norm in norms(network) for value in norm.buffers()]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("mode", ["eval", "train", "joint"])
def test_clean_statistics_follow_the_clean_images_alone(dims, mode):
    method = make(dims, statistics="clean", pseudo_mode=mode)
    labelled, unlabelled = batch = make_batch(dims)
    alone = copy.deepcopy(method.network)
    with torch.no_grad():
        if mode == "joint":
            alone(torch.cat([labelled["image"], unlabelled["weak"]]))
        else:
            if mode == "train":
                alone(unlabelled["weak"])
            alone(labelled["image"])
    before = statistics(method.network)
    run(method, batch)
    assert equal(statistics(method.network), statistics(alone)) and not equal(
        statistics(alone), before
    )
    assert all(norm.track_running_stats for norm in norms(method.network))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("mode, passes", [("eval", 3), ("train", 4), ("joint", 3)])
def test_all_statistics_follow_every_pass_in_training_mode(dims, mode, passes):
    method = make(dims, statistics="all", pseudo_mode=mode)
    clean = make(dims, statistics="clean", pseudo_mode=mode)
    before = [norm.num_batches_tracked.item() for norm in norms(method.network)]
    for each in (method, clean):
        run(each, make_batch(dims))
    for each, count in ((method, passes), (clean, passes - 2)):
        now = [norm.num_batches_tracked.item() for norm in norms(each.network)]
        assert now == [number + count for number in before]
    means = [[norm.running_mean for norm in norms(each.network)] for each in (method, clean)]
    assert not any(torch.equal(a, b) for a, b in zip(*means))


@pytest.mark.parametrize("mode", ["eval", "train", "joint"])
def test_statistics_change_no_term_of_the_step(mode):
    every, clean = (
        run(make(2, statistics=s, pseudo_mode=mode), make_batch(2)) for s in ("all", "clean")
    )
    assert all(torch.equal(every[name], clean[name]) for name in TERMS)


@pytest.mark.parametrize("mode", ["eval", "train", "joint"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_networks_are_left_in_training_mode(mode, ema_decay):
    method = make(
        2,
        pseudo_mode=mode,
        ema_decay=ema_decay,
        ema_for="evaluation" if mode == "joint" else "labels",
    )
    run(method, make_batch(2))
    assert all(module.training for module in method.modules())


def test_labelling_in_evaluation_mode_leaves_the_average_as_it_is():
    method = make(2, ema_decay=0.9)
    before = {key: value.clone() for key, value in method.average.state_dict().items()}
    run(method, make_batch(2))
    assert all(
        torch.equal(value, before[key]) for key, value in method.average.state_dict().items()
    )


@pytest.mark.parametrize("mode", ["eval", "train", "joint"])
def test_pseudo_labels_carry_no_gradient(monkeypatch, mode):
    seen = []

    def spy(weak, strong, pred, conf, prob):
        seen.append((pred, conf))
        return weak, strong, pred, conf

    monkeypatch.setattr("methods.crkd.symmetric_cutmix", spy)
    method = make(2, pseudo_mode=mode)
    run(method, make_batch(2))
    assert not any(tensor.requires_grad for tensor in seen[0])


def test_joint_gradients_are_those_of_fixed_pseudo_labels(monkeypatch):
    method, batch = make(2, pseudo_mode="joint"), make_batch(2)
    other = copy.deepcopy(method)
    kept = []
    monkeypatch.setattr(
        "methods.crkd.pseudo_label", lambda logits: kept.append(pseudo_label(logits)) or kept[-1]
    )
    found = gradients(run(method, batch), method)
    monkeypatch.setattr("methods.crkd.pseudo_label", lambda logits: kept[0])
    expected = gradients(run(other, batch), other)
    assert found.keys() == expected.keys() and all(
        torch.equal(found[key], expected[key]) for key in found
    )


@pytest.mark.parametrize("mode", ["eval", "train", "joint"])
def test_labels_of_unlabelled_images_change_the_monitor_only(mode):
    labelled, unlabelled = make_batch(2)
    other = unlabelled | {"label": (unlabelled["label"] + 1) % CLASSES}
    method = make(2, pseudo_mode=mode)
    twin = copy.deepcopy(method)
    terms, again = run(method, (labelled, unlabelled)), run(twin, (labelled, other))
    assert all(torch.equal(terms[name], again[name]) for name in TERMS)
    first, second = gradients(terms, method), gradients(again, twin)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert method.monitor["pseudo_accuracy"] != twin.monitor["pseudo_accuracy"]
    assert method.monitor["mask_ratio"] == twin.monitor["mask_ratio"]


def test_the_batch_is_not_written_to():
    batch = make_batch(2)
    before = [{key: value.clone() for key, value in part.items()} for part in batch]
    run(make(2, cutmix_prob=1.0), batch)
    assert all(
        torch.equal(part[key], kept[key]) for part, kept in zip(batch, before) for key in part
    )


class Called(TorchDispatchMode):
    """Names of the operators that run inside the block; indexing by a mask counts as its own."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("index", "index_put_", "_index_put_impl_"):
            if any(
                index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
            ):
                name = "index by a mask"
        self.names.add(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options", [{}, {"csd_pool": 1}, {"feature_space": "projected"}, {"preset": "as_released"}]
)
@pytest.mark.parametrize("dims", [2, 3])
def test_no_operator_has_a_result_whose_size_depends_on_the_data(dims, options):
    """A GPU would be waited for at each; the counts that CSD asks for once per step are the
    exception.
    """
    method, batch = make(dims, **options), make_batch(dims)
    with Called() as called:
        sum(run(method, batch).values()).backward()
    assert "nonzero_static" in called.names
    assert not called.names & {
        "nonzero",
        "masked_select",
        "index by a mask",
        "unique_dim",
        "_unique2",
        "bincount",
    }


# --- random numbers, monitor, pictures ---


@pytest.mark.parametrize("dims", [2, 3])
def test_one_seed_gives_one_set_of_terms(dims):
    method, batch = make(dims, dropout=True), make_batch(dims)
    first, again, other = (run(copy.deepcopy(method), batch, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in TERMS)
    assert not torch.equal(first["pseudo_fp"], other["pseudo_fp"])


MONITOR = [
    "mask_ratio",
    "pseudo_accuracy",
    "pseudo_foreground",
    "true_foreground",
    "recall_1",
    "recall_2",
]


@pytest.mark.parametrize("dims", [2, 3])
def test_monitor_describes_the_pseudo_labels_before_they_are_mixed(dims):
    network = make_network(dims)
    for norm in norms(network):
        norm.momentum = 0.0
    method = make(dims, network=network, cutmix_prob=1.0)
    batch = make_batch(dims)
    twin = copy.deepcopy(network)  # in training mode, as the pass that makes the pseudo-labels
    with torch.no_grad():
        confidence, pred = twin(batch[1]["weak"]).softmax(1).max(1)
    run(method, batch)
    assert list(method.monitor) == [*MONITOR, "s_better"]
    expected = pseudo_label_report(pred, confidence >= 0.6, batch[1]["label"], CLASSES)
    for name in MONITOR:
        assert method.monitor[name].item() == pytest.approx(expected[name].item(), rel=1e-6)
    assert not any(value.requires_grad for value in method.monitor.values())
    assert all(0 <= value <= 1 for value in method.monitor.values())


def test_monitor_is_nan_where_nothing_is_counted():
    method = make(2, threshold=1.0)
    labelled, unlabelled = make_batch(2)
    run(method, (labelled, unlabelled | {"label": torch.zeros_like(unlabelled["label"])}))
    unknown = {name for name, value in method.monitor.items() if value.isnan()}
    assert unknown == {"pseudo_accuracy", "s_better", "recall_1", "recall_2"}
    assert method.monitor["mask_ratio"] == 0


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("fp_input", ["mixed", "weak"])
def test_pictures_show_what_the_step_saw(dims, fp_input):
    method = make(dims, fp_input=fp_input, cutmix_prob=1.0)
    batch = make_batch(dims)
    run(method, batch)
    assert torch.equal(method.pictures["weak, truth"][0], batch[1]["weak"][0])
    assert torch.equal(method.pictures["weak, truth"][1], batch[1]["label"][0, 0])
    mixed, seen = (
        method.pictures["mixed weak, pseudo-label"][0],
        method.pictures["feature-perturbed prediction"][0],
    )
    assert not torch.equal(mixed, batch[1]["weak"][0])
    assert torch.equal(seen, mixed if fp_input == "mixed" else batch[1]["weak"][0])
    for image, ids in method.pictures.values():
        assert image.shape == (1, *grid_of(dims)) and ids.shape == grid_of(dims)
        assert not image.requires_grad and not ids.requires_grad
        assert 0 <= ids.min() and ids.max() < CLASSES


# --- moving average ---


def test_without_a_decay_there_is_no_average():
    method = make(2)
    assert method.average is None and method.evaluated is method.network
    assert not any(key.startswith("average") for key in method.state_dict())
    method.after_step(0)


@pytest.mark.parametrize(
    "ema_for, evaluated", [("labels", "network"), ("evaluation", "average"), ("both", "average")]
)
def test_the_evaluated_network_is_the_average_where_it_serves_evaluation(ema_for, evaluated):
    method = make(2, ema_decay=0.9, ema_for=ema_for)
    assert method.evaluated is getattr(method, evaluated)


def test_the_average_starts_equal_to_the_network_and_is_not_trained():
    method = make(2, ema_decay=0.9)
    own, average = method.network.state_dict(), method.average.state_dict()
    assert own.keys() == average.keys() and all(torch.equal(own[key], average[key]) for key in own)
    assert not {p.data_ptr() for p in method.network.parameters()} & {
        p.data_ptr() for p in method.average.parameters()
    }
    sum(run(method, make_batch(2)).values()).backward()
    assert all(p.grad is None and not p.requires_grad for p in method.average.parameters())
    assert all(p.requires_grad for p in method.network.parameters())


@pytest.mark.parametrize("ema_decay", [0.5, 0.99])
def test_the_average_follows_its_formula_in_weights_and_statistics(ema_decay):
    method = make(2, ema_decay=ema_decay)
    expected = {key: value.double() for key, value in method.average.state_dict().items()}
    for step in range(4):
        with torch.no_grad():
            for value in method.network.state_dict().values():
                if value.is_floating_point():
                    value.add_(torch.rand(value.shape))
                else:
                    value.add_(1)
        method.after_step(step)
        decay = min(1 - 1 / (step + 1), ema_decay)
        for key, value in method.network.state_dict().items():
            expected[key] = (
                decay * expected[key] + (1 - decay) * value
                if value.is_floating_point()
                else value.double()
            )
        for key, value in method.average.state_dict().items():
            torch.testing.assert_close(value.double(), expected[key], rtol=1e-6, atol=1e-6)


def test_a_stored_state_restores_the_average(tmp_path):
    method, other = make(2, ema_decay=0.9), make(2, ema_decay=0.9)
    for value in method.average.state_dict().values():
        value.add_(1)
    torch.save(method.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    first, second = method.state_dict(), other.state_dict()
    assert {key.split(".")[0] for key in first} == {"network", "head", "average"}
    assert first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )


# --- training ---


def test_thirty_steps_learn_an_easy_task():
    torch.manual_seed(0)
    method = CRKD(
        lambda: UNet2D(1, 2, channels=(4, 4, 4, 8, 8), dropout=(0.0,) * 5),
        max_steps=30,
        csd_samples=16,
        csd_pool=4,
        projection_channels=8,
    )
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9)
    label = torch.zeros(4, 1, 32, 32)
    for k in range(4):
        label[k, :, 4 + 4 * k : 16 + 4 * k, 6:26] = 1
    losses = []
    for step in range(30):
        image = 2 * label + 0.2 * torch.randn(label.shape)
        unlabelled = {"weak": image[2:], "strong0": 0.7 * image[2:] + 0.2, "label": label[2:]}
        terms = method.loss({"image": image[:2], "label": label[:2]}, unlabelled, step)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        method.after_step(step)
        losses.append(terms["sup"].item())
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert method.monitor["pseudo_accuracy"] > 0.9


class Wider(CRKD):
    """As a user's own method may be made, with an argument of its own."""

    def __init__(self, *args, extra: float = 1.0, **options):
        super().__init__(*args, **options)
        self.extra = extra


def test_options_are_arguments_with_types_and_a_subclass_may_add_its_own():
    convert = functools.partial(check_arguments, "method_args: crkd", CRKD)
    given = {"feature_tau": "1e-2", "csd_pool": 2, "pseudo_mode": "joint", "csd_tau": None}
    assert convert(given) == given | {"feature_tau": 0.01}
    for wrong in ({"lec_masked": "false"}, {"csd_pool": 1.5}, {"pseudo_moed": "joint"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            convert(wrong)
    own = check_arguments("method_args: own", Wider, {"extra": 2, "csd_tau": 0.2})
    method = Wider(lambda: make_network(2), STEPS, **own)
    assert method.extra == 2 and method.options.csd_tau == 0.2
