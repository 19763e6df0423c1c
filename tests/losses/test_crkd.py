import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from losses import crkd
from losses.crkd import (
    ProjectionHead,
    _indices,
    _members_first,
    _MutualCosine,
    class_semantic_distillation,
    comparison_mask,
    cross_distillation,
    draw_box,
    draw_boxes,
    draw_exchange,
    exchange,
    low_entropy_consistency,
    pseudo_label,
    symmetric_cutmix,
)
from losses.kd import unit_vectors
from tests.losses import reference as ref
from tests.losses.test_consistency import check_gradients

GRIDS = [(5, 4), (4, 3, 2)]
HALF = [
    lambda x: x.half(),
    lambda x: x.bfloat16(),
    lambda x: (1e4 * x.sign()).half(),
    lambda x: 0.0 * x,
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=seeded(seed))


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def unit(vector):
    return vector / np.sqrt((vector**2).sum())


# --- pseudo-labels ---


def test_pseudo_label():
    logits = randn(2, 3, 4, 5).requires_grad_()
    label, confidence = pseudo_label(logits.half())
    probs = logits.detach().half().float().softmax(1)
    assert (
        label.dtype == torch.int64
        and confidence.dtype == torch.float32
        and not confidence.requires_grad
    )
    assert torch.equal(label, probs.argmax(1)) and torch.equal(confidence, probs.amax(1))


# --- low-entropy consistency ---


def slow_lec(s, fp, beta=1.0, distance="kl"):
    values = []
    for (_, _, a), (_, _, b) in zip(ref.columns(s), ref.columns(fp)):
        probs = [ref.softmax(a), ref.softmax(b)]
        weights = [np.exp(sum(x * np.log(x) for x in p)) * max(p) ** beta for p in probs]
        weights = [w / sum(weights) for w in weights]
        mean = weights[0] * probs[0] + weights[1] * probs[1]
        if distance == "kl":
            distances = [ref.kl(p, mean) for p in probs]
        else:
            distances = [sum(abs(x - y) for x, y in zip(p, mean)) for p in probs]
        values.append(weights[0] * distances[0] + weights[1] * distances[1])
    return np.mean(values)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("distance", ["kl", "l1"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.5])
def test_lec_equals_slow_reference(grid, distance, beta):
    s, fp = leaves(randn(2, 4, *grid, scale=2.0), randn(2, 4, *grid, seed=1, scale=2.0))
    arrays = [x.detach().double().numpy() for x in (s, fp)]
    loss = low_entropy_consistency(s, fp, beta, distance)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow_lec(*arrays, beta, distance), rel=1e-5)
    loss.backward()
    check_gradients(lambda x: slow_lec(x, arrays[1], beta, distance), arrays[0], s.grad)
    check_gradients(lambda x: slow_lec(arrays[0], x, beta, distance), arrays[1], fp.grad)


def test_lec_is_a_generalised_jensen_shannon_divergence():
    s, fp = randn(2, 5, 6, 7, scale=3.0).double(), randn(2, 5, 6, 7, seed=1, scale=3.0).double()
    p, q = s.softmax(1), fp.softmax(1)

    def entropy(x):
        return -torch.special.xlogy(x, x).sum(1)

    weights = [(-entropy(x)).exp() * x.amax(1) for x in (p, q)]
    a, b = (w / (weights[0] + weights[1]) for w in weights)
    expected = entropy(a[:, None] * p + b[:, None] * q) - a * entropy(p) - b * entropy(q)
    assert low_entropy_consistency(s, fp).item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_lec_bounds():
    s = randn(2, 3, 8, 8, scale=4.0)
    for distance in ("kl", "l1"):
        assert abs(low_entropy_consistency(s, s.clone(), distance=distance).item()) < 1e-6
    # Two certain views that disagree: ln 2, and an L1 distance of 1 to the mean.
    certain = torch.full((1, 2, 4, 4), -40.0)
    certain[:, 0] = 40.0
    assert low_entropy_consistency(certain, certain.flip(1)).item() == pytest.approx(
        math.log(2), rel=1e-5
    )
    assert low_entropy_consistency(certain, certain.flip(1), distance="l1").item() == pytest.approx(
        1.0, rel=1e-5
    )
    for seed in range(20):
        value = low_entropy_consistency(
            randn(1, 4, 3, 3, seed=seed, scale=9), randn(1, 4, 3, 3, seed=99, scale=9)
        )
        assert -1e-6 < value.item() < math.log(2) + 1e-6
    torch.testing.assert_close(
        low_entropy_consistency(s, certain.new_zeros(s.shape)),
        low_entropy_consistency(certain.new_zeros(s.shape), s),
    )


def test_lec_follows_the_certain_view():
    certain, vague = (
        torch.tensor([6.0, 0.0, 0.0]).view(1, 3, 1, 1),
        torch.tensor([0.0, 0.2, 0.0]).view(1, 3, 1, 1),
    )
    certain, vague = leaves(certain, vague)
    low_entropy_consistency(certain, vague).backward()
    assert vague.grad.abs().max() > 5 * certain.grad.abs().max()


@pytest.mark.parametrize("change", HALF)
def test_lec_is_finite_in_half_precision(change):
    s, fp = leaves(
        change(randn(2, 4, 4, 3, scale=2.0)), change(randn(2, 4, 4, 3, seed=1, scale=2.0))
    )
    for distance in ("kl", "l1"):
        loss = low_entropy_consistency(s, fp, distance=distance)
        loss.backward()
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert torch.isfinite(s.grad).all() and torch.isfinite(fp.grad).all()


def test_lec_refuses_an_unknown_distance():
    with pytest.raises(ValueError, match="kl, l1"):
        low_entropy_consistency(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), distance="l2")


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("distance", ["kl", "l1"])
def test_lec_with_a_mask_is_the_mean_over_its_voxels(grid, distance):
    s, fp = leaves(randn(2, 4, *grid, scale=2.0), randn(2, 4, *grid, seed=1, scale=2.0))
    mask = torch.rand(2, *grid, generator=seeded(2)) < 0.4
    arrays = [x.detach().double().numpy() for x in (s, fp)]

    def slow(x):
        kept = mask.flatten().tolist()
        pairs = [
            (a, b) for k, (*_, a), (*_, b) in zip(kept, ref.columns(x), ref.columns(arrays[1])) if k
        ]
        return np.mean(
            [slow_lec(a.reshape(1, -1, 1), b.reshape(1, -1, 1), 1.0, distance) for a, b in pairs]
        )

    loss = low_entropy_consistency(s, fp, distance=distance, mask=mask)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow(arrays[0]), rel=1e-5)
    loss.backward()
    check_gradients(slow, arrays[0], s.grad)
    assert not s.grad.movedim(1, -1)[~mask].any() and not fp.grad.movedim(1, -1)[~mask].any()


