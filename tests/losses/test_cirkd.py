import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from losses import cirkd
from losses.cirkd import (
    ALL_PAIRS_NODES,
    CIRKD,
    Memory,
    default_pool,
    own_similarity_kl,
    pair_kl,
    pooled_vectors,
    similarity_kl,
)
from losses.kd import unit_vectors
from tests.losses import reference as ref

TAP = "penultimate"
STUDENT, TEACHER = {TAP: (3, (5, 4, 2))}, {TAP: (4, (5, 4, 2))}
LARGE = {TAP: (4, (10, 8, 4))}
FLAT = {TAP: (3, (5, 6))}, {TAP: (4, (10, 3))}
SMALL = {
    "pixel_contrast": 5,
    "region_contrast": 4,
    "pixel_queue": 12,
    "region_queue": 7,
    "pixels_per_class": 3,
}


def make(student=STUDENT, teacher=TEACHER, num_classes=3, seed=0, **arguments):
    torch.manual_seed(seed)
    return CIRKD(
        ref.channels(student), ref.channels(teacher), num_classes, **{**SMALL, **arguments}
    )


def example(multilabel=False, student=STUDENT, teacher=TEACHER, spatial=(6, 4, 2), **arguments):
    return ref.make_case(
        3, spatial, multilabel, student_taps=student, teacher_taps=teacher, **arguments
    )


class Seeded(torch.nn.Module):
    """The module in eval mode with the same draws at each call, so that two calls can be
    compared.
    """

    def __init__(self, module):
        super().__init__()
        self.module = module.eval()

    def forward(self, *inputs):
        torch.manual_seed(1)
        return self.module(*inputs)


def unit(vector):
    return vector / np.linalg.norm(vector)


def slow_pool(feature, side=2):
    """(B, C, *spatial) -> list of samples, each a list of means, one per window of `side` (partial
    windows kept).
    """
    corners = [range(0, size, side) for size in feature.shape[2:]]
    samples = []
    for sample in feature:
        means = []
        for corner in np.array(np.meshgrid(*corners, indexing="ij")).reshape(len(corners), -1).T:
            window = sample[(slice(None), *(slice(c, c + side) for c in corner))]
            means.append(window.reshape(len(sample), -1).mean(1))
        samples.append(means)
    return samples


def slow_rows(ours, our_columns, theirs, their_columns, temperature):
    total = 0.0
    for s, t in zip(ours, theirs):
        p = ref.softmax(np.array([s @ column for column in our_columns]) / temperature)
        q = ref.softmax(np.array([t @ column for column in their_columns]) / temperature)
        total += ref.kl(q, p)
    return total / len(ours)


def slow_pairs(student_feature, teacher_feature, pairs="all", side=2):
    """L_pair of (B, C, *grid) features on one grid: the mean over the pairs of images."""
    ours = [[unit(v) for v in sample] for sample in slow_pool(student_feature, side)]
    theirs = [[unit(v) for v in sample] for sample in slow_pool(teacher_feature, side)]
    losses = []
    for i in range(len(ours)):
        for j in range(len(ours)):
            if pairs == "all" or (i == j and (pairs == "own" or i == 0)):
                losses.append(slow_rows(ours[i], ours[j], theirs[i], theirs[j], 1.0))
    assert len(losses) == {"all": len(ours) ** 2, "own": len(ours), "first": 1}[pairs]
    return np.mean(losses)


def slow_head(samples, state):
    """The projection head in training mode on lists of vectors."""
    first, last = state["head.reduce.weight"][:, :, 0], state["head.project.weight"][:, :, 0]
    hidden = np.array([first @ vector for sample in samples for vector in sample])
    hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
    out = [unit(last @ np.maximum(row, 0)) for row in hidden]
    n = len(samples[0])
    return [out[i * n : (i + 1) * n] for i in range(len(samples))]


def slow_queue(state, name, row, vectors):
    queue, pointer = state[f"{name}.queue"], state[f"{name}.pointer"]
    for vector_index, vector in enumerate(vectors):
        if pointer[row] + len(vectors) >= queue.shape[1]:
            queue[row, queue.shape[1] - len(vectors) + vector_index] = vector
        else:
            queue[row, int(pointer[row]) + vector_index] = vector
    pointer[row] = (
        0 if pointer[row] + len(vectors) >= queue.shape[1] else pointer[row] + len(vectors)
    )


