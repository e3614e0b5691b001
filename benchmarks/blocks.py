"""What is computed: blocks of real networks and SimpleCNN, the cases made of them, and problems.

A :class:`Problem` is a case at one batch size, precision and device: the parameters, the batches,
and the results that every contender must reproduce.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import fusedcnn
import torch
import torch.nn.functional as F
from fusedcnn.functional import pack_geometry
from timing import Precision, with_tf32_operands
from torch import Tensor, nn

SEED = 0

# Of a network's first block, whose input is data: it needs no gradient, and is no activation.
DATA_CHANNELS = (1, 3)

# A batch of 64 images fits in a core's second-level cache, and timing it over and over would
# flatter everybody: real batches come from memory. So calls rotate over copies whose sum is larger
# than the 1 to 4 MiB that a core has to itself, and large enough to disturb a shared last level. On
# a GPU their sum is twice the second-level cache; small batches stay in it all the same.
ROTATED_BYTES = 32 * 2**20
ROTATED_CACHES = 2
MAX_COPIES = 64

# A pool window whose two largest values nearly tie, or whose largest value ReLU sees within
# rounding distance of 0, sends its gradient one way or another by the luck of the last bit, in the
# stock layers as in the fused ones. So that gradients can be compared, such windows of a block get
# no gradient, and a training step gets no images with such windows. In epsilons of values near 1:
# float32 results of these sizes err by about 8; coarser types by the rounding of one result, which
# takes part in too many near ties to leave images without any.
MARGIN_EPSILONS = 128
COARSE_MARGIN_EPSILONS = 4
# Where a batch can only be taken as a whole: at 64 images a few draws find one without such a
# window. More images have more windows, and the distance is less in proportion.
BATCH_MARGIN_EPSILONS = 16
TF32_EPSILON = 2.0**-10


# ---- blocks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """One block's sizes.

    Attributes:
        name: on the command line and in the JSON; ``title`` is for people.
        image: (C, H, W) of the input.
        conv: arguments of nn.Conv2d after in_channels.
        pool: arguments of nn.MaxPool2d.
        batch: images of a training step, no more than keeps a call within some 100 ms.
        norm: whether a BatchNorm2d stands between convolution, which then has no bias, and ReLU.
            Its backward is timed in training mode.
    """

    name: str
    title: str
    image: tuple[int, int, int]
    conv: dict[str, Any]
    pool: dict[str, Any]
    batch: int = 64
    norm: bool = False

    def stock(self) -> nn.Sequential:
        """The block from stock layers; its fused form has the same state_dict keys."""
        conv = nn.Conv2d(self.image[0], **self.conv, bias=not self.norm)
        norm = [nn.BatchNorm2d(conv.out_channels)] if self.norm else []
        return nn.Sequential(conv, *norm, nn.ReLU(), nn.MaxPool2d(**self.pool))

    def fused(self) -> nn.Sequential:
        """The same block, fused."""
        if self.norm:
            return fusedcnn.fuse(self.stock())
        conv, _, pool = self.stock()
        return nn.Sequential(fusedcnn.ConvReLUMaxPool2d.from_modules(conv, pool))

    def geometry(self) -> tuple[int, ...]:
        """The operators' ``geometry``."""
        block = self.fused()[0]
        names = inspect.signature(pack_geometry).parameters
        return pack_geometry(**{name: getattr(block, name) for name in names})

    @functools.cached_property
    def flops(self) -> int:
        """FLOPs per image of the direct convolution: a multiply and an add for each tap."""
        with torch.device("meta"):
            conv = self.stock()[0]
            return 2 * conv(torch.empty(self.image)).numel() * conv.weight[0].numel()

    @functools.cached_property
    def output(self) -> torch.Size:
        """(out_channels, H, W) after the pool."""
        with torch.device("meta"):
            return self.stock().eval()(torch.empty(1, *self.image)).shape[1:]


_SIZES = ("kernel_size", "stride", "padding")


def _block(
    name: str,
    title: str,
    channels: tuple[int, int],
    size: int,
    conv: tuple[int, int, int],
    pool: tuple[int, int, int] = (2, 2, 0),
    batch: int = 64,
    norm: bool = False,
) -> Block:
    """A block of square sizes; ``conv`` and ``pool`` are kernel size, stride and padding."""
    convolution = {"out_channels": channels[1]} | dict(zip(_SIZES, conv, strict=True))
    pooling = dict(zip(_SIZES, pool, strict=True))
    return Block(name, title, (channels[0], size, size), convolution, pooling, batch, norm)


# Overlapping windows, as in AlexNet.
POOL3 = (3, 2, 0)