def test_lec_with_a_full_mask_is_lec_and_every_form_of_mask_is_one():
    s, fp = randn(2, 3, 5, 4, scale=2.0), randn(2, 3, 5, 4, seed=1, scale=2.0)
    full = torch.ones(2, 5, 4, dtype=torch.bool)
    torch.testing.assert_close(
        low_entropy_consistency(s, fp, mask=full), low_entropy_consistency(s, fp)
    )
    mask = torch.rand(2, 5, 4, generator=seeded(2)) < 0.5
    expected = low_entropy_consistency(s, fp, mask=mask)
    for form in (mask[:, None], mask.float(), mask.byte()):
        assert torch.equal(low_entropy_consistency(s, fp, mask=form), expected)
    with pytest.raises(ValueError, match="one channel"):
        low_entropy_consistency(s, fp, mask=mask[:1])


@pytest.mark.parametrize("distance", ["kl", "l1"])
def test_lec_with_an_empty_mask_is_zero_with_a_graph(distance):
    s, fp = leaves(randn(2, 3, 5, 4), randn(2, 3, 5, 4, seed=1))
    loss = low_entropy_consistency(
        s, fp, distance=distance, mask=torch.zeros(2, 5, 4, dtype=torch.bool)
    )
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(s.grad, torch.zeros_like(s)) and torch.equal(fp.grad, torch.zeros_like(fp))


# --- projection head ---


def test_projection_head_has_the_released_names_and_count():
    for dims in (2, 3):
        head = ProjectionHead(16, 256, dims=dims)
        assert sum(p.numel() for p in head.parameters()) == 136960
        state = head.state_dict()
        assert len(state) == 16
        names = {key.rsplit(".", 1)[0] for key in state}
        assert names == {"layers.0", "layers.1", "layers.3", "layers.4", "final_conv"}
        shapes = {
            key: tuple(state[f"{key}.weight"].shape)
            for key in ("layers.0", "layers.3", "final_conv")
        }
        ones = (1,) * dims
        assert shapes == {
            "layers.0": (256, 16, *ones),
            "layers.3": (256, 256, *ones),
            "final_conv": (256, 256, *ones),
        }


def slow_head(head, rows, training):
    """(N, C) float64 -> (N, channels): matrix products, batch norm written out."""
    state = {key: value.double().numpy() for key, value in head.state_dict().items()}

    def linear(x, name):
        weight = state[f"{name}.weight"]
        return x @ weight.reshape(weight.shape[:2]).T + state[f"{name}.bias"]

    for k in (0, 3):
        rows = linear(rows, f"layers.{k}")
        norm = f"layers.{k + 1}"
        mean, var = (
            (rows.mean(0), rows.var(0))
            if training
            else (state[f"{norm}.running_mean"], state[f"{norm}.running_var"])
        )
        rows = (rows - mean) / np.sqrt(var + 1e-5) * state[f"{norm}.weight"] + state[f"{norm}.bias"]
        rows = np.maximum(rows, 0)
    return np.stack([unit(row) for row in linear(rows, "final_conv")])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("training", [False, True])