def slow_cirkd(before, legacy=False, multilabel=False, pairs="all", after=None):
    """The formulas with every random permutation of n replaced by n - 1 .. 0; `after` receives the
    new queues.
    """

    def slow(student, teacher, label):
        state = {name: value.copy() for name, value in before.items()}
        grid = student.features[TAP].shape[2:]
        teacher_feature = ref.nearest(teacher.features[TAP], grid)
        raw = slow_pool(student.features[TAP])
        theirs = [[unit(v) for v in sample] for sample in slow_pool(teacher_feature)]
        batch = range(len(raw))
        terms = {"cirkd_pair": slow_pairs(student.features[TAP], teacher_feature, pairs)}
        kd = []
        for (_, _, s), (_, _, t) in zip(ref.columns(student.logits), ref.columns(teacher.logits)):
            if multilabel and not legacy:
                kd.append(sum(ref.binary_kl(ref.sigmoid(b), ref.sigmoid(a)) for a, b in zip(s, t)))
            else:
                kd.append(ref.kl(ref.softmax(t), ref.softmax(s)))
        if state:
            pooled_grid = tuple(math.ceil(size / 2) for size in grid)
            maps = ref.nearest(label.astype(int), pooled_grid)
            maps = maps.reshape(*maps.shape[:2], -1)
            members = {}  # (sample, queue row) -> voxels
            for b in batch:
                for k in range(3) if multilabel else (1, 2):
                    inside = maps[b, k] == 1 if multilabel else maps[b, 0] == k
                    if inside.any():
                        members[b, k if multilabel or legacy else k - 1] = np.flatnonzero(inside)
            for (b, row), voxels in members.items():
                slow_queue(
                    state, "regions", row, [unit(np.mean([theirs[b][v] for v in voxels], axis=0))]
                )
                chosen = list(range(len(voxels)))[::-1][: SMALL["pixels_per_class"]]
                chosen = chosen if legacy else [voxels[i] for i in chosen]
                slow_queue(state, "pixels", row, [theirs[b][v] for v in chosen])
            if after is not None:
                after.update(state)
            projected = slow_head(raw, before)
            anchors = sorted({(b, v) for (b, _), voxels in members.items() for v in voxels})
            for name, count in (
                ("pixel", SMALL["pixel_contrast"]),
                ("region", SMALL["region_contrast"]),
            ):
                queue = state[f"{name}s.queue"]
                contrast = [
                    row[slot] for row in queue for slot in range(queue.shape[1])[::-1][:count]
                ]
                rows = [projected[b][v] for b, v in anchors], [theirs[b][v] for b, v in anchors]
                terms[f"cirkd_{name}"] = 0.1 * slow_rows(rows[0], contrast, rows[1], contrast, 0.1)
        terms["cirkd_kd"] = np.mean(kd)
        return terms

    return slow


def state_of(module):
    return {
        name: value.double().numpy().copy()
        for name, value in module.state_dict().items()
        if "norm" not in name
    }


SETTINGS = [
    ({}, {}),
    ({"pairs": "own"}, {"pairs": "own"}),
    ({"preset": "as_released"}, {"legacy": True, "pairs": "first"}),
    ({"multilabel": True}, {"multilabel": True}),
    (
        {"multilabel": True, "preset": "as_released"},
        {"legacy": True, "multilabel": True, "pairs": "all"},
    ),
]


@pytest.fixture
def reversed_draws(monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n - 1, -1, -1))