# fmt: off
BLOCKS = {block.name: block for block in (
    _block("simplecnn-1", "SimpleCNN, first block", (3, 16), 32, (3, 1, 1)),
    _block("simplecnn-2", "SimpleCNN, second block", (16, 32), 16, (3, 1, 1)),
    _block("lenet-1", "LeNet-5, first block", (1, 6), 32, (5, 1, 0)),
    _block("lenet-2", "LeNet-5, second block", (6, 16), 14, (5, 1, 0)),
    _block("alexnet-1", "AlexNet, first convolution", (3, 64), 224, (11, 4, 2), POOL3, 16),
    _block("alexnet-2", "AlexNet, second convolution", (64, 192), 27, (5, 1, 2), POOL3, 16),
    _block("alexnet-5", "AlexNet, fifth convolution", (256, 256), 13, (3, 1, 1), POOL3, 16),
    _block("stem", "7x7 stem of a ResNet", (3, 64), 224, (7, 2, 3), (3, 2, 1), 8),
    _block("vgg11-1", "VGG-11, stage 1", (3, 64), 224, (3, 1, 1), batch=4),
    _block("vgg11-2", "VGG-11, stage 2", (64, 128), 112, (3, 1, 1), batch=4),
    _block("vgg11-3", "VGG-11, last of stage 3", (256, 256), 56, (3, 1, 1), batch=4),
    _block("vgg11-4", "VGG-11, last of stage 4", (512, 512), 28, (3, 1, 1), batch=4),
    _block("vgg11-5", "VGG-11, last of stage 5", (512, 512), 14, (3, 1, 1), batch=4),
    _block("cifar-1", "CIFAR net, first block", (3, 64), 32, (3, 1, 1)),
    _block("cifar-2", "CIFAR net, second block", (64, 128), 16, (3, 1, 1)),
    _block("cifar-3", "CIFAR net, third block", (128, 256), 8, (3, 1, 1)),
    _block("gray-1", "28x28 grayscale net, first block", (1, 32), 28, (3, 1, 1)),
    _block("gray-2", "28x28 grayscale net, second block", (32, 64), 14, (3, 1, 1)),
    _block("bn-1", "BatchNorm CNN, first block", (3, 32), 32, (3, 1, 1), norm=True),
    _block("bn-2", "BatchNorm CNN, second block", (32, 64), 16, (3, 1, 1), norm=True),
    _block("bn-3", "BatchNorm CNN, third block", (64, 128), 8, (3, 1, 1), norm=True),
    _block("bn-wide", "64 channels with BatchNorm", (64, 64), 32, (3, 1, 1), norm=True),
    _block("bn-stem", "ResNet's stem with BatchNorm", (3, 64), 224, (7, 2, 3), (3, 2, 1), 8, True),
    _block("bn-vgg", "VGG-11-BN, stage 1", (3, 64), 224, (3, 1, 1), batch=4, norm=True),
)}
# fmt: on
SIMPLECNN_1, SIMPLECNN_2 = BLOCKS["simplecnn-1"], BLOCKS["simplecnn-2"]
BATCH_NORM_BLOCKS = [BLOCKS[name] for name in ("bn-1", "bn-2", "bn-3")]


def batch_norm_cnn() -> nn.Sequential:
    """Three blocks with a BatchNorm each, and a linear layer, for 32x32 images."""
    blocks = [layer for block in BATCH_NORM_BLOCKS for layer in block.stock()]
    features = math.prod(BATCH_NORM_BLOCKS[-1].output)
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(features, 10))


# ---- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
        name: on the command line and in the JSON; ``title`` is for people.
        stock: makes the module from stock layers; ``fused`` the one with the same state_dict keys.
        image: (C, H, W) of the input.
        kind: ``"forward"`` under no_grad; ``"gradients"``: forward and backward with a given
            gradient of the output, of one block; ``"training"``: zero_grad, forward, loss,
            backward, Adam step.
        flops: per image, of the direct convolutions and full gradients: what the stock layers do.
        elements: per image, what each pass must at least read and write once: inputs and results,
            without parameters. The input of a backward pass counts again: a batch later it has left
            the cache.
        elements_per_call: the same for what does not grow with the batch.
        passes: of the operators, where they are those of one block.
    """

    name: str
    title: str
    stock: Callable[[], nn.Module]
    fused: Callable[[], nn.Module]
    image: tuple[int, int, int]
    kind: Literal["forward", "gradients", "training"]
    flops: int
    elements: int
    elements_per_call: int = 0
    passes: tuple[str, ...] = ()

    @property
    def input_grad(self) -> bool:
        """Whether the input's gradient is computed too."""
        return "grad_input" in self.passes


