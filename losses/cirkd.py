"""CIRKD: the teacher's relations between voxels, within images, between images, and to a memory of
voxels and regions seen before.

Paper: Yang et al., "Cross-Image Relational Knowledge Distillation for Semantic Segmentation", CVPR
2022, eq. 3-10. On the `penultimate` taps, average-pooled, with unit vectors over the channels (X_S,
X_T):

    L_pair   = mean over images i and j, and over rows, of
               KL( softmax(X_T,i' X_T,j) || softmax(X_S,i' X_S,j) )                 weight 1
    L_memory = mean over anchors of
               KL( softmax(X_T' M / 0.1) || softmax(h(X_S)' M / 0.1) )              weights 0.1, 0.1
    L_kd     = KL(teacher || student) of the class probabilities, per voxel         weight 1

h projects the student to the teacher's channels and is trained along. M holds 96 vectors per class,
drawn anew at each call from a queue of single voxels (`pixel`) and one of per-class means
(`region`), both filled with teacher features. Anchors are the labelled voxels outside the
background. The teacher's feature and the label are brought to the student's grid by nearest
neighbour.

Overlapping regions (multi-label): the regions are the classes of the memory. A voxel in several
regions enters the queue of each, and is an anchor once. L_pair is unchanged; L_kd is the KL of
[p, 1 - p], summed over the regions.

Presets. 'clean': every image is paired with every one, itself included, in either order; class 0
has no queue; queued voxels are drawn from the class's own. 'as_released': only the first image of
the batch is paired with itself (multi-label: all pairs, L_kd with a softmax over the regions, no
memory); the queue of class 0 exists, is never filled, and its random vectors are used as contrast;
the voxels queued for a class of n voxels are drawn from the first n voxels of the volume, whatever
their class. Without any anchor the memory terms are 0 in both (the reference gives NaN).

Cost. A similarity map of 24^3 voxels has 13,824^2 entries (0.76 GB). It is made in strips of
`chunk` rows, whose gradient is taken at once, so that no map is kept: memory grows with chunk *
13,824. On a CPU strips are narrow enough for its cache. B images have B^2 maps. For all pairs the
windows are therefore so large that an axis keeps at most 16 nodes: 3 wide for features on 48^3,
where the reference's 2 leave 24. All 16 pairs of 4 images then take half the time of the 4 own ones
at 24 nodes, and a twelfth of what they would take there.

State. The queues are buffers, so they are saved and resumed with the module; each process has its
own. They change in training mode only. Random draws come from torch's global generators, of the CPU
and, on a GPU, of that GPU.

Fixed shapes. How many voxels are of a class is known on the device alone, and asking makes the host
wait. On other devices than the CPU every shape is therefore that of the grid: all voxels are rows,
anchors by their weight of 1 or 0, and a class queues the voxels of its largest random keys, an
absent one what its slots held before.
"""

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from losses.kd import (
    PRESETS,
    bernoulli_kl,
    check_choice,
    check_positive,
    check_weights,
    class_masks,
    region_masks,
    softmax_kl,
    unit_vectors,
)
from losses.taps import moved, readable, require_taps, resize_nearest

PAIRS = ("all", "own", "first")
# Most nodes that an axis keeps by default in L_pair of all pairs
ALL_PAIRS_NODES = 16


def _log_sum_exp(similarities: Tensor, probs: Tensor) -> Tensor:
    """Log-sum-exp of each row, float64, read off its softmax `probs` at the largest entry."""
    return similarities.amax(1).double() - probs.amax(1).double().log()


