"""Sliding-window prediction of whole volumes."""

import contextlib
import copy
import itertools
import platform
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from utils.modes import evaluating

AMP_MODES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CHUNK = 2**20  # logits that are converted and added at a time, 4 MiB of float32


# oneDNN's bfloat16 convolutions of PyTorch 2.13 read, and write, memory that is not theirs where
# an axis of the grid is this short: gradients of the weights are then anything.
THIN = 2
_CONVOLUTIONS = frozenset(
    {
        *(torch.conv1d, torch.conv2d, torch.conv3d),
        *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    }
)


class _ThinGridsInFloat32(TorchFunctionMode):
    """Convolutions under autocast on a CPU over grids of up to `THIN` voxels along an axis, so over
    few voxels, compute in float32, forward and backward. What they return is bfloat16 as before.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _CONVOLUTIONS:
            return func(*args, **kwargs)
        image = args[0] if args else kwargs["input"]
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        grid = image.shape[2 - weight.ndim :]  # an image may come without a batch
        if min(grid) > THIN or image.is_cuda:
            return func(*args, **kwargs)
        if not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            exact = [a.float() if isinstance(a, Tensor) else a for a in args]
            named = {key: a.float() if isinstance(a, Tensor) else a for key, a in kwargs.items()}
            return func(*exact, **named).to(torch.bfloat16)


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager:
    """Autocast context for `amp` in 'off', 'bf16', 'fp16'. On a CPU the convolutions of 'bf16' that
    are wrong there run in float32.
    """
    if amp not in AMP_MODES:
        raise ValueError(f"amp must be one of {', '.join(AMP_MODES)}, got {amp!r}")
    dtype = AMP_MODES[amp]
    if dtype is None:
        return contextlib.nullcontext()
    if device.type == "cpu" and dtype == torch.bfloat16:
        return _bf16_on_cpu()
    return torch.autocast(device.type, dtype=dtype)


@contextlib.contextmanager
def _bf16_on_cpu() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16), _ThinGridsInFloat32():
        yield


def _device_of(network: nn.Module | Callable) -> torch.device:
    """Where the network's weights are; the CPU for what has none, such as a function that runs an
    exported model.
    """
    weight = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    return torch.device("cpu") if weight is None else weight.device


@torch.inference_mode()
def predict_logits(
    network: nn.Module | Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    patch_size: Sequence[int],
    overlap: float = 0.5,
    stride: Sequence[int] | None = None,
    window_batch: int = 4,
    amp: str = "off",
    tta: bool = False,
    probabilities: bool = False,
) -> Tensor:
    """Logits (K, H, W, D), float32, of one image (C, H, W, D), on the image's device.

    Windows of `patch_size` that overlap by the fraction `overlap` are averaged with equal weight
    (the papers' protocol); a volume smaller than a window is padded with zeros, so any size can be
    segmented. stride: voxels from one window to the next along each axis, in place of `overlap`;
    the last window ends where the volume does. network: a module, which runs where its weights are,
    or any function of windows (B, C, *patch_size) on the CPU. tta: mean over the eight mirrored
    copies. probabilities: average the softmax of the windows instead of the logits (the protocol of
    the left-atrium tables) and return that.
    """
    size = tuple(image.shape[1:])
    windows = _place_windows(size, patch_size, overlap, stride, tta)
    with evaluating(network):
        ((_, logits),) = _averages(
            network, image, windows, patch_size, size, 0, window_batch, amp, probabilities
        )
    return logits


@torch.inference_mode()
def predict_labels(
    network: nn.Module | Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    patch_size: Sequence[int],
    overlap: float = 0.5,
    stride: Sequence[int] | None = None,
    window_batch: int = 4,
    amp: str = "off",
    tta: bool = False,
    probabilities: bool = False,
    multilabel: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Ids (H, W, D) or, if `multilabel`, regions (K, H, W, D), uint8, of one image (C, H, W, D), on
    its device.

    `to_labels` of `predict_logits`, whose arguments it takes, but the logits of the whole volume
    never exist: those of one slab do, as thick as a window. On a CPU a `window_batch` of 1 needs
    the least memory and time. progress: called with the number of windows that are done and of all.
    """
    if multilabel and probabilities:
        raise ValueError(
            "probabilities are of exclusive classes, multilabel regions overlap: choose one of the "
            "two"
        )
    size = tuple(image.shape[1:])
    windows = _place_windows(size, patch_size, overlap, stride, tta)
    # The slab is smallest across the axis of which a window covers the smallest share.
    axis = min(range(3), key=lambda k: patch_size[k] / size[k])
    slab = tuple(min(p, n) if k == axis else n for k, (n, p) in enumerate(zip(size, patch_size)))
    windows.sort(key=lambda window: window[0][axis])
    labels = None
    with evaluating(network):
        for begin, logits in _averages(
            network,
            image,
            windows,
            patch_size,
            slab,
            axis,
            window_batch,
            amp,
            probabilities,
            progress,
        ):
            part = to_labels(logits, multilabel)
            if labels is None:
                labels = part.new_empty((*part.shape[:-3], *size))
            labels.narrow(axis - 3, begin, part.shape[axis - 3]).copy_(part)
    return labels


def _place_windows(
    size: Sequence[int],
    patch_size: Sequence[int],
    overlap: float,
    stride: Sequence[int] | None,
    tta: bool,
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(first voxel, mirrored axes) of every window, in lexicographic order; the axes H, W, D are 0,
    1, 2.

    Along an axis shorter than the window there is one, which begins before the volume does. With
    `tta`, those of the eight mirrored volumes too, placed as each would be if it were predicted on
    its own.
    """
    if len(size) != 3 or len(patch_size) != 3 or min(patch_size) < 1:
        raise ValueError(
            "expected an image (C, H, W, D) and a patch_size of three positive sides, got an "
            "image of sides "
            f"{tuple(size)} and patch_size {tuple(patch_size)}"
        )
    if stride is None:
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap must be at least 0 and below 1, got {overlap}")
        stride = [max(int(p * (1 - overlap)), 1) for p in patch_size]
    elif len(stride) != 3 or any(not 0 < s <= p for s, p in zip(stride, patch_size)):
        raise ValueError(
            f"stride {tuple(stride)} must lie in 1 .. patch_size {tuple(patch_size)} along each "
            "axis"
        )
    starts = [
        [min(start, n - p) for start in range(0, n - p + s, s)] if n > p else [-((p - n) // 2)]
        for n, p, s in zip(size, patch_size, stride)
    ]
    windows = []
    for code in range(8 if tta else 1):
        mirrored = tuple(axis for axis in range(3) if code >> axis & 1)
        placed = [
            [n - p - start for start in reversed(starts[k])] if k in mirrored else starts[k]
            for k, (n, p) in enumerate(zip(size, patch_size))
        ]
        windows += [(start, mirrored) for start in itertools.product(*placed)]
    return windows


def _cover(
    windows: Sequence[tuple], size: Sequence[int], patch_size: Sequence[int], device: torch.device
) -> dict[tuple[int, ...], list[Tensor]]:
    """Mirrored axes -> for H, W and D the number of such windows over each voxel; a voxel's count
    is their product.
    """
    cover = {mirrored: [torch.zeros(n, device=device) for n in size] for _, mirrored in windows}
    for mirrored, counts in cover.items():
        for axis, (count, p) in enumerate(zip(counts, patch_size)):
            for start in {start[axis] for start, axes in windows if axes == mirrored}:
                count[max(start, 0) : start + p] += 1
    return cover


def _averages(
    network: nn.Module | Callable,
    image: Tensor,
    windows: Sequence[tuple],
    patch_size: Sequence[int],
    slab: Sequence[int],
    axis: int,
    window_batch: int,
    amp: str,
    probabilities: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (begin, logits (K, *part of the volume)), parts that follow each other along `axis` and
    fill the volume.

    slab: sides of the memory in which windows add up. It spans the volume but for `axis`, along
    which it holds at least a window; the windows then come in the order of that axis. A part is
    valid until the next one is asked for.
    """
    device, size = _device_of(network), image.shape[1:]
    cover = _cover(windows, size, patch_size, image.device)
    total, begin = None, 0  # begin: the voxel along `axis` at which the slab lies
    for first in range(0, len(windows), window_batch):
        batch = windows[first : first + window_batch]
        crops = torch.stack(
            [_crop(image, start, patch_size, mirrored) for start, mirrored in batch]
        )
        with autocast(device, amp):
            outputs = network(crops.to(device))
        if total is None:
            # The whole volume is for the caller, who expects plain memory; a slab adds up fastest
            # in the network's own.
            own = tuple(slab) != tuple(size) and outputs.is_contiguous(
                memory_format=torch.channels_last_3d
            )
            total = torch.empty(
                (1, outputs.shape[1], *slab),
                device=image.device,
                memory_format=torch.channels_last_3d if own else torch.contiguous_format,
            )[0].zero_()
        for (start, mirrored), logits in zip(batch, outputs):
            done = start[axis] - begin
            if start[axis] + patch_size[axis] > begin + slab[axis] and done > 0:
                yield begin, total.narrow(axis + 1, 0, done)
                _advance(total, axis + 1, done)
                begin += done
            if mirrored:
                logits = logits.flip([k + 1 for k in mirrored])
            inside = [slice(max(s, 0), min(s + p, n)) for s, p, n in zip(start, patch_size, size)]
            logits = logits[
                (slice(None), *(slice(i.start - s, i.stop - s) for i, s in zip(inside, start)))
            ]
            h, w, d = (count[i] for count, i in zip(cover[mirrored], inside))
            weight = (len(cover) * h[:, None, None] * w[:, None] * d).reciprocal()
            place = list(inside)
            place[axis] = slice(inside[axis].start - begin, inside[axis].stop - begin)
            _add(total[(slice(None), *place)], logits, weight, probabilities)
        if progress is not None:
            progress(first + len(batch), len(windows))
    yield begin, total.narrow(axis + 1, 0, size[axis] - begin)


def _crop(
    image: Tensor, start: Sequence[int], patch_size: Sequence[int], mirrored: Sequence[int]
) -> Tensor:
    """Window (C, *patch_size) of an image (C, H, W, D), zero outside of it, mirrored along some of
    its axes.
    """
    ends = [(max(s, 0), min(s + p, n)) for s, p, n in zip(start, patch_size, image.shape[1:])]
    crop = image[(slice(None), *(slice(*pair) for pair in ends))]
    margins = [(low - s, s + p - high) for (low, high), s, p in zip(ends, start, patch_size)]
    if any(map(any, margins)):
        crop = F.pad(crop, [margin for pair in reversed(margins) for margin in pair])
    return crop.flip([axis + 1 for axis in mirrored]) if mirrored else crop


def _add(total: Tensor, logits: Tensor, weight: Tensor, probabilities: bool) -> None:
    """total (K, h, w, d) += float32 logits (or their softmax) * weight (h, w, d).

    Plane by plane: temporaries of some MB stay in the processor's cache and in memory that the
    process already holds, while one of a whole window costs more page faults than arithmetic.
    """
    planes = max(1, CHUNK // max(1, logits[:, 0].numel()))
    for sums, part, factor in zip(
        total.split(planes, 1), logits.split(planes, 1), weight.split(planes)
    ):
        part = part.float()
        part = part.softmax(0) if probabilities else part
        sums.addcmul_(part.to(total.device), factor)


def _advance(total: Tensor, dim: int, count: int) -> None:
    """Drop the first `count` planes of `total` along `dim`, move the others there, fill up with
    zeros; in place.
    """
    length = total.shape[dim]
    # pieces no longer than the step do not overlap their destination
    for begin in range(count, length, count):
        piece = total.narrow(dim, begin, min(count, length - begin))
        total.narrow(dim, begin - count, piece.shape[dim]).copy_(piece)
    total.narrow(dim, max(0, length - count), min(count, length)).zero_()


def fast_dtype(device: torch.device) -> torch.dtype:
    """What `fast_copy` should compute in: bfloat16, or float32 on processors that have no
    instructions for it.
    """
    if device.type != "cpu":
        return torch.bfloat16
    if platform.machine().lower() in ("x86_64", "amd64"):
        # Others emulate it, and a U-Net then takes ten times as long as in float32.
        able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        able = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if able else torch.float32


def fast_copy(network: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A copy of a 3D network for prediction alone: weights in `dtype`, memory channels-last, input
    cast by itself.

    Meant for processors with instructions for bfloat16 (AVX512-BF16, AMX);
    benchmarks/inference_speed.py tells what it gives on one. The logits are of `dtype` (in bfloat16
    two to three digits) and are averaged in float32 by the functions above. Later changes of the
    network's weights do not reach the copy.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}"
        )
    return _FastCopy(network, dtype)


class _FastCopy(nn.Module):
    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.network = copy.deepcopy(network).eval()
        if dtype != torch.float32:
            _use_group_norms(self.network)
        self.network.to(dtype, memory_format=torch.channels_last_3d)
        for layer in self.network.modules():
            if isinstance(layer, nn.BatchNorm3d):
                # running statistics keep their digits; input in half precision is accepted all the
                # same
                layer.float()
            elif type(layer) is nn.Conv3d and layer.in_channels == 1:
                layer.__class__ = _OneChannelConv3d
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        image = image.to(self.dtype, memory_format=torch.channels_last_3d)
        if self.dtype == torch.float32:
            return self.network(image)
        # a few layers exist in float32 alone
        with torch.autocast(image.device.type, dtype=self.dtype):
            return self.network(image)


class _OneChannelConv3d(nn.Conv3d):
    """A convolution of one input channel, in float32 where the image is one voxel deep.

    There, oneDNN's convolution in bfloat16 and channels-last memory reads memory that nobody
    wrote, with PyTorch 2.13.
    """

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[2] > 1:
            return super().forward(image)
        with torch.autocast(image.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return self._conv_forward(image.float(), self.weight.float(), bias).to(image.dtype)


def _use_group_norms(network: nn.Module) -> None:
    """Put group norms of one channel a group in place of instance norms, whose function they are.

    They take channels-last memory as it is, where instance norm copies twice. Their variance there
    is that of squares minus squared mean, with errors of 1e-3 in the logits where a window is
    almost constant: not for float32.
    """
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.InstanceNorm3d) and not layer.track_running_stats:
                norm = nn.GroupNorm(layer.num_features, layer.num_features, layer.eps, affine=False)
                if layer.affine:
                    norm.weight, norm.bias = layer.weight, layer.bias
                setattr(parent, name, norm)


@torch.inference_mode()
def predict_slices(
    network: nn.Module | Callable, slices: Tensor, *, batch: int = 16, amp: str = "off"
) -> Tensor:
    """Ids (N, H, W) uint8 on the CPU of images (N, C, H, W), whose sides the network's stride
    divides.
    """
    device = _device_of(network)
    with evaluating(network):
        ids = []
        for part in slices.split(batch):
            with autocast(device, amp):
                logits = network(part.to(device))
            ids.append(logits.argmax(1).to(torch.uint8).cpu())
    return torch.cat(ids)


def to_labels(logits: Tensor, multilabel: bool = False) -> Tensor:
    """Logits (K, *spatial) -> ids (*spatial) uint8 by argmax, or regions (K, *spatial) uint8 by
    sigmoid >= 0.5.
    """
    # The indices of max are those of argmax, the first of equals too, several times sooner on a
    # CPU.
    return (logits >= 0).to(torch.uint8) if multilabel else logits.max(0).indices.to(torch.uint8)


def largest_component(ids: np.ndarray) -> np.ndarray:
    """Ids (*spatial) with 0 everywhere but in the largest component of the foreground; voxels touch
    by corners too.
    """
    components, count = ndimage.label(ids > 0, structure=np.ones((3,) * ids.ndim))
    if count < 2:
        return ids
    sizes = np.bincount(components.ravel())[1:]
    return np.where(components == 1 + sizes.argmax(), ids, 0).astype(ids.dtype)