def block_case(
    block: Block, name: str = "", title: str = "", *, backward: bool, input_grad: bool | None = None
) -> Case:
    """Return the case of one block: its forward, or its forward and backward.

    The input's gradient is computed where ``input_grad`` says so, or else unless it is images.
    """
    if input_grad is None:
        input_grad = block.image[0] not in DATA_CHANNELS
    passes = ("forward", "grad_weight", "grad_input")[: 1 + backward * (1 + input_grad)]
    image, output = math.prod(block.image), math.prod(block.output)
    return Case(
        name or f"{block.name} {'forward+backward' if backward else 'forward'}",
        title,
        block.stock,
        block.fused,
        block.image,
        "gradients" if backward else "forward",
        flops=block.flops * len(passes),
        elements=(1 + backward) * (image + output) + ("grad_input" in passes) * image,
        passes=passes,
    )


# Elements per image: images, activations after block 1 and 2, hidden layer, logits.
_IMAGE, _POOLED1, _POOLED2, _HIDDEN, _LOGITS = 3 * 32 * 32, 16 * 16 * 16, 32 * 8 * 8, 128, 10
_BETWEEN = _POOLED1 + _POOLED2 + _HIDDEN
_LINEAR_FLOPS = 2 * (_POOLED2 * _HIDDEN + _HIDDEN * _LOGITS)
_SIMPLECNN = (fusedcnn.SimpleCNN, fusedcnn.FusedSimpleCNN, SIMPLECNN_1.image)

# fmt: off
CASES = {case.name: case for case in (
    block_case(SIMPLECNN_1, "block1-forward", "block 3->16 at 32x32, forward", backward=False),
    block_case(SIMPLECNN_1, "block1-backward", "block 3->16, forward + backward (weight, bias)",
               backward=True),
    block_case(SIMPLECNN_2, "block2-forward", "block 16->32 at 16x16, forward", backward=False),
    block_case(SIMPLECNN_2, "block2-backward", "block 16->32, forward + backward (all gradients)",
               backward=True),
    Case(
        "inference", "SimpleCNN, inference", *_SIMPLECNN, "forward",
        flops=SIMPLECNN_1.flops + SIMPLECNN_2.flops + _LINEAR_FLOPS,
        elements=_IMAGE + 2 * _BETWEEN + _LOGITS,
    ),
    Case(
        "training", "SimpleCNN, training step (Adam, fused=True for all)", *_SIMPLECNN, "training",
        flops=2 * SIMPLECNN_1.flops + 3 * (SIMPLECNN_2.flops + _LINEAR_FLOPS),
        elements=2 * _IMAGE + 5 * _BETWEEN + 3 * _LOGITS,
        # Adam reads parameter, gradient and two moments, and writes all but the gradient.
        elements_per_call=7 * sum(p.numel() for p in fusedcnn.SimpleCNN().parameters()),
    ),
)}
# Timed when they are asked for.
MORE_CASES = {case.name: case for case in (
    Case(
        "bn-training", "BatchNorm CNN, training step (Adam, fused=True for all)", batch_norm_cnn,
        lambda: fusedcnn.fuse(batch_norm_cnn()), SIMPLECNN_1.image, "training",
        flops=sum(block.flops * (2 + (i > 0)) for i, block in enumerate(BATCH_NORM_BLOCKS)),
        elements=2 * _IMAGE + 3 * sum(math.prod(block.output) for block in BATCH_NORM_BLOCKS),
        elements_per_call=7 * sum(p.numel() for p in batch_norm_cnn().parameters()),
    ),
)}
# fmt: on


# ---- problems ------------------------------------------------------------------------------------

Results = dict[str, Tensor]
Call = Callable[["Batch"], tuple[Tensor, ...]]


class Batch(NamedTuple):
    """One batch: ``target`` is the output's gradient, the labels, or None, by the case's kind."""

    input: Tensor
    target: Tensor | None

    def to(self, dtype: torch.dtype) -> Batch:
        """The batch in another dtype; labels stay labels."""
        floating = self.target is not None and self.target.is_floating_point()
        return Batch(self.input.to(dtype), self.target.to(dtype) if floating else self.target)