class _SimilarityKL(torch.autograd.Function):
    """Mean over rows of KL(softmax(tq tk'/t) || softmax(sq sk'/t)), with the gradient computed
    strip by strip.

    weights: of the rows, float32 (n,), or None for ones.
    """

    @staticmethod
    def forward(
        ctx,
        student_rows,
        student_columns,
        teacher_rows,
        teacher_columns,
        weights,
        temperature,
        chunk,
    ):
        rows = student_rows.shape[0]
        total_weight = rows
        if weights is not None:
            total_weight = weights.sum()
            total_weight = total_weight.where(total_weight > 0, 1.0)
        needs_rows, needs_columns = ctx.needs_input_grad[:2]
        grad_rows = torch.zeros_like(student_rows) if needs_rows else None
        grad_columns = torch.zeros_like(student_columns) if needs_columns else None
        # Written KL = sum q (t - s) + lse(s) - lse(t), with one exponential per similarity instead
        # of two.
        total = student_rows.new_zeros((), dtype=torch.float64)
        for start in range(0, rows, chunk):
            strip = slice(start, start + chunk)
            s = torch.mm(student_rows[strip], student_columns.T).div_(temperature)
            t = torch.mm(teacher_rows[strip], teacher_columns.T).div_(temperature)
            p, q = s.softmax(1), t.softmax(1)
            if weights is None:
                total += (_log_sum_exp(s, p) - _log_sum_exp(t, q)).sum()
                total += torch.dot(q.view(-1), t.sub_(s).view(-1))
            else:
                total += torch.dot(_log_sum_exp(s, p) - _log_sum_exp(t, q), weights[strip].double())
                total += torch.dot(torch.mul(q, t.sub_(s), out=t).sum(1), weights[strip])
            if needs_rows or needs_columns:
                slope = p.sub_(q)  # of the loss, by the similarities, but for a constant factor
                if weights is not None:
                    slope.mul_(weights[strip, None])
                if needs_rows:
                    torch.mm(slope, student_columns, out=grad_rows[strip])
                if needs_columns:
                    grad_columns.addmm_(slope.T, student_rows[strip])
        for gradient in (grad_rows, grad_columns):
            if gradient is not None:
                gradient.div_(total_weight * temperature)
        ctx.save_for_backward(grad_rows, grad_columns)
        return (total / total_weight).float()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *(None if saved is None else grad * saved for saved in ctx.saved_tensors), *[
            None
        ] * 5


def similarity_kl(
    student_rows: Tensor,
    student_columns: Tensor,
    teacher_rows: Tensor,
    teacher_columns: Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """KL between the teacher's and the student's softmax over similarities, mean over rows; scalar
    float32.

    rows (n, C), columns (m, C), float32; C may differ between student and teacher. chunk: rows at a
    time; None means 128 on a CPU and 1024 elsewhere. weights (n,) float32, at least 0: of the rows
    in the mean, which is 0 with a graph if all are 0; None for ones. Gradient to the student's rows
    and columns only, first order only.
    """
    if chunk is None:
        chunk = 128 if student_rows.device.type == "cpu" else 1024
    with torch.autocast(student_rows.device.type, enabled=False):
        return _SimilarityKL.apply(
            student_rows,
            student_columns,
            teacher_rows.detach(),
            teacher_columns.detach(),
            weights,
            temperature,
            chunk,
        )


class _OwnSimilarityKL(torch.autograd.Function):
    """`similarity_kl` of unit vectors with themselves, in half the products: their similarities are
    symmetric.

    Each strip holds the similarities of its rows to themselves and to later rows; those to earlier
    rows are columns of earlier strips. The exponentials are kept until all sums are known: n^2
    float32 for student and teacher together.
    """

    @staticmethod
    def forward(ctx, student, teacher, temperature, chunk):
        count = len(student)
        ours, theirs = student / temperature, teacher / temperature
        # For every row: sums of exp(s), of exp(t) and of exp(t) (t - s). Nothing overflows: |s| <=
        # 1 / temperature.
        sums = student.new_zeros((3, count), dtype=torch.float64)
        strips = []
        for start in range(0, count, chunk):
            stop = min(start + chunk, count)
            s, t = (
                torch.mm(ours[start:stop], student[start:].T),
                torch.mm(theirs[start:stop], teacher[start:].T),
            )
            exp_s, exp_t = s.exp(), t.exp()
            for total, part in zip(sums, (exp_s, exp_t, t.sub_(s).mul_(exp_t))):
                total[start:stop] += part.sum(1)
                total[stop:] += part[:, stop - start :].sum(0)
            strips.append((start, stop, exp_s, exp_t))
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = torch.zeros_like(student)
            a, b = sums[:2].reciprocal().float()
            for start, stop, exp_s, exp_t in strips:
                # p - q of the similarity as one of its row, and as one of its column
                slope = exp_s.mul_(a[start:stop, None] + a[start:]).sub_(
                    exp_t.mul_(b[start:stop, None] + b[start:])
                )
                gradient[start:stop].addmm_(slope, student[start:])
                gradient[stop:].addmm_(slope[:, stop - start :].T, student[start:stop])
            gradient.div_(count * temperature)
        ctx.save_for_backward(gradient)
        return (sums[0].log() - sums[1].log() + sums[2] / sums[1]).mean().float()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None, None


# Vectors and temperature up to which a CPU takes `_OwnSimilarityKL`: memory, and range of the
# exponential function.
MOST_VECTORS, LEAST_TEMPERATURE = 1 << 14, 0.05


def own_similarity_kl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, chunk: int | None = None
) -> Tensor:
    """`similarity_kl` of (n, C) vectors of unit length, or 0, with themselves; scalar float32."""
    few = len(student) <= MOST_VECTORS and temperature >= LEAST_TEMPERATURE
    if student.device.type != "cpu" or not few:
        return similarity_kl(student, student, teacher, teacher, temperature, chunk)
    with torch.autocast("cpu", enabled=False):
        return _OwnSimilarityKL.apply(student, teacher.detach(), temperature, chunk or 128)