@pytest.mark.parametrize("teacher", [TEACHER, LARGE])
@pytest.mark.parametrize("arguments, meaning", SETTINGS)
def test_equals_slow_reference(arguments, meaning, teacher, reversed_draws):
    module = make(teacher=teacher, chunk=4, **arguments)
    case = example(arguments.get("multilabel", False), teacher=teacher)
    before, after = state_of(module), {}
    # Differences of log-softmax at temperature 0.1 cost float32 about two digits.
    slow = slow_cirkd(before, after=after, **meaning)
    ref.check_values(module, case, slow, rtol=1e-4, entries=3)
    slow(ref.as_arrays(case.student), ref.as_arrays(case.teacher), case.label.numpy())
    for name, value in state_of(module).items():
        np.testing.assert_allclose(value, after[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_2d_equals_slow_reference(reversed_draws):
    student, teacher = FLAT
    module = make(student, teacher)
    case = example(student=student, teacher=teacher, spatial=(6, 5))
    ref.check_values(module, case, slow_cirkd(state_of(module)), rtol=1e-4, entries=3)


@pytest.mark.parametrize("batch", [1, 3])
def test_all_pairs_of_a_batch_equal_slow_loops_over_both_images(batch):
    module = make(pixel_weight=0, region_weight=0, kd_weight=0, chunk=4)

    def slow(student, teacher, label):
        return {"cirkd_pair": slow_pairs(student.features[TAP], teacher.features[TAP])}

    ref.check_values(module, example(batch=batch, seed=4), slow, entries=6)


def test_all_pairs_have_larger_windows_than_the_memory():
    # 40 nodes along an axis: at most 24 in the memory and for own pairs, 16 for all pairs.
    taps = {TAP: (3, (40, 2, 2))}
    case = example(student=taps, teacher=taps, spatial=(6, 2, 2))
    student, teacher = (ref.as_arrays(output).features[TAP] for output in case[:2])
    sides = {"clean": 3, "as_released": 2}
    for preset, side in sides.items():
        for pairs in ("all", "own"):
            module = make(taps, taps, preset=preset, pairs=pairs)
            found = ref.evaluate(module, case)["cirkd_pair"].item()
            expected = slow_pairs(student, teacher, pairs, side if pairs == "all" else 2)
            assert found == pytest.approx(expected, rel=1e-4)
    asked = ref.evaluate(make(taps, taps, pool=5), case)["cirkd_pair"].item()
    assert asked == pytest.approx(slow_pairs(student, teacher, side=5), rel=1e-4)


@pytest.mark.parametrize("arguments, meaning", SETTINGS)
def test_contract(arguments, meaning):
    case = example(arguments.get("multilabel", False), teacher=LARGE)

    def build(**more):
        return Seeded(make(teacher=LARGE, **arguments, **more))

    ref.check_teacher_constant(build(), case)
    ref.check_range(build(), case)
    weights = {"pair": 1.0, "pixel": 0.1, "region": 0.1, "kd": 1.0}
    ref.check_doubling(
        build, case, {f"{key}_weight": (value, f"cirkd_{key}") for key, value in weights.items()}
    )
    ref.check_batch_invariance(build(), case)


def test_zero_at_the_teacher_except_for_the_projected_terms():
    case = ref.same_as_teacher(example(student=TEACHER))
    terms = ref.evaluate(make(TEACHER), case)
    assert abs(terms["cirkd_pair"].item()) < 1e-6 and abs(terms["cirkd_kd"].item()) < 1e-6
    assert terms["cirkd_pixel"].item() > 0


def test_a_weight_of_0_leaves_its_term_out():
    assert set(ref.evaluate(make(pair_weight=0, region_weight=0), example())) == {
        "cirkd_pixel",
        "cirkd_kd",
    }
    without = make(pixel_weight=0, region_weight=0)
    assert without.state_dict() == {}
    assert set(ref.evaluate(without, example())) == {"cirkd_pair", "cirkd_kd"}


@pytest.mark.parametrize("preset", ["clean", "as_released"])
def test_without_anchors_the_memory_terms_are_exactly_0_and_train_nothing(preset):
    case = example()
    module = make(preset=preset)
    before = state_of(module)
    terms = ref.evaluate(module, case._replace(label=torch.zeros_like(case.label)))
    assert terms["cirkd_pixel"].item() == 0.0 and terms["cirkd_region"].item() == 0.0
    (terms["cirkd_pixel"] + terms["cirkd_region"]).backward()
    assert all(
        parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters()
    )
    for name, value in state_of(module).items():
        np.testing.assert_array_equal(value, before[name])


def test_pooling_by_4_twice_the_grid_is_pooling_by_2():
    case = example()

    def enlarge(output):
        double = output.features[TAP].detach()
        for axis in (2, 3, 4):
            double = double.repeat_interleave(2, axis)
        return ref.Output(output.logits, {TAP: double})

    plain = ref.evaluate(Seeded(make()), case)
    large = ref.Case(enlarge(case.student), enlarge(case.teacher), case.label)
    pooled = ref.evaluate(Seeded(make(pool=4)), large)
    torch.testing.assert_close(pooled["cirkd_pair"], plain["cirkd_pair"])
    assert pooled.keys() == plain.keys()


def test_gradient_reaches_the_head():
    module = make()
    sum(ref.evaluate(module, example()).values()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters())


def test_queues_are_saved_and_resuming_is_exact():
    cases = [example(seed=seed) for seed in range(3)]
    module = make()
    ref.evaluate(module, cases[0])
    saved, rng = (
        {name: value.clone() for name, value in module.state_dict().items()},
        torch.get_rng_state(),
    )
    assert {"pixels.queue", "pixels.pointer", "regions.queue", "regions.pointer"} <= saved.keys()
    straight = [ref.evaluate(module, case) for case in cases[1:]]

    resumed = make(seed=5)
    resumed.load_state_dict(saved)
    torch.set_rng_state(rng)
    again = [ref.evaluate(resumed, case) for case in cases[1:]]
    for one, two in zip(straight, again):
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_queues_change_in_training_only():
    module, case = make(), example()
    before = state_of(module.eval())
    ref.evaluate(module, case)
    assert all(np.array_equal(value, before[name]) for name, value in state_of(module).items())
    ref.evaluate(module.train(), case)
    assert module.pixels.pointer.any() and module.regions.pointer.any()


def test_class_0_has_a_queue_only_as_released():
    assert make().pixels.queue.shape == (2, 12, 4)
    assert make(multilabel=True).regions.queue.shape == (3, 7, 4)
    released = make(preset="as_released")
    assert released.pixels.queue.shape == (3, 12, 4)
    first = released.pixels.queue[0].clone()
    ref.evaluate(released, example())
    assert torch.equal(released.pixels.queue[0], first) and released.pixels.pointer[0] == 0


def test_queued_voxels_belong_to_their_class_in_the_clean_preset():
    # The teacher's vector names the class: e_k on the voxels of class k.
    label = torch.randint(0, 3, (1, 1, 6, 6, 6), generator=torch.Generator().manual_seed(2)).float()
    feature = torch.nn.functional.one_hot(label[0].long(), 3).movedim(-1, 1).float()
    feature = feature.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    taps = {TAP: (3, (12, 12, 12))}
    case = ref.make_case(3, (6, 6, 6), batch=1, student_taps=taps, teacher_taps=taps)
    case = ref.Case(case.student, ref.Output(case.teacher.logits, {TAP: feature}), label)
    for preset, pure in (("clean", True), ("as_released", False)):
        module = make(taps, taps, preset=preset, pixels_per_class=10, pixel_queue=30)
        ref.evaluate(module, case)
        queued = [module.pixels.queue[module.first_row + k - 1, :10] for k in (1, 2)]
        assert all(bool((rows[:, k] == 1).all()) for k, rows in zip((1, 2), queued)) == pure


def test_memory_is_a_ring_that_restarts():
    memory = Memory(2, 5, 1)
    for value, count in ((1.0, 2), (2.0, 2), (3.0, 2), (4.0, 1)):
        memory.push(1, torch.full((count, 1), value))
    assert memory.queue[1, :, 0].tolist() == [4.0, 1.0, 2.0, 3.0, 3.0]
    assert memory.pointer.tolist() == [0, 1]
    np.testing.assert_allclose(memory.queue[0].norm(dim=1).numpy(), 1.0, rtol=1e-6)


def test_pushing_some_of_all_classes_is_pushing_them_one_by_one():
    rng = torch.Generator().manual_seed(0)
    one, all_at_once = Memory(4, 7, 2), Memory(4, 7, 2)
    all_at_once.load_state_dict(one.state_dict())
    for _ in range(30):
        vectors, counts = (
            torch.randn(3, 5, 2, generator=rng),
            torch.randint(0, 6, (3,), generator=rng),
        )
        for k, count in enumerate(counts.tolist()):
            if count:
                one.push(1 + k, vectors[k, :count])
        all_at_once.push_some(1, vectors, counts)
        assert torch.equal(all_at_once.queue, one.queue) and torch.equal(
            all_at_once.pointer, one.pointer
        )


@pytest.mark.parametrize("arguments, meaning", SETTINGS[:4])
@pytest.mark.parametrize("classes", [(0, 1, 2), (0, 2), (0,)])
def test_fixed_shapes_change_nothing_where_nothing_is_left_to_chance(
    arguments, meaning, classes, monkeypatch
):
    """The form for GPUs: all voxels of a class are queued, all slots are drawn, so that only their
    order differs.
    """
    sizes = {
        "pixel_queue": 30,
        "pixel_contrast": 30,
        "region_queue": 7,
        "region_contrast": 7,
        "pixels_per_class": 10,
    }
    multilabel = arguments.get("multilabel", False)
    case = example(multilabel, teacher=LARGE)
    kept = torch.isin(torch.arange(3), torch.tensor(classes[1:] if multilabel else classes))
    label = (
        case.label * kept.view(1, 3, 1, 1, 1)
        if multilabel
        else case.label * kept[case.label.long()]
    )
    case = case._replace(label=label.to(case.label.dtype))
    found = []
    for host in (True, False):
        monkeypatch.setattr(cirkd, "readable", lambda values, host=host: host)
        module = make(teacher=LARGE, **sizes, **arguments)
        for _ in range(4):  # the rings come round
            terms = ref.evaluate(module, case)
        leaves = [case.student.features[TAP], *module.parameters()]
        gradients = torch.autograd.grad(terms["cirkd_pixel"] + terms["cirkd_region"], leaves)
        state = {name: value.clone() for name, value in module.state_dict().items()}
        # The order of a class's voxels in its ring is random in either.
        queue = state.pop("pixels.queue")
        rounded = [sorted(map(tuple, ring.mul(1e4).round().int().tolist())) for ring in queue]
        found.append((terms, gradients, state, rounded))
    assert (found[0][0]["cirkd_pixel"] > 0) == (len(classes) > 1)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-5, atol=1e-6)
    assert len(found[0][3]) == len(found[1][3])
    for one, two in zip(found[0][3], found[1][3]):
        np.testing.assert_allclose(one, two, atol=1)


@pytest.mark.parametrize("preset", ["clean", "as_released"])
def test_fixed_shapes_draw_every_voxel_of_a_class_equally_often(preset):
    module = make(preset=preset, num_classes=2, pixel_queue=4, pixel_contrast=4)
    angle = torch.arange(12) / 4
    vectors = torch.stack([angle.cos(), angle.sin(), 0 * angle, 0 * angle], 1)[None]
    members = torch.zeros(1, 1, 12, dtype=torch.bool)
    members[..., [1, 4, 5, 8, 11]] = True
    seen = torch.zeros(12)
    for _ in range(1000):
        module.pixels.pointer.zero_()
        module._enqueue_fixed(vectors, members)
        queued = module.pixels.queue[module.first_row, :3]
        distance = (queued[:, None] - vectors[0]).norm(dim=2)
        assert distance.amin(1).max() < 1e-5
        drawn = distance.argmin(1)
        assert len(set(drawn.tolist())) == 3 and module.pixels.pointer[module.first_row] == 3
        seen[drawn] += 1
    expected = torch.zeros(12)
    expected[members[0, 0].nonzero()[:, 0] if preset == "clean" else slice(5)] = 600
    # five standard deviations
    assert (seen - expected).abs().max() < 80 and not seen[expected == 0].any()


def test_similarity_kl_of_rows_with_weights_is_that_of_the_rows_that_have_one():
    rng = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(n, 3, generator=rng).requires_grad_() for n in (10, 7))
    theirs, their_columns = (torch.randn(n, 5, generator=rng) for n in (10, 7))
    kept = torch.rand(10, generator=rng) < 0.5
    expected = similarity_kl(rows[kept], columns, theirs[kept], their_columns, 0.5)
    gradients = torch.autograd.grad(3 * expected, [rows, columns])
    for chunk in (1, 3, 64):
        found = similarity_kl(rows, columns, theirs, their_columns, 0.5, chunk, kept.float())
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(3 * found, [rows, columns]), gradients)
    nothing = similarity_kl(rows, columns, theirs, their_columns, 0.5, weights=torch.zeros(10))
    assert nothing.item() == 0.0
    assert not any(gradient.any() for gradient in torch.autograd.grad(nothing, [rows, columns]))