class Problem:
    """A case at one batch size, precision and device."""

    def __init__(self, case: Case, batch: int, precision: Precision, device: torch.device) -> None:
        self.case, self.batch, self.precision, self.device = case, batch, precision, device
        dtype = precision.dtype
        # What a call must at least read and write.
        self.bytes = (case.elements * batch + case.elements_per_call) * dtype.itemsize
        torch.manual_seed(SEED)
        self._stock = case.stock().to(device, dtype)
        self._batches: dict[bool, list[Batch]] = {}
        eps = torch.finfo(precision.measured).eps
        # Of the batch's own statistics. A training step has none of dropout's besides.
        self._normalised = case.kind != "forward" and any(
            isinstance(layer, nn.BatchNorm2d) for layer in self._stock.modules()
        )
        self._margin = MARGIN_EPSILONS * eps
        if self._normalised and case.kind == "training":
            self._margin = BATCH_MARGIN_EPSILONS * eps * min(1, 64 / batch)
        if precision.coarse:
            self._margin = COARSE_MARGIN_EPSILONS * max(eps, TF32_EPSILON * precision.tf32)
        images = self._draw_images()
        target = None
        if case.kind == "gradients":
            clear = self._margins(images)[0] >= self._margin
            # Drawn in float32 like everything, so that each dtype's values fit the wider ones.
            target = clear * torch.randn(clear.shape).to(device, dtype)
        elif case.kind == "training":
            target = torch.randint(10, (batch,), device=device)
        self._first = Batch(images, target)

    def module(self, *, fused: bool = False, channels_last: bool = False) -> nn.Module:
        """Return a module of its own for one contender, with the problem's parameters."""
        module = self.case.fused() if fused else self.case.stock()
        module.to(self.device, self.precision.dtype).load_state_dict(self._stock.state_dict())
        if channels_last:
            module.to(memory_format=torch.channels_last)
        return module.train(self.case.kind != "forward")

    def batches(self, *, channels_last: bool = False) -> list[Batch]:
        """Return the batches that calls rotate over; results are checked on the first.

        All images and gradients are in the asked memory format before the clock starts.
        """
        if channels_last not in self._batches:
            wanted, size = ROTATED_BYTES, sum(t.nbytes for t in self._first if t is not None)
            if self.device.type == "cuda":
                cache = torch.cuda.get_device_properties(self.device).L2_cache_size
                wanted = ROTATED_CACHES * cache
            copies = min(MAX_COPIES, max(2, -(-wanted // size)))
            self._batches[channels_last] = [self._copy(i, channels_last) for i in range(copies)]
        return self._batches[channels_last]

    @functools.cached_property
    def references(self) -> tuple[Results, list[Results]]:
        """The results of the stock layers, by name: in float64, and in the measured dtype.

        The latter once for each way in which the stock layers compute: their sums run in another
        order in each layout, and on large batches one errs several times as much as the other.
        Where tf32 is allowed, operands rounded to it are a third way, whether or not the device's
        libraries make use of that. All compute from the same parameters and images, and drop the
        same elements in training.
        """
        ways = [(False, False), (True, False)] + [(False, True)] * self.precision.tf32
        measured = []
        kept: list[Tensor] = []
        for channels_last, rounded in ways:
            stock = self.module(channels_last=channels_last).to(self.precision.measured)
            if rounded:
                with_tf32_operands(stock)
            for layer in _leaves(stock):
                if isinstance(layer, nn.Dropout) and layer.training:
                    layer.register_forward_hook(lambda _layer, _args, out: kept.append(out != 0))
            batch = self.batches(channels_last=channels_last)[0].to(self.precision.measured)
            measured.append(self.results(make_call(self.case, stock), stock, batch))

        exact = self.module().double()
        for name, layer in list(exact.named_modules()):
            if isinstance(layer, nn.Dropout) and kept:
                exact.set_submodule(name, _Keep(kept[0], layer.p))
        batch = self._first.to(torch.float64)
        return self.results(make_call(self.case, exact), exact, batch), measured

    def results(self, call: Call, own: nn.Module, batch: Batch) -> Results:
        """Do the case's work once by a :func:`make_call`; return the results, by name."""
        case = self.case
        if case.input_grad:
            batch = batch._replace(input=batch.input.detach().requires_grad_())
        torch.manual_seed(SEED)  # of the dropout
        with torch.set_grad_enabled(case.kind != "forward"):
            results = [t.detach().clone() for t in call(batch)]  # graphs reuse their memory
        if case.kind == "training":
            grads = {f"grad {name}": p.grad.clone() for name, p in own.named_parameters()}
            return {"loss": results[0], **grads}
        names = ["output"]
        if case.kind == "gradients":
            names += ["grad input"] * case.input_grad
            names += [f"grad {name.removeprefix('0.')}" for name, _ in own.named_parameters()]
        return dict(zip(names, results, strict=True))

    def _draw_images(self) -> Tensor:
        """Images [N, C, H, W], for a training step without near ties."""
        if self.case.kind != "training" or self.precision.coarse:
            return self._random_images()
        if self._normalised:  # each image matters to all: only a whole batch can be chosen
            while True:
                images = self._random_images()
                if min(margin.min() for margin in self._margins(images)) >= self._margin:
                    return images
        chosen = self._random_images()[:0]
        while len(chosen) < self.batch:
            images = self._random_images()
            margins = [margin.flatten(1).amin(1) for margin in self._margins(images)]
            chosen = torch.cat([chosen, images[torch.stack(margins).amin(0) >= self._margin]])
        return chosen[: self.batch].contiguous()

    def _random_images(self) -> Tensor:
        images = torch.randn(self.batch, *self.case.image)
        if self.case.image[0] not in DATA_CHANNELS:
            images = images.abs()  # what the block before puts out is not negative
        return images.to(self.device, self.precision.dtype)

    @torch.no_grad()
    def _margins(self, images: Tensor) -> list[Tensor]:
        """Of each ReLU: how far its windows, or values without a pool, are from another choice."""
        layers = _leaves(copy.deepcopy(self._stock).double().train(self._normalised))
        margins = []
        values = images.double()
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            if isinstance(layer, nn.ReLU):
                pooled = isinstance(following, nn.MaxPool2d)
                margins.append(window_margins(values, following) if pooled else values.abs())
            values = layer(values)
        return margins

    def _copy(self, index: int, channels_last: bool) -> Batch:
        """The first batch with its images in another order: new memory, the same work."""

        def copy_of(tensor: Tensor) -> Tensor:
            last = channels_last and tensor.dim() == 4
            memory_format = torch.channels_last if last else torch.contiguous_format
            return tensor.roll(index, 0).contiguous(memory_format=memory_format)

        images, target = self._first
        images = copy_of(images).requires_grad_(self.case.input_grad)
        return Batch(images, None if target is None else copy_of(target))


def make_call(case: Case, module: nn.Module, own: nn.Module | None = None) -> Call:
    """Return the function that does a case's work on one batch: what is timed.

    ``own`` holds the parameters where ``module`` wraps another one, as compiled ones do.
    """
    own = own or module
    if case.kind == "forward":
        return lambda batch: (module(batch.input),)
    if case.kind == "gradients":
        parameters = list(own.parameters())

        def gradients(batch: Batch) -> tuple[Tensor, ...]:
            output = module(batch.input)
            wanted = [batch.input, *parameters] if case.input_grad else parameters
            return output, *torch.autograd.grad(output, wanted, batch.target)

        return gradients
    criterion, optimizer = nn.CrossEntropyLoss(), make_optimizer(own, fused=True)
    return lambda batch: (fusedcnn.train_step(module, criterion, optimizer, *batch),)


def make_optimizer(own: nn.Module, **how: bool) -> torch.optim.Optimizer:
    """Return the Adam of a training case.

    A learning rate of 0 does the same arithmetic and leaves the parameters where they are, so that
    all contenders time the same work however many steps each of them takes.
    """
    return torch.optim.Adam(own.parameters(), lr=0.0, **how)


def window_margins(values: Tensor, pool: nn.MaxPool2d) -> Tensor:
    """How far each window of a ReLU and the pool after it is from making another choice.

    For values [N, C, H, W] that ReLU sees, returns [N, C, pooled H, pooled W]: the distance of the
    largest one from 0, or from the second largest where that is nearer. A window that is off has no
    winner.
    """
    windows = values
    for dim, sizes in ((3, 1), (2, 0)):
        kernel, stride, padding, dilation = (
            size[sizes] if isinstance(size, tuple) else size
            for size in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        )
        span = dilation * (kernel - 1) + 1
        count = pool(values).shape[dim]
        after = (count - 1) * stride + span - padding - values.shape[dim]
        # F.pad counts dimensions from the last one; windows of the width are behind the height.
        pads = (padding, after) if dim == 3 else (0, 0, 0, 0, padding, after)
        windows = F.pad(windows, pads, value=-math.inf).unfold(dim, span, stride)[..., ::dilation]
    first, second = F.pad(windows.flatten(4), (0, 1), value=-math.inf).topk(2).values.unbind(-1)
    return torch.minimum(first.abs(), torch.where(first > 0, first - second, math.inf))


class _Keep(nn.Module):
    """Dropout that keeps given elements."""

    def __init__(self, kept: Tensor, p: float) -> None:
        super().__init__()
        self.kept, self.scale = kept, 1 / (1 - p)

    def forward(self, input: Tensor) -> Tensor:
        return input * self.kept * self.scale


def _leaves(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if not any(m.children())]