def pooled_vectors(feature: Tensor, pool: int = 2) -> Tensor:
    """Average-pool (B, C, *spatial) by `pool`, keeping partial windows, and flatten: (B, N, C)
    float32.
    """
    average = F.avg_pool3d if feature.ndim == 5 else F.avg_pool2d
    window = [min(pool, size) for size in feature.shape[2:]]  # torch refuses one beyond the grid
    return average(feature.float(), window, window, ceil_mode=True).flatten(2).transpose(1, 2)


def default_pool(grid: torch.Size, nodes: int = 24) -> int:
    """Side of the averaging windows for features on `grid`: 2 as in the reference, more where an
    axis would keep more than `nodes` (at 24: students with features on the full 96^3 grid), since
    the cost of a similarity map grows with their sixth power.
    """
    return max(2, *(-(-size // nodes) for size in grid))


def pair_kl(
    student_vectors: Tensor,
    teacher_vectors: Tensor,
    pairs: str = "all",
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Mean of `similarity_kl` over image pairs; vectors (B, N, C) of unit length; scalar float32.

    pairs: 'all' (B^2 ordered pairs), 'own' (each image with itself) or 'first' (the first image
    with itself).
    """
    images = range(1 if pairs == "first" else len(student_vectors))
    couples = [(i, j) for i in images for j in images if pairs == "all" or i == j]
    student, teacher = student_vectors, teacher_vectors
    losses = [
        own_similarity_kl(student[i], teacher[i], temperature, chunk)
        if i == j
        else similarity_kl(student[i], student[j], teacher[i], teacher[j], temperature, chunk)
        for i, j in couples
    ]
    return sum(losses) / len(losses)


class ProjectionHead(nn.Module):
    """Pointwise convolution, batch norm, ReLU, pointwise convolution; (B, C, N) -> (B, C', N), any
    spatial rank.

    Synchronised batch norm when the process group is NCCL at construction (it exists for GPUs
    only).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        synchronised = distributed and torch.distributed.get_backend() == "nccl"
        self.reduce = nn.Conv1d(in_channels, out_channels, 1, bias=False)
        self.norm = (nn.SyncBatchNorm if synchronised else nn.BatchNorm1d)(out_channels)
        self.project = nn.Conv1d(out_channels, out_channels, 1, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.project(F.relu(self.norm(self.reduce(vectors))))


class Memory(nn.Module):
    """A ring of unit teacher vectors per class, filled by `push`, and a random part of it by
    `draw`.
    """

    def __init__(self, num_classes: int, size: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("queue", F.normalize(torch.randn(num_classes, size, channels), dim=2))
        self.register_buffer("pointer", torch.zeros(num_classes, dtype=torch.long))

    @torch.no_grad()
    def push(self, row: int, vectors: Tensor) -> None:
        """Write (k, C) `vectors` to the ring of class `row`; a batch that reaches its end goes to
        the last k slots.
        """
        count, size = len(vectors), self.queue.shape[1]
        start = int(self.pointer[row])
        if start + count >= size:
            self.queue[row, size - count :] = vectors
            self.pointer[row] = 0
        else:
            self.queue[row, start : start + count] = vectors
            self.pointer[row] = start + count

    @torch.no_grad()
    def push_some(self, first_row: int, vectors: Tensor, counts: Tensor) -> None:
        """`push` of the first counts[i] of vectors[i] to the ring of class first_row + i, for all
        of them at once.

        vectors (n, k, C); counts (n,) int64 from 0, which leaves a ring as it is, to k. The shapes
        of what is done do not depend on the counts: slots past a count are written with what they
        hold.
        """
        size, places = self.queue.shape[1], torch.arange(vectors.shape[1], device=vectors.device)
        rings, pointer = self.queue[first_row:], self.pointer[first_row:]
        full = pointer + counts >= size
        slots = (torch.where(full, size - counts, pointer)[:, None] + places) % size
        slots = slots[..., None].expand(vectors.shape)
        rings.scatter_(
            1,
            slots,
            torch.where((places < counts[:, None])[..., None], vectors, rings.gather(1, slots)),
        )
        pointer.copy_(torch.where(full, 0, pointer + counts))

    def draw(self, count: int) -> Tensor:
        """(num_classes * count, C) vectors: the same random slots of every ring."""
        slots = moved(torch.randperm(self.queue.shape[1])[:count], self.queue.device)
        return self.queue[:, slots].flatten(0, 1)


class CIRKD(nn.Module):
    """The terms `cirkd_pair`, `cirkd_pixel`, `cirkd_region` and `cirkd_kd`; a weight of 0 leaves
    its term out.

    pairs: 'all', 'own' or 'first'; None follows the preset. temperature: of L_pair.
    contrast_temperature: of L_memory.
    pixel_contrast, region_contrast: vectors per class and call. pixel_queue, region_queue: slots
    per class.
    pixels_per_class: voxels queued per sample and class. chunk: rows of a similarity map at a time;
    None follows `similarity_kl`. pool: side of the averaged windows; None follows `default_pool`,
    with at most `ALL_PAIRS_NODES` for L_pair of all pairs in 'clean'.
    """

    incomplete = False  # an UNKNOWN voxel is in no class

    def __init__(
        self,
        student_channels: dict[str, int],
        teacher_channels: dict[str, int],
        num_classes: int,
        multilabel: bool = False,
        preset: str = "clean",
        pair_weight: float = 1.0,
        pixel_weight: float = 0.1,
        region_weight: float = 0.1,
        kd_weight: float = 1.0,
        pairs: str | None = None,
        temperature: float = 1.0,
        contrast_temperature: float = 0.1,
        pixel_contrast: int = 96,
        region_contrast: int = 96,
        pixel_queue: int = 20000,
        region_queue: int = 2000,
        pixels_per_class: int = 16,
        pool: int | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("cirkd", "preset", preset, PRESETS)
        check_choice("cirkd", "pairs", pairs, (None, *PAIRS))
        check_weights(
            "cirkd",
            pair_weight=pair_weight,
            pixel_weight=pixel_weight,
            region_weight=region_weight,
            kd_weight=kd_weight,
        )
        check_positive(
            "cirkd",
            temperature=temperature,
            contrast_temperature=contrast_temperature,
            pixel_contrast=pixel_contrast,
            region_contrast=region_contrast,
            pixels_per_class=pixels_per_class,
            **{
                name: value
                for name, value in (("chunk", chunk), ("pool", pool))
                if value is not None
            },
        )
        if (
            pixel_contrast > pixel_queue
            or region_contrast > region_queue
            or pixels_per_class > pixel_queue
        ):
            raise ValueError(
                f"cirkd: the queues ({pixel_queue} pixels, {region_queue} regions) must hold at "
                "least "
                f"pixel_contrast = {pixel_contrast}, pixels_per_class = {pixels_per_class} and "
                f"region_contrast = {region_contrast} vectors"
            )
        self.student_taps = self.teacher_taps = ("penultimate",)
        require_taps("cirkd", "student", student_channels, self.student_taps)
        require_taps("cirkd", "teacher", teacher_channels, self.teacher_taps)
        self.legacy, self.multilabel, self.num_classes = (
            preset == "as_released",
            multilabel,
            num_classes,
        )
        self.pair_weight, self.pixel_weight, self.region_weight = (
            pair_weight,
            pixel_weight,
            region_weight,
        )
        self.kd_weight, self.temperature, self.contrast_temperature = (
            kd_weight,
            temperature,
            contrast_temperature,
        )
        self.pixel_contrast, self.region_contrast = pixel_contrast, region_contrast
        self.pixels_per_class, self.pool, self.chunk = pixels_per_class, pool, chunk
        if pairs is None:
            pairs = "first" if self.legacy and not multilabel else "all"
        self.pairs = pairs
        self.pair_nodes = ALL_PAIRS_NODES if pairs == "all" and not self.legacy else 24

        # A foreground class of index i (0-based) has the queue row first_row + i; the reference has
        # a row 0 to spare.
        self.first_row = 1 if self.legacy else 0
        rows = num_classes if multilabel or self.legacy else num_classes - 1
        has_memory = (pixel_weight or region_weight) and not (multilabel and self.legacy)
        channels = teacher_channels["penultimate"]
        self.head = (
            ProjectionHead(student_channels["penultimate"], channels) if has_memory else None
        )
        self.pixels = Memory(rows, pixel_queue, channels) if has_memory else None
        self.regions = Memory(rows, region_queue, channels) if has_memory else None

    def _foreground(self, label: Tensor, grid: torch.Size) -> Tensor:
        """(B, foreground classes, N) bool on the pooled `grid`."""
        if self.multilabel:
            return (
                resize_nearest(region_masks(label, self.num_classes).float(), grid)
                .bool()
                .flatten(2)
            )
        return class_masks(resize_nearest(label.float(), grid), self.num_classes)[:, 1:].flatten(2)

    @torch.no_grad()
    def _enqueue(self, teacher_vectors: Tensor, foreground: Tensor) -> None:
        """Queue, per sample and class in it, the mean and a few of its unit teacher vectors (B, N,
        C).
        """
        if not readable(foreground):
            return self._enqueue_fixed(teacher_vectors, foreground)
        for sample, index in foreground.any(2).nonzero().tolist():
            row = self.first_row + index
            voxels = foreground[sample, index].nonzero()[:, 0]
            vectors = teacher_vectors[sample]
            self.regions.push(row, F.normalize(vectors[voxels].mean(0, keepdim=True), dim=1))
            chosen = torch.randperm(len(voxels))[: self.pixels_per_class].to(voxels.device)
            chosen = chosen if self.legacy else voxels[chosen]
            self.pixels.push(row, F.normalize(vectors[chosen], dim=1))

    @torch.no_grad()
    def _enqueue_fixed(self, teacher_vectors: Tensor, foreground: Tensor) -> None:
        """`_enqueue` by operations whose shapes are those of the arguments; the voxels are drawn by
        random keys.
        """
        counts = foreground.sum(2)  # (B, foreground classes)
        candidates = foreground
        if self.legacy:
            candidates = torch.arange(foreground.shape[2], device=counts.device) < counts[..., None]
        keys = torch.rand(candidates.shape, device=counts.device).masked_fill(~candidates, -1.0)
        chosen = keys.topk(min(self.pixels_per_class, keys.shape[2]), dim=2).indices
        with torch.autocast(teacher_vectors.device.type, enabled=False):
            # sums, scaled alike
            means = F.normalize(foreground.to(teacher_vectors.dtype) @ teacher_vectors, dim=2)
            for vectors, index, mean, count in zip(teacher_vectors, chosen, means, counts):
                self.regions.push_some(self.first_row, mean[:, None], count.clamp(max=1))
                picked = F.normalize(vectors[index], dim=2)
                self.pixels.push_some(self.first_row, picked, count.clamp(max=index.shape[1]))

    def _memory_terms(
        self, student_pooled: Tensor, teacher_vectors: Tensor, foreground: Tensor
    ) -> dict[str, Tensor]:
        with torch.autocast(student_pooled.device.type, enabled=False):
            projected = unit_vectors(
                self.head(student_pooled.transpose(1, 2)).transpose(1, 2), dim=2
            )
        if self.training:
            self._enqueue(teacher_vectors, foreground)
        anchors, weights = foreground.any(1), None
        if readable(anchors):
            student_anchors, teacher_anchors = projected[anchors], teacher_vectors[anchors]
        else:  # as many rows as there are voxels
            student_anchors, teacher_anchors = (
                projected.flatten(0, 1),
                teacher_vectors.flatten(0, 1),
            )
            weights = anchors.flatten().float()

        def contrast(memory: Memory, count: int) -> Tensor:
            vectors = memory.draw(count).float()
            if len(student_anchors) == 0:
                # 0 that the head's parameters still take part in, as DDP needs
                return 0.0 * projected.sum()
            return similarity_kl(
                student_anchors,
                vectors,
                teacher_anchors,
                vectors,
                self.contrast_temperature,
                self.chunk,
                weights,
            )

        terms = {}
        if self.pixel_weight:
            terms["cirkd_pixel"] = self.pixel_weight * contrast(self.pixels, self.pixel_contrast)
        if self.region_weight:
            terms["cirkd_region"] = self.region_weight * contrast(
                self.regions, self.region_contrast
            )
        return terms

    def forward(self, student, teacher, label: Tensor, progress: float) -> dict[str, Tensor]:
        student_feature = student.features["penultimate"]
        teacher_feature = resize_nearest(
            teacher.features["penultimate"].detach(), student_feature.shape[2:]
        )
        grid = student_feature.shape[2:]
        terms = {}
        if self.pair_weight:
            pool = self.pool or default_pool(grid, self.pair_nodes)
            student_vectors = unit_vectors(pooled_vectors(student_feature, pool), dim=2)
            teacher_vectors = unit_vectors(pooled_vectors(teacher_feature, pool), dim=2)
            pair = pair_kl(
                student_vectors, teacher_vectors, self.pairs, self.temperature, self.chunk
            )
            terms["cirkd_pair"] = self.pair_weight * pair
        if self.head is not None:
            pool = self.pool or default_pool(grid)
            student_pooled = pooled_vectors(student_feature, pool)
            teacher_vectors = unit_vectors(pooled_vectors(teacher_feature, pool), dim=2)
            pooled_grid = torch.Size(-(-size // pool) for size in grid)
            foreground = self._foreground(label, pooled_grid)
            terms |= self._memory_terms(student_pooled, teacher_vectors, foreground)
        if self.kd_weight:
            divergence = bernoulli_kl if self.multilabel and not self.legacy else softmax_kl
            terms["cirkd_kd"] = self.kd_weight * divergence(
                student.logits, teacher.logits, reduction="voxel"
            )
        return terms