def test_similarity_kl_equals_autograd_for_any_chunk():
    rng = torch.Generator().manual_seed(0)
    rows, columns, teacher_rows, teacher_columns = (
        torch.randn(n, c, generator=rng).requires_grad_()
        for n, c in ((10, 3), (7, 3), (10, 5), (7, 5))
    )
    log_p = (rows @ columns.T / 0.5).log_softmax(1)
    q = (teacher_rows @ teacher_columns.T / 0.5).softmax(1).detach()
    expected = (q * (q.log() - log_p)).sum() / 10
    gradients = torch.autograd.grad(3 * expected, [rows, columns])
    for chunk in (1, 3, 10, 64, None):
        found = similarity_kl(rows, columns, teacher_rows, teacher_columns, 0.5, chunk)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(3 * found, [rows, columns]), gradients)


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_is_larger_than_a_strip():
    student, teacher = torch.randn(1, 400, 4).requires_grad_(), torch.randn(1, 400, 6)
    with LargestTensor() as largest:
        pair_kl(student, teacher, chunk=10).backward()
    assert largest.numel <= 10 * 400


@pytest.mark.slow
def test_pairs_of_a_training_patch_in_one_pass():
    """13,824 nodes, as from a 96^3 patch with features on 48^3; the loss is blind to the scale of a
    feature.
    """
    rng = torch.Generator().manual_seed(0)
    student = torch.randn(1, 8, 48, 48, 48, generator=rng).requires_grad_()
    teacher = unit_vectors(pooled_vectors(torch.randn(1, 16, 48, 48, 48, generator=rng)), 2)
    loss = pair_kl(unit_vectors(pooled_vectors(student), 2), teacher)
    loss.backward()
    assert loss.item() > 0 and student.grad.norm() > 0
    assert (student.grad * student).sum().abs() < 1e-5 * student.grad.norm() * student.norm()