def test_projection_head_equals_slow_reference_on_maps_and_rows(grid, training):
    torch.manual_seed(0)
    head = ProjectionHead(6, 10, dims=len(grid))
    for module in head.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.weight, 0.5, 2.0)
    head.train(training)
    feature = randn(2, 6, *grid)
    rows = feature.movedim(1, -1).reshape(-1, 6)
    expected = slow_head(head, rows.double().numpy(), training)
    state = {key: value.clone() for key, value in head.state_dict().items()}
    with torch.no_grad():
        from_rows = head(rows)
        head.load_state_dict(state)
        from_map = head(feature).movedim(1, -1).reshape(-1, 10)
    np.testing.assert_allclose(from_rows.numpy(), expected, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(from_map, from_rows, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(from_rows.norm(dim=1), torch.ones(len(rows)))


def test_projection_head_does_not_permute_axes():
    # A pointwise module commutes with any permutation of the spatial axes.
    head = ProjectionHead(4, 8).eval()
    feature = randn(1, 4, 5, 4, 3)
    torch.testing.assert_close(
        head(feature).permute(0, 1, 3, 4, 2), head(feature.permute(0, 1, 3, 4, 2))
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_projection_head_takes_statistics_over_the_rows_that_count(processes, monkeypatch):
    """In value, gradients and running statistics; over those of all processes, here two with the
    same rows.
    """
    torch.manual_seed(0)
    whole, partial = ProjectionHead(6, 10, dims=2), ProjectionHead(6, 10, dims=2)
    partial.load_state_dict(whole.state_dict())
    if processes == 2:
        partial = nn.SyncBatchNorm.convert_sync_batchnorm(partial)
        monkeypatch.setattr(
            "torch.distributed.nn.functional.all_reduce", lambda sums, group: 2 * sums
        )
    rows, counted = randn(30, 6), torch.rand(30, generator=seeded(1)) < 0.4
    weight = randn(30, 10, seed=2)
    found, *copies = leaves(*[rows] * (1 + processes))
    out = whole(torch.cat([own[counted] for own in copies]))
    (out * weight[counted].repeat(processes, 1)).sum().backward()
    seen = partial(found, counted)[counted]
    (seen * weight[counted]).sum().backward()
    torch.testing.assert_close(seen, out[: len(seen)])
    torch.testing.assert_close(list(partial.buffers()), list(whole.buffers()))
    torch.testing.assert_close(found.grad, copies[0].grad, rtol=1e-4, atol=1e-6)
    assert found.grad[counted].any() and not found.grad[~counted].any()
    for one, two in zip(partial.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(processes * one.grad, two.grad, rtol=1e-4, atol=1e-5)


# --- class semantic distillation ---


class Unit(nn.Module):
    """A projection without parameters: rows to unit length."""

    def forward(self, rows, counted=None):
        return F.normalize(rows, dim=1)


@pytest.fixture(params=["cpu", "elsewhere"])
def place(request, monkeypatch):
    """CSD as on the CPU, and as on a device that must not be asked how many voxels are of a
    class.
    """
    if request.param != "cpu":
        monkeypatch.setattr(crkd, "readable", lambda values: False)
    return request.param


def csd_case(grid=(6, 5), classes=3, channels=4, batch=2, seed=0):
    """Unit features of the three streams (leaves), then pred_l, label_l, pred_u, conf_u."""
    features = leaves(
        *(F.normalize(randn(batch, channels, *grid, seed=seed + k), dim=1) for k in range(3))
    )
    rng = seeded(seed + 7)
    maps = [torch.randint(0, classes, (batch, *grid), generator=rng) for _ in range(3)]
    conf = torch.rand(batch, *grid, generator=rng)
    return features, (*maps, conf)


def slow_csd(arrays, maps, classes, samples, tau, threshold, use_tp, normalise_mean):
    """Both streams share all rows, and every class has fewer rows than its share, so nothing is
    drawn at random.
    """
    pred_l, label_l, pred_u, conf = (m.numpy().reshape(m.shape[0], -1) for m in maps)
    threshold = conf.mean() if threshold is None else threshold
    anchors, contrast = [], []
    for k in range(classes):
        share = samples // classes + (samples % classes if k == classes - 1 else 0)
        for stream, array in enumerate(arrays):
            rows = []
            for b, v, vector in ref.columns(array):
                if stream == 0:
                    taken = pred_l[b, v] == k and (not use_tp or label_l[b, v] == k)
                else:
                    taken = pred_u[b, v] == k and conf[b, v] >= threshold
                if taken:
                    rows.append(vector)
            if rows:
                assert len(rows) < share
                mean = sum(rows) / len(rows)
                vectors = [rows[i % len(rows)] for i in range(share)] + [
                    unit(mean) if normalise_mean else mean
                ]
                (contrast if stream else anchors).extend((k, vector) for vector in vectors)
    total = 0.0
    for a, anchor in anchors:
        similarities = [float(anchor @ vector) / tau for _, vector in contrast]
        log_sum = max(similarities) + np.log(
            sum(np.exp(np.array(similarities) - max(similarities)))
        )
        positives = [s - log_sum for (k, _), s in zip(contrast, similarities) if k == a]
        total -= sum(positives) / len(positives) if positives else 0.0
    return total / len(anchors)


@pytest.mark.parametrize("grid", [(4, 3), (3, 2, 2)])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(
    "arguments, normalise",
    [
        ({"tau": 0.5, "use_tp": True}, True),
        ({"tau": 1.0, "use_tp": False, "preset": "as_released"}, False),
        ({"tau": 0.2, "use_tp": False, "threshold": 0.6, "normalise_mean": False}, False),
    ],
)
def test_csd_equals_slow_reference(grid, missing, arguments, normalise, place):
    features, (pred_l, label_l, pred_u, conf) = csd_case(grid)
    label_l = torch.where(label_l == 0, label_l, pred_l)
    if missing:
        pred_u = pred_u.clamp(max=1)  # class 2 has anchors without positives
    maps = (pred_l, label_l, pred_u, conf)
    arrays = [f.detach().double().numpy() for f in features]
    numbers = {"samples": 77, "tau": arguments["tau"], "use_tp": arguments["use_tp"]}

    def slow(values):
        return slow_csd(
            values,
            maps,
            3,
            threshold=arguments.get("threshold"),
            normalise_mean=normalise,
            **numbers,
        )

    loss = class_semantic_distillation(
        *features, *maps, 3, samples=77, split_streams=False, **arguments
    )
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow(arrays), rel=1e-5)
    loss.backward()
    for stream, feature in enumerate(features):
        others = list(arrays)

        def one(x, stream=stream, others=others):
            others[stream] = x
            return slow(others)

        check_gradients(one, arrays[stream], feature.grad, entries=3)


def test_csd_with_a_head_equals_projecting_the_maps_first(place):
    # Exact where no row is left out and the projection looks at one row at a time.
    torch.manual_seed(0)
    head = ProjectionHead(4, 8, dims=2).eval()
    features, maps = csd_case((4, 3))
    arguments = {"samples": 90, "split_streams": False}
    sampled = class_semantic_distillation(*features, *maps, 3, head=head, **arguments)
    dense = class_semantic_distillation(*(head(f) for f in features), *maps, 3, **arguments)
    torch.testing.assert_close(sampled, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_csd_of_perfect_clusters(tau, place):
    # One direction per class, classes orthogonal: whatever is drawn, 130 of 520 contrast rows are
    # alike.
    classes = torch.arange(4).repeat_interleave(64 * 8).view(2, 32, 32)
    features = F.one_hot(classes, 16).movedim(-1, 1).float()
    conf = torch.ones(2, 32, 32)
    expected = math.log(130 * math.exp(1 / tau) + 390) - 1 / tau
    for head in (None, Unit()):
        value = class_semantic_distillation(*[features] * 3, *[classes] * 3, conf, 4, head, tau=tau)
        assert value.item() == pytest.approx(expected, rel=1e-5)


def test_csd_of_random_features_is_the_logarithm_of_the_contrast_size(place):
    features, maps = csd_case((64, 64), classes=4, channels=256)
    value = class_semantic_distillation(
        *features, *maps, 4, tau=1.0, use_tp=False, head=Unit(), generator=seeded()
    )
    assert value.item() == pytest.approx(math.log(520), abs=0.05)


def used(feature):
    return feature.grad.abs().amax(1) > 0


def test_csd_samples_few_rows_of_reliable_voxels_and_splits_the_streams(place):
    features, (pred_l, label_l, pred_u, conf) = csd_case((16, 16))
    loss = class_semantic_distillation(
        *features, pred_l, label_l, pred_u, conf, 3, head=Unit(), samples=32, generator=seeded()
    )
    loss.backward()
    anchors, s, fp = (used(f) for f in features)
    assert 0 < anchors.sum() <= 32 and 0 < s.sum() <= 32 and 0 < fp.sum() <= 32
    assert not (anchors & (pred_l != label_l)).any()
    assert not ((s | fp) & (conf < conf.mean())).any()
    assert not (s & fp).any()
    for k, share in enumerate((10, 10, 12)):
        assert (anchors & (pred_l == k)).sum() <= share
        assert (s & (pred_u == k)).sum() <= share

    # All rows wanted: the two halves are complementary, and the first takes the smaller one.
    for f in features:
        f.grad = None
    loss = class_semantic_distillation(
        *features, pred_l, label_l, pred_u, conf, 3, samples=3000, generator=seeded()
    )
    loss.backward()
    anchors, s, fp = (used(f) for f in features)
    reliable = conf >= conf.mean()
    assert torch.equal(anchors, pred_l == label_l)
    assert not (s & fp).any() and torch.equal(s | fp, reliable)
    for k in range(3):
        assert (s & (pred_u == k)).sum() == (reliable & (pred_u == k)).sum() // 2


def test_csd_without_tp_and_with_shared_streams_uses_all_rows(place):
    features, (pred_l, label_l, pred_u, conf) = csd_case((8, 8))
    class_semantic_distillation(
        *features,
        pred_l,
        label_l,
        pred_u,
        conf,
        3,
        samples=3000,
        threshold=0.5,
        use_tp=False,
        split_streams=False,
    ).backward()
    anchors, s, fp = (used(f) for f in features)
    assert anchors.all() and torch.equal(s, conf >= 0.5) and torch.equal(fp, conf >= 0.5)


def test_csd_is_a_function_of_the_generator(place):
    features, maps = csd_case((16, 16))

    def value(seed):
        return class_semantic_distillation(
            *features, *maps, 3, samples=32, generator=seeded(seed)
        ).item()

    state = torch.random.get_rng_state()
    assert value(0) == value(0) != value(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    first = class_semantic_distillation(*features, *maps, 3, samples=32)
    torch.manual_seed(5)
    assert torch.equal(class_semantic_distillation(*features, *maps, 3, samples=32), first)


@pytest.mark.parametrize("side", ["anchors", "contrast", "both"])
def test_csd_of_an_empty_side_is_zero_with_a_graph(side, place):
    features, (pred_l, label_l, pred_u, conf) = csd_case()
    head = ProjectionHead(4, 8, dims=2)
    if side != "contrast":
        label_l = (pred_l + 1) % 3
    loss = class_semantic_distillation(
        *features,
        pred_l,
        label_l,
        pred_u,
        conf,
        3,
        head=head,
        threshold=0.5 if side == "anchors" else 2.0,
    )
    assert loss.item() == 0.0
    loss.backward()
    assert all(t.grad is not None and not t.grad.any() for t in (*features, *head.parameters()))


def test_csd_with_single_voxels(place):
    # A class with one reliable voxel: the first stream has no row of it, and nothing breaks, batch
    # norm included.
    features, (pred_l, label_l, pred_u, conf) = csd_case()
    pred_u, conf = torch.zeros_like(pred_u), torch.zeros_like(conf)
    conf[0, 0, 0] = 1.0
    head = ProjectionHead(4, 8, dims=2)
    loss = class_semantic_distillation(
        *features, pred_l, label_l, pred_u, conf, 3, head=head, threshold=0.5
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert (features[1].grad is None) == (place == "cpu") and used(features[2]).sum() == 1
    assert place == "cpu" or not used(features[1]).any()


@pytest.mark.parametrize("grid, factor", [((4, 3), 2), ((3, 2, 2), 2)])
def test_csd_brings_maps_to_the_feature_grid(grid, factor, place):
    features, maps = csd_case(grid)
    fine = [m for m in maps]
    for axis in range(1, 1 + len(grid)):
        fine = [m.repeat_interleave(factor, dim=axis) for m in fine]
    # Confidence 0 or 1 in blocks: any interpolation of a constant is that constant.
    conf, fine_conf = torch.ones(2, *grid), torch.ones(2, *(factor * side for side in grid))
    arguments = {"samples": 60, "split_streams": False}
    coarse = class_semantic_distillation(*features, *maps[:3], conf, 3, **arguments)
    for ids in (fine[:3], [m[:, None] for m in fine[:3]]):
        resized = class_semantic_distillation(*features, *ids, fine_conf, 3, **arguments)
        torch.testing.assert_close(resized, coarse)
    assert torch.isfinite(class_semantic_distillation(*features, *fine, 3, **arguments))


def test_csd_trains_the_head_and_survives_half_precision(place):
    for dtype in (torch.float16, torch.bfloat16):
        features, maps = csd_case((8, 8))
        features = leaves(*(f.to(dtype) for f in features))
        head = ProjectionHead(4, 8, dims=2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = class_semantic_distillation(*features, *maps, 3, head=head, samples=32)
        loss.backward()
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
        for tensor in (*features, *head.parameters()):
            assert torch.isfinite(tensor.grad).all()
        assert head.final_conv.weight.grad.any() and all(f.grad.any() for f in features)


def test_csd_pulls_classes_together():
    torch.manual_seed(0)
    features, (pred_l, _, pred_u, conf) = csd_case((8, 8), channels=8)
    optimiser = torch.optim.SGD(features, lr=20.0)
    values = []
    for step in range(30):
        rows = [F.normalize(f, dim=1) for f in features]
        loss = class_semantic_distillation(
            *rows, pred_l, pred_l, pred_u, torch.ones_like(conf), 3, generator=seeded(step)
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        values.append(loss.item())
    assert values[-1] < values[0] - 1.0


def plain_csd(features, pred_l, label_l, pred_u, conf_u, classes, samples, tau, split, generator):
    """The definition with whole lists of rows at hand: which voxels are drawn from a generator is
    part of a result.
    """
    rows = [f.flatten(2).movedim(1, 2).flatten(0, 1) for f in features]
    pred_l, label_l, pred_u, conf_u = (v.flatten() for v in (pred_l, label_l, pred_u, conf_u))
    groups = []
    for k in range(classes):
        wanted = samples // classes + (samples % classes if k == classes - 1 else 0)
        anchors = ((pred_l == k) & (label_l == k)).nonzero()[:, 0]
        contrast = ((pred_u == k) & (conf_u >= conf_u.mean())).nonzero()[:, 0]
        first = second = contrast
        if split:
            order = contrast[torch.randperm(len(contrast), generator=generator)]
            first, second = order[: len(order) // 2], order[len(order) // 2 :]
        groups += [
            (stream, k, index, wanted)
            for stream, index in enumerate((anchors, first, second))
            if len(index)
        ]
    sides = {True: ([], []), False: ([], [])}
    for stream, k, index, wanted in sorted(groups, key=lambda group: group[0]):
        drawn = (
            index
            if len(index) < wanted
            else index[torch.randint(len(index), (wanted,), generator=generator)]
        )
        picked = rows[stream][drawn].repeat(-(-wanted // len(drawn)), 1)[:wanted]
        mean = rows[stream][index].mean(0, keepdim=True)
        vectors, ids = sides[stream == 0]
        vectors += [picked, mean / mean.norm()]
        ids += [k] * (wanted + 1)
    (anchors, ids), (contrast, others) = (
        (torch.cat(v), torch.tensor(i)) for v, i in (sides[True], sides[False])
    )
    log_p = (anchors @ contrast.T / tau).log_softmax(1)
    positive = ids[:, None] == others
    return -((log_p * positive).sum(1) / positive.sum(1).clamp(min=1)).mean()


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("grid", [(16, 12), (8, 6, 5)])
def test_csd_draws_the_rows_of_its_definition(grid, split):
    features = [F.normalize(randn(2, 4, *grid, seed=i), dim=1) for i in range(3)]
    # Class 2 has few voxels, so it is repeated; class 3 has none.
    maps = [
        torch.where(
            torch.rand(2, *grid, generator=seeded(i)) < 0.04, 2, randn(2, *grid, seed=i) > 0
        )
        for i in (4, 5, 6)
    ]
    conf = torch.rand(2, *grid, generator=seeded(7))
    for seed in range(3):
        found = class_semantic_distillation(
            *features, *maps, conf, 4, samples=42, split_streams=split, generator=seeded(seed)
        )
        expected = plain_csd(features, *maps, conf, 4, 42, 0.1, split, seeded(seed))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(
    "grid, arguments",
    [
        ((16, 12), {"samples": 42}),
        ((16, 12), {"samples": 42, "use_tp": False, "threshold": 0.7, "preset": "as_released"}),
        ((8, 6, 5), {"samples": 30, "tau": 0.5, "normalise_mean": False}),
        ((8, 6, 5), {"samples": 800}),
    ],
)
def test_csd_of_fixed_shape_is_csd_of_the_same_draws(
    grid, arguments, split, projected, monkeypatch
):
    """The form for GPUs, with draws that depend on their place alone: value, gradients and running
    statistics.
    """
    maps = [
        torch.where(
            torch.rand(2, *grid, generator=seeded(i)) < 0.04, 2, randn(2, *grid, seed=i) > 0
        )
        for i in (4, 5, 6)
    ]
    conf = torch.rand(2, *grid, generator=seeded(7))

    def uniform(count):
        return (torch.arange(1, count + 1, dtype=torch.float64) * 0.618) % 1

    def rand(shape, generator, device, dtype=torch.float32):
        if len(shape) == 3:
            return uniform(shape[-1]).expand(shape)
        return torch.linspace(0.9, 0.1, shape[-1]).expand(shape)

    monkeypatch.setattr(
        crkd, "_integers", lambda high, count, generator: (uniform(count) * high).long()
    )
    monkeypatch.setattr(crkd, "_permutation", lambda count, generator: torch.arange(count).flip(0))
    monkeypatch.setattr(crkd, "_rand", rand)
    found = []
    for host in (True, False):
        monkeypatch.setattr(crkd, "readable", lambda values, host=host: host)
        features = leaves(*(randn(2, 4, *grid, seed=i) for i in range(3)))
        torch.manual_seed(0)
        head = ProjectionHead(4, 8, dims=len(grid)) if projected else nn.Identity()
        loss = class_semantic_distillation(
            *features,
            *maps,
            conf,
            4,
            head=head if projected else None,
            split_streams=split,
            **arguments,
        )
        loss.backward()
        tensors = [
            loss,
            *(f.grad for f in features),
            *(p.grad for p in head.parameters()),
            *head.buffers(),
        ]
        found.append(tensors)
    assert found[0][0] > 0
    torch.testing.assert_close(found[1], found[0], rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("side", ["anchors", "contrast"])
def test_csd_of_an_empty_side_leaves_running_statistics_alone(side, place):
    features, (pred_l, label_l, pred_u, conf) = csd_case()
    head = ProjectionHead(4, 8, dims=2)
    before = [buffer.clone() for buffer in head.buffers()]
    if side == "anchors":
        label_l = (pred_l + 1) % 3
    class_semantic_distillation(
        *features,
        pred_l,
        label_l,
        pred_u,
        conf,
        3,
        head=head,
        threshold=0.5 if side == "anchors" else 2.0,
    )
    assert all(torch.equal(*pair) for pair in zip(before, head.buffers(), strict=True))


def test_members_come_first_in_order_or_in_any_order_equally_often():
    masks = torch.tensor([[False, True, False, True, True], [False] * 5, [True] * 5])
    ordered = _members_first(masks, False, None)
    assert ordered[0, :3].tolist() == [1, 3, 4] and ordered[2].tolist() == list(range(5))
    assert all(sorted(row) == list(range(5)) for row in ordered.tolist())
    rng, seen = seeded(), {}
    for _ in range(1200):
        shuffled = _members_first(masks, True, rng)
        assert sorted(shuffled[2].tolist()) == list(range(5))
        order = tuple(shuffled[0, :3].tolist())
        seen[order] = seen.get(order, 0) + 1
    assert seen.keys() == set(itertools.permutations((1, 3, 4)))
    assert all(abs(count - 200) < 65 for count in seen.values())  # five standard deviations


def test_indices_of_hard_masks():
    masks = [
        torch.zeros(60),
        torch.ones(60),
        torch.arange(60) == 0,
        torch.arange(60) == 59,
        randn(60) > 1,
    ]
    masks = [mask.bool() for mask in masks]
    for mask, found in zip(masks, _indices(masks)):
        assert found.dtype == torch.int64 and torch.equal(found, mask.nonzero()[:, 0])


def test_csd_refuses_bad_arguments():
    features, maps = csd_case()
    for bad in ({"preset": "fixed"}, {"tau": 0.0}, {"samples": 2}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            class_semantic_distillation(*features, *maps, 3, **bad)


# --- cross distillation ---


def test_comparison_mask_of_the_paper_figure():
    ce_s, ce_fp = torch.tensor([0.2, 0.5, 0.1, 0.3, 0.4]), torch.tensor([0.1, 0.8, 0.3, 0.4, 0.4])
    assert comparison_mask(ce_s, ce_fp).tolist() == [False, True, True, True, False]


def ckd_case(grid, feature_grid=None, seed=0):
    shape = feature_grid or grid
    tensors = leaves(
        randn(2, 3, *grid, seed=seed, scale=2.0),
        randn(2, 3, *grid, seed=seed + 1, scale=2.0),
        randn(2, 5, *shape, seed=seed + 2),
        randn(2, 5, *shape, seed=seed + 3),
    )
    rng = seeded(seed + 4)
    return tensors, [torch.rand(2, *grid, generator=rng) < p for p in (0.5, 0.7)]


def slow_ckd(arrays, constants, masks, temperature, feature_tau):
    """`constants`: the arrays that a teaching view is read from, so that differences see the
    detached side as fixed.
    """
    s_better, valid = (m.numpy().astype(float)[:, None] for m in masks)
    terms = {}
    for name, mask, student, teacher in (
        ("s_to_fp", s_better, 1, 0),
        ("fp_to_s", 1 - s_better, 0, 1),
    ):
        mask = mask * valid
        values, weights = [], mask.reshape(len(mask), -1)
        for (b, v, x), (_, _, t) in zip(
            ref.columns(arrays[student]), ref.columns(constants[teacher])
        ):
            q, p = ref.softmax(t / temperature), ref.softmax(x / temperature)
            values.append(weights[b, v] * temperature**2 * ref.kl(q, p) / len(q))
        terms[f"pixel_{name}"] = sum(values) / max(weights.sum(), 1)
        weights = ref.nearest(mask, arrays[2].shape[2:]).reshape(len(mask), -1)
        values = []
        for (b, v, x), (_, _, t) in zip(
            ref.columns(arrays[2 + student]), ref.columns(constants[2 + teacher])
        ):
            values.append(weights[b, v] * (1 - unit(x) @ unit(t) / feature_tau))
        terms[f"feature_{name}"] = sum(values) / max(weights.sum(), 1)
    return terms


@pytest.mark.parametrize(
    "grid, feature_grid", [((6, 4), None), ((6, 4), (3, 2)), ((4, 2, 2), (2, 1, 2))]
)
@pytest.mark.parametrize(
    "preset, temperature", [("clean", 1.0), ("clean", 3.0), ("as_released", 1.0)]
)
def test_ckd_equals_slow_reference(grid, feature_grid, preset, temperature):
    tensors, masks = ckd_case(grid, feature_grid)
    arrays = [t.detach().double().numpy() for t in tensors]
    tau = 1.0 if preset == "clean" else 0.07
    terms = cross_distillation(*tensors, *masks, temperature=temperature, preset=preset)
    expected = slow_ckd(arrays, arrays, masks, temperature, tau)
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        assert term.shape == () and term.dtype == torch.float32
        assert term.item() == pytest.approx(expected[name], rel=2e-5, abs=1e-6), name
    sum(terms.values()).backward()
    fixed = [a.copy() for a in arrays]
    if preset == "as_released":
        fixed[2:] = arrays[2:]
    for index, tensor in enumerate(tensors):
        others = list(arrays)

        def slow(x, index=index, others=others):
            others[index] = x
            constants = [others[i] if fixed[i] is arrays[i] else fixed[i] for i in range(4)]
            return sum(slow_ckd(others, constants, masks, temperature, tau).values())

        check_gradients(slow, arrays[index], tensor.grad, entries=4)


def test_ckd_teaches_in_one_direction_where_clean():
    for preset in ("clean", "as_released"):
        for name, teacher, student in (("s_to_fp", 0, 1), ("fp_to_s", 1, 0)):
            for kind, offset in (("pixel", 0), ("feature", 2)):
                tensors, masks = ckd_case((6, 4))
                cross_distillation(*tensors, *masks, preset=preset)[f"{kind}_{name}"].backward()
                touched = [t.grad is not None and bool(t.grad.any()) for t in tensors]
                both = kind == "feature" and preset == "as_released"
                expected = [False] * 4
                expected[offset + student], expected[offset + teacher] = True, both
                assert touched == expected, (preset, kind, name)


def test_ckd_known_values():
    (s, fp, features, _), masks = ckd_case((6, 4))
    same = cross_distillation(s, s, features, features, *masks)
    assert all(abs(value.item()) < 1e-6 for value in same.values())
    opposite = cross_distillation(s, fp, features, -features, *masks)
    assert opposite["feature_s_to_fp"].item() == pytest.approx(2.0)
    released = cross_distillation(s, fp, features, features, *masks, preset="as_released")
    assert released["feature_s_to_fp"].item() == pytest.approx(1 - 1 / 0.07, rel=1e-5)


def test_ckd_accepts_any_form_of_mask_and_empty_ones():
    tensors, (better, valid) = ckd_case((4, 2, 2))
    expected = cross_distillation(*tensors, better, valid)
    for forms in (
        (better.float(), valid.float()),
        (better[:, None], valid[:, None].to(torch.uint8)),
    ):
        assert all(
            torch.equal(v, expected[k]) for k, v in cross_distillation(*tensors, *forms).items()
        )
    for preset in ("clean", "as_released"):
        terms = cross_distillation(*tensors, better, torch.zeros_like(valid), preset=preset)
        assert all(value.item() == 0.0 for value in terms.values())
        for value in terms.values():
            for tensor in tensors:
                tensor.grad = None
            value.backward(retain_graph=True)
            assert all(t.grad is None or not t.grad.any() for t in tensors)
    one_sided = cross_distillation(*tensors, torch.ones_like(better), valid)
    assert one_sided["pixel_fp_to_s"].item() == one_sided["feature_fp_to_s"].item() == 0.0
    assert one_sided["pixel_s_to_fp"].item() > 0


@pytest.mark.parametrize("change", HALF)
@pytest.mark.parametrize("preset", ["clean", "as_released"])
def test_ckd_is_finite_in_half_precision(change, preset):
    tensors, masks = ckd_case((6, 4))
    tensors = leaves(*(change(t) for t in tensors))
    terms = cross_distillation(*tensors, *masks, preset=preset)
    sum(terms.values()).backward()
    assert all(t.dtype == torch.float32 and torch.isfinite(t) for t in terms.values())
    assert all(torch.isfinite(t.grad).all() for t in tensors)


def plain_cosine(a, b, a_learns, b_learns):
    """Two products, each with the gradient to one vector, chosen voxel by voxel."""
    unit_a, unit_b = unit_vectors(a, dim=1), unit_vectors(b, dim=1)
    to_a, to_b, to_both = (unit_a * unit_b.detach()), (unit_a.detach() * unit_b), unit_a * unit_b
    a_learns, b_learns = a_learns[:, None], b_learns[:, None]
    products = torch.where(a_learns & b_learns, to_both, torch.where(a_learns, to_a, to_b))
    return products.where(a_learns | b_learns, to_both.detach()).sum(1)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("masks", ["disjoint", "equal", "all", "none", "one voxel"])
def test_mutual_cosine_equals_the_product_of_unit_vectors(grid, memory, masks):
    vectors = [randn(3, 6, *grid, seed=i).double() for i in (1, 2)]
    for index, vector in enumerate(vectors):
        vector[index, :, 0] = 0.0  # without a direction, at the border
        vector[2, :, 1] *= 1e-9  # below the smallest norm that counts
        vector[0, :, 2] *= 1e4
    vectors[0][2, :, 3] = -vectors[1][2, :, 3]
    if memory == "channels_last":
        form = torch.channels_last if len(grid) == 2 else torch.channels_last_3d
        vectors = [vector.to(memory_format=form) for vector in vectors]
    chosen = torch.rand(3, *grid, generator=seeded(3)) < 0.5
    full = torch.ones_like(chosen)
    single = torch.zeros_like(chosen)
    single[(2, *[-1] * len(grid))] = True
    learns = {
        "disjoint": (chosen, ~chosen),
        "equal": (chosen, chosen),
        "all": (full, full),
        "none": (~full, ~full),
        "one voxel": (single, ~full),
    }[masks]
    upstream = randn(3, *grid, seed=4).double()
    results = []
    for cosine in (_MutualCosine.apply, plain_cosine):
        a, b = (vector.clone().requires_grad_() for vector in vectors)
        values = cosine(a, b, *learns)
        (values * upstream).sum().backward()
        results.append((values.detach(), a.grad, b.grad))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_mutual_cosine_leaves_out_what_needs_no_gradient():
    a, b = randn(2, 3, 4, 5).requires_grad_(), randn(2, 3, 4, 5, seed=1)
    learns = torch.ones(2, 4, 5, dtype=torch.bool)
    _MutualCosine.apply(a, b, learns, learns).sum().backward()
    assert a.grad.any() and b.grad is None


def test_ckd_refuses_bad_arguments():
    tensors, masks = ckd_case((4, 3))
    for bad in ({"preset": "fixed"}, {"temperature": 0.0}, {"feature_tau": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            cross_distillation(*tensors, *masks, **bad)
    with pytest.raises(ValueError, match="one channel"):
        cross_distillation(*tensors, masks[0][:1], masks[1])


# --- symmetric CutMix ---


def mix_case(batch, grid, seed=0):
    weak, strong = torch.rand(2, batch, 1, *grid, generator=seeded(seed))
    pred = torch.randint(0, 4, (batch, *grid), generator=seeded(seed + 1))
    return weak, strong, pred, torch.rand(batch, *grid, generator=seeded(seed + 2))


@pytest.mark.parametrize("grid", [(16, 12), (8, 8, 6)])
@pytest.mark.parametrize("batch", [1, 2, 3, 6])
def test_cutmix_exchanges_one_box_in_each_pair(grid, batch):
    originals = mix_case(batch, grid)
    copies = [t.clone() for t in originals]
    mixed = symmetric_cutmix(*originals, prob=1.0, generator=seeded(4))
    partner, mask = draw_exchange(batch, grid, 1.0, seeded(4))
    assert torch.equal(partner[partner], torch.arange(batch))
    assert (partner == torch.arange(batch)).sum() == batch % 2
    for before, copy, after in zip(originals, copies, mixed):
        assert torch.equal(before, copy)  # the inputs are left alone
        assert after.dtype == before.dtype and after.shape == before.shape
        for b in range(batch):
            inside = mask[b].expand_as(before[b])
            assert torch.equal(after[b][inside], before[partner[b]][inside])
            assert torch.equal(after[b][~inside], before[b][~inside])
    for b in range(batch):
        assert torch.equal(mask[b], mask[partner[b]])
        assert mask[b].any() == (partner[b] != b)
        where = mask[b].nonzero()
        if len(where):  # a full box
            extent = where.amax(0) - where.amin(0) + 1
            assert extent.prod() == len(where)


def test_cutmix_keeps_the_classes_exact_and_takes_a_channel_axis():
    weak, strong, pred, conf = mix_case(4, (12, 10))
    large = pred + 2**60  # beyond what floats can hold
    _, _, mixed, mixed_conf = symmetric_cutmix(weak, strong, large, conf, 1.0, seeded())
    assert set(mixed.unique().tolist()) <= set(large.unique().tolist())
    _, _, with_axis, conf_axis = symmetric_cutmix(
        weak, strong, large[:, None], conf[:, None], 1.0, seeded()
    )
    assert torch.equal(with_axis[:, 0], mixed) and torch.equal(conf_axis[:, 0], mixed_conf)


def test_exchange_of_a_given_box():
    values = torch.arange(3.0).view(3, 1, 1).expand(3, 4, 5)
    mask = torch.zeros(3, 4, 5, dtype=torch.bool)
    mask[0, 1:3, 2:] = mask[2, 1:3, 2:] = True
    mixed = exchange(values, torch.tensor([2, 1, 0]), mask)
    assert mixed[0].tolist() == [[0] * 5, [0, 0, 2, 2, 2], [0, 0, 2, 2, 2], [0] * 5]
    assert (mixed[1] == 1).all()
    assert torch.equal(mixed[0] + mixed[2], torch.full((4, 5), 2.0))


def test_cutmix_probability():
    originals = mix_case(4, (8, 8))
    assert all(torch.equal(a, b) for a, b in zip(symmetric_cutmix(*originals, prob=0.0), originals))
    rng = seeded()
    mixed_pairs = sum(
        int(draw_exchange(4, (8, 8), 0.3, rng)[1].flatten(1).any(1).sum()) // 2 for _ in range(1000)
    )
    assert mixed_pairs / 2000 == pytest.approx(0.3, abs=0.04)


def test_cutmix_is_a_function_of_the_generator():
    originals = mix_case(4, (8, 8, 6))
    state = torch.random.get_rng_state()
    first, again, other = (
        symmetric_cutmix(*originals, prob=1.0, generator=seeded(s)) for s in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("shape", [(256, 256), (320, 320), (112, 112, 80), (40, 56, 48)])
def test_box_statistics(shape):
    rng = seeded()
    fractions, touched, edges = [], [np.zeros(side, int) for side in shape], set()
    for _ in range(1500):
        box = draw_box(shape, rng)
        fractions.append(math.prod(b.stop - b.start for b in box) / math.prod(shape))
        for axis, (side, b) in enumerate(zip(shape, box)):
            assert 0 <= b.start < b.stop <= side
            touched[axis][b] += 1
            edges |= {(axis, "first")} if b.start == 0 else set()
            edges |= {(axis, "last")} if b.stop == side else set()
    assert np.mean(fractions) == pytest.approx(0.21, abs=0.015)
    assert 0.01 < min(fractions) < 0.03 and 0.36 < max(fractions) <= 0.4
    assert all(counts.min() > 0 for counts in touched)
    assert edges == set(itertools.product(range(len(shape)), ("first", "last")))


def test_box_proportions():
    ratios = []
    rng = seeded()
    for _ in range(300):
        rows, columns = draw_box((1000, 1000), rng, fraction=(0.01, 0.01))
        ratios.append((rows.stop - rows.start) / (columns.stop - columns.start))
    assert 0.29 < min(ratios) < 0.4 and 3.0 < max(ratios) < 3.45
    # Uniform over the ratio, so few boxes are wider than high.
    assert np.mean(np.array(ratios) < 1) == pytest.approx((1 - 0.3) / (1 / 0.3 - 0.3), abs=0.07)


@pytest.mark.parametrize(
    "shape", [(256, 16), (8, 400), (1, 50), (3, 3), (1, 1), (112, 112, 4), (6, 90, 90), (1, 1, 1)]
)
def test_boxes_of_flat_patches(shape):
    rng = seeded()
    for reject in (False, True):
        for _ in range(200):
            box = draw_box(shape, rng, reject=reject)
            assert all(0 <= b.start < b.stop <= side for side, b in zip(shape, box))
    if shape == (256, 16):  # no admissible ratio fits a large area: the box keeps its area
        fractions = [
            math.prod(b.stop - b.start for b in draw_box(shape, rng)) / 4096 for _ in range(1000)
        ]
        assert np.mean(fractions) == pytest.approx(0.21, abs=0.02)


def expected_box(shape, fraction=(0.02, 0.4), ratio=(0.3, 1 / 0.3)):
    """Mean height, width and area (shares of the image) of boxes whose proportions and first corner
    are drawn again until they lie inside: over a grid of areas and proportions, each weighted by
    how many of the image's pixels can be its first corner.
    """
    height, width = shape
    means = []
    for a in np.linspace(*fraction, 203)[1:-1] * height * width:
        total, sums = 0, np.zeros(3)
        for r in np.linspace(*ratio, 403)[1:-1]:
            h, w = math.floor(math.sqrt(a * r)), math.floor(math.sqrt(a / r))
            corners = max(height - h + 1, 0) * max(width - w + 1, 0)
            total += corners
            sums += corners * np.array([h / height, w / width, h * w / (height * width)])
        means.append(sums / total)
    return np.mean(means, 0)


@pytest.mark.parametrize(
    "shape, known", [((256, 256), (0.531, 0.387, 0.208)), ((96, 160), None), ((64, 64), None)]
)
def test_boxes_of_unimatch_are_drawn_again_until_they_lie_inside(shape, known):
    rng, found = seeded(), []
    for _ in range(4000):
        rows, columns = draw_box(shape, rng, reject=True)
        assert 0 <= rows.start < rows.stop <= shape[0]
        assert 0 <= columns.start < columns.stop <= shape[1]
        h, w = (rows.stop - rows.start) / shape[0], (columns.stop - columns.start) / shape[1]
        # Of a box that lies inside, every place is as likely as another.
        place = rows.start / max(shape[0] - rows.stop + rows.start, 1)
        found.append((h, w, h * w, place))
    expected = expected_box(shape)
    mean, error = np.mean(found, 0), np.std(found, 0) / math.sqrt(len(found))
    assert (np.abs(mean - [*expected, 0.5]) < 4 * error).all()
    if known:
        assert expected == pytest.approx(known, abs=0.001)


def test_only_2d_boxes_of_single_images_are_rejected():
    for shape, reject in (((256, 256), True), ((24, 20, 16), False)):
        found, rng = draw_boxes(6, shape, 0.7, seeded(3)), seeded(3)
        for mask in found:
            expected = torch.zeros(shape, dtype=torch.bool)
            if torch.rand((), dtype=torch.float64, generator=rng) < 0.7:
                expected[draw_box(shape, rng, reject=reject)] = True
            assert torch.equal(mask, expected)


def test_boxes_need_two_or_three_axes():
    with pytest.raises(ValueError, match="2 or 3"):
        draw_box((4, 4, 4, 4))