def test_bad_arguments():
    with pytest.raises(ValueError, match="penultimate of the student"):
        CIRKD({"decoder": 2}, {TAP: 2}, 4)
    with pytest.raises(ValueError, match="penultimate of the teacher"):
        CIRKD({TAP: 2}, {}, 4)
    for bad in (
        {"preset": "other"},
        {"pairs": "some"},
        {"temperature": 0},
        {"chunk": 0},
        {"pool": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            make(**bad)
    with pytest.raises(ValueError, match="must hold at least"):
        make(region_contrast=8)
    with pytest.raises(ValueError, match="one channel per region"):
        ref.evaluate(make(multilabel=True), example())


@pytest.mark.parametrize(
    "grid, expected, of_all_pairs",
    [((48, 48, 48), 2, 3), ((96, 96, 96), 4, 6), ((10, 8), 2, 2), ((96, 96, 48), 4, 6)],
)
def test_default_pool_keeps_at_most_24_nodes_per_axis(grid, expected, of_all_pairs):
    assert default_pool(torch.Size(grid)) == expected
    assert default_pool(torch.Size(grid), ALL_PAIRS_NODES) == of_all_pairs


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("chunk", [None, 1, 7, 23, 100])
def test_own_similarity_kl_is_similarity_kl_of_a_matrix_with_itself(temperature, chunk):
    rng = torch.Generator().manual_seed(0)
    student = unit_vectors(torch.randn(23, 5, generator=rng), 1)
    student[4] = 0.0
    student.requires_grad_()
    teacher = unit_vectors(torch.randn(23, 3, generator=rng), 1)
    found = []
    for loss in (
        similarity_kl(student, student, teacher, teacher, temperature),
        own_similarity_kl(student, teacher, temperature, chunk),
    ):
        found.append((loss.detach(), *torch.autograd.grad(3 * loss, student)))
    for expected, ours in zip(*found):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert own_similarity_kl(student.detach(), teacher, temperature).requires_grad is False


def test_own_similarity_kl_of_many_vectors_keeps_no_map(monkeypatch):
    """Beyond the limits, the strips of `similarity_kl`."""
    vectors = unit_vectors(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)), 1)
    expected = own_similarity_kl(vectors, vectors[:, :3])
    monkeypatch.setattr(cirkd, "MOST_VECTORS", 29)
    monkeypatch.setattr(cirkd, "_OwnSimilarityKL", None)
    torch.testing.assert_close(own_similarity_kl(vectors, vectors[:, :3]), expected)
    monkeypatch.setattr(cirkd, "MOST_VECTORS", 30)
    assert own_similarity_kl(vectors, vectors[:, :3], 0.001).isfinite()  # exp(1000) is not
