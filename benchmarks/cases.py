"""What is timed: single blocks and the whole SimpleCNN, with inputs and references.

A :class:`Case` names the work, a :class:`Problem` is a case at one batch size, dtype and device:
the parameters, the batches, and the results that every contender must reproduce.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import fusedcnn
import torch
from blocks import SIMPLECNN_1, SIMPLECNN_2, Block
from precision import Precision, with_tf32_operands
from torch import Tensor, nn

SEED = 0

# One batch of 64 images fits in a core's second-level cache, and timing it over and over would
# flatter everybody: real batches come from memory. So calls rotate over copies whose sum is larger
# than the 1 to 4 MiB that a core has to itself, and large enough to disturb a shared last level. On
# a GPU: twice its second-level cache. Small batches there stay in it all the same.
ROTATED_BYTES = 32 * 2**20
ROTATED_CACHES = 2
MAX_COPIES = 64

# A pool window whose two largest values nearly tie, or a value that ReLU sees within rounding
# distance of 0, sends its gradient one way or another by the luck of the last bit, in the stock
# layers as in the fused ones. Images with such a window are not drawn, so that the results of the
# gradient cases are comparable. float32 results of this size err by about 8 epsilons.
DECISION_MARGIN = 128 * torch.finfo(torch.float32).eps

Kind = Literal["forward", "gradients", "training"]


LINEAR = 2 * (2048 * 128 + 128 * 10)

# Elements per image: images, activations after block 1 and 2, hidden layer, logits.
IMAGE, POOLED1, POOLED2, HIDDEN, LOGITS = 3 * 32 * 32, 16 * 16 * 16, 32 * 8 * 8, 128, 10
PARAMETERS = sum(p.numel() for p in fusedcnn.SimpleCNN().parameters())


@dataclass(frozen=True)
class Case:
    """One row group of the benchmark.

    Attributes:
        name: on the command line and in the JSON.
        title: for people.
        stock: makes the module from stock layers.
        fused: makes the fused module, with the same state_dict keys.
        image: (C, H, W) of the input.
        kind: ``"forward"`` under no_grad; ``"gradients"``: forward and backward with a given
            gradient of the output; ``"training"``: zero_grad, forward, loss, backward, Adam step.
        input_grad: ``"gradients"`` computes the input's gradient too.
        flops: per image, of the direct convolutions and full gradients: what the stock layers do.
        elements: per image, what each pass must at least read and write once: inputs and results,
            without parameters. The input of a backward pass counts again: a batch later it has left
            the cache.
        elements_per_call: the same for what does not grow with the batch.
        clear_images: draw images that no rounding can turn to another choice (DECISION_MARGIN);
            for ReLUs and 2x2 pools with stride 2, on images small enough to find some.
    """

    name: str
    title: str
    stock: Callable[[], nn.Module]
    fused: Callable[[], nn.Module]
    image: tuple[int, int, int]
    kind: Kind
    input_grad: bool
    flops: int
    elements: int
    elements_per_call: int = 0
    clear_images: bool = True


def block_case(
    block: Block, kind: Kind, *, name: str, title: str, input_grad: bool = False, **kwargs: bool
) -> Case:
    """Return the case of one block: its forward, or its forward and backward.

    Args:
        block: what to compute.
        kind: ``"forward"`` or ``"gradients"``.
        name: see :class:`Case`, like all that follow.
        title: see there.
        input_grad: see there.
        kwargs: see there.
    """
    image, output = math.prod(block.image), math.prod(block.output)
    elements = image + output
    if kind == "gradients":
        elements += image + output + input_grad * image
    passes = 1 if kind == "forward" else 2 + input_grad
    return Case(
        name=name,
        title=title,
        stock=block.stock,
        fused=block.fused,
        image=block.image,
        kind=kind,
        input_grad=input_grad,
        flops=passes * block.flops,
        elements=elements,
        **kwargs,
    )


CASES = (
    block_case(
        SIMPLECNN_1, "forward", name="block1-forward", title="block 1 (3->16, 32x32), forward"
    ),
    block_case(  # the first layer's input is data
        SIMPLECNN_1,
        "gradients",
        name="block1-backward",
        title="block 1 (3->16, 32x32), forward+backward, gradients of weight and bias",
    ),
    block_case(
        SIMPLECNN_2, "forward", name="block2-forward", title="block 2 (16->32, 16x16), forward"
    ),
    block_case(
        SIMPLECNN_2,
        "gradients",
        name="block2-backward",
        title="block 2 (16->32, 16x16), forward+backward, all three gradients",
        input_grad=True,
    ),
    Case(
        name="inference",
        title="SimpleCNN, inference",
        stock=fusedcnn.SimpleCNN,
        fused=fusedcnn.FusedSimpleCNN,
        image=(3, 32, 32),
        kind="forward",
        input_grad=False,
        flops=SIMPLECNN_1.flops + SIMPLECNN_2.flops + LINEAR,
        elements=IMAGE + 2 * (POOLED1 + POOLED2 + HIDDEN) + LOGITS,
    ),
    Case(
        name="training",
        title="SimpleCNN, training step (Adam)",
        stock=fusedcnn.SimpleCNN,
        fused=fusedcnn.FusedSimpleCNN,
        image=(3, 32, 32),
        kind="training",
        input_grad=False,
        flops=2 * SIMPLECNN_1.flops + 3 * (SIMPLECNN_2.flops + LINEAR),
        elements=2 * IMAGE + 5 * (POOLED1 + POOLED2 + HIDDEN) + 3 * LOGITS,
        # Adam reads parameter, gradient and two moments, and writes all but the gradient.
        elements_per_call=7 * PARAMETERS,
    ),
)


class Batch(NamedTuple):
    """One batch: ``target`` is the output's gradient, the labels, or None, by the case's kind."""

    input: Tensor
    target: Tensor | None


class Problem:
    """A case at one batch size, dtype and device.

    Args:
        case: what to compute.
        batch_size: images per call.
        precision: of parameters and images.
        device: where.
    """

    def __init__(
        self, case: Case, batch_size: int, precision: Precision, device: torch.device
    ) -> None:
        self.case = case
        self.batch_size = batch_size
        self.precision = precision
        self.dtype = dtype = precision.dtype
        self.device = device
        torch.manual_seed(SEED)
        self._stock = case.stock().to(device, dtype)
        self._batches: dict[bool, list[Batch]] = {}

        images = self._draw_images()
        target = None
        if case.kind == "gradients":
            with torch.no_grad():
                output = self._stock(images)
                # Drawn in float32 like everything, so that each dtype's values fit the wider ones.
                target = torch.randn(output.shape).to(device, dtype)
        elif case.kind == "training":
            target = torch.randint(10, (batch_size,), device=device)
        self._first = Batch(images, target)

    def module(self, *, fused: bool, channels_last: bool = False) -> nn.Module:
        """Return a module of its own for one contender, with the problem's parameters."""
        module = self.case.fused() if fused else self.case.stock()
        module.to(self.device, self.dtype).load_state_dict(self._stock.state_dict())
        if channels_last:
            module.to(memory_format=torch.channels_last)
        return module.train(self.case.kind == "training")

    def batches(self, *, channels_last: bool) -> list[Batch]:
        """Return the batches that calls rotate over; results are checked on the first.

        All images and gradients are in the asked memory format before the clock starts.
        """
        if channels_last not in self._batches:
            size = sum(t.nbytes for t in self._first if t is not None)
            copies = min(MAX_COPIES, max(2, -(-_rotated_bytes(self.device) // size)))
            self._batches[channels_last] = [self._copy(i, channels_last) for i in range(copies)]
        return self._batches[channels_last]

    def references(self) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """Return the results of the stock layers, by name: in float64, and in the problem's dtype.

        The latter twice, contiguous and channels_last, and in float32 where the problem's dtype is
        float64: there is nothing more exact to measure float64's error with. Where tf32 is allowed,
        a third time with operands rounded to it, whether or not the device's libraries make use of
        that. All compute from the same parameters and images, and in a training step all drop the
        same elements.
        """
        measured = torch.float32 if self.dtype == torch.float64 else self.dtype
        stock_results = []
        kept: list[Tensor] = []
        ways = [(False, False), (True, False)] + [(False, True)] * self.precision.tf32
        for channels_last, rounded in ways:
            stock = self.module(fused=False, channels_last=channels_last).to(measured)
            if rounded:
                with_tf32_operands(stock)
            for layer in _leaves(stock):
                if isinstance(layer, nn.Dropout) and layer.training:
                    layer.register_forward_hook(lambda _layer, _args, out: kept.append(out != 0))
            batch = self.batches(channels_last=channels_last)[0]
            batch = _in_dtype(batch, measured)
            stock_results.append(run_checked(self.case, stock, stock, batch))

        exact = self.module(fused=False).double()
        for name, layer in list(exact.named_modules()):
            if isinstance(layer, nn.Dropout) and kept:
                exact.set_submodule(name, _Keep(kept[0], layer.p))
        first = _in_dtype(self._first, torch.float64)
        return run_checked(self.case, exact, exact, first), stock_results

    def _draw_images(self) -> Tensor:
        """Images [N, C, H, W], where the case asks for it without near ties (DECISION_MARGIN)."""
        if not self.case.clear_images:
            return self._random_images()
        exact = copy.deepcopy(self._stock).double().eval()
        # The rounding of half types and of tf32 is coarser than any margin that images could keep.
        coarse = torch.finfo(self.dtype).bits < 32 or self.precision.tf32
        margin = 0.0 if coarse else DECISION_MARGIN
        chosen = torch.empty(0, *self.case.image, device=self.device, dtype=self.dtype)
        while len(chosen) < self.batch_size:
            images = self._random_images()
            clear = _decision_margin(exact, images.double()) >= margin
            chosen = torch.cat([chosen, images[clear]])
        return chosen[: self.batch_size].contiguous()

    def _random_images(self) -> Tensor:
        images = torch.randn(self.batch_size, *self.case.image)
        if self.case.image[0] not in (1, 3):
            images = images.abs()  # what the block before puts out is not negative
        return images.to(self.device, self.dtype)

    def _copy(self, index: int, channels_last: bool) -> Batch:
        """The first batch with its images in another order: new memory, the same work."""

        def copy_of(tensor: Tensor) -> Tensor:
            rolled = tensor.roll(index, 0)
            if channels_last and rolled.dim() == 4:
                return rolled.contiguous(memory_format=torch.channels_last)
            return rolled

        images, target = self._first
        return Batch(
            copy_of(images).requires_grad_(self.case.input_grad),
            None if target is None else copy_of(target),
        )


def make_call(case: Case, module: nn.Module, own: nn.Module) -> Callable[[Batch], tuple]:
    """Return the function that does a case's work on one batch: what is timed.

    Args:
        case: decides what is done.
        module: called.
        own: holds the parameters; ``module`` itself, or what a compiled ``module`` wraps.
    """
    if case.kind == "forward":
        return lambda batch: (module(batch.input),)
    parameters = list(own.parameters())
    if case.kind == "gradients":

        def gradients(batch: Batch) -> tuple:
            output = module(batch.input)
            wanted = [batch.input, *parameters] if case.input_grad else parameters
            return output, *torch.autograd.grad(output, wanted, batch.target)

        return gradients
    criterion = nn.CrossEntropyLoss()
    optimizer = make_optimizer(own)

    def training(batch: Batch) -> tuple:
        loss = fusedcnn.train_step(module, criterion, optimizer, batch.input, batch.target)
        return (loss,)

    return training


def make_optimizer(own: nn.Module, *, capturable: bool = False) -> torch.optim.Optimizer:
    """Return the optimizer of a training case.

    Args:
        own: see :func:`make_call`.
        capturable: for recording in a CUDA graph.
    """
    # A learning rate of 0 does the same arithmetic and leaves the parameters where they are, so
    # that all contenders time the same work however many steps each of them takes.
    return torch.optim.Adam(own.parameters(), lr=0.0, fused=True, capturable=capturable)


def run_checked(
    case: Case,
    module: nn.Module,
    own: nn.Module,
    batch: Batch,
    call: Callable[[Batch], tuple] | None = None,
) -> dict[str, Tensor]:
    """Do a case's work once and return its results by name.

    Args:
        case: decides what is done.
        module: see :func:`make_call`.
        own: see :func:`make_call`.
        batch: what to compute from.
        call: what :func:`make_call` returned, where there is one already.
    """
    call = call or make_call(case, module, own)
    if case.input_grad:
        batch = batch._replace(input=batch.input.detach().requires_grad_())
    torch.manual_seed(SEED)  # of the dropout
    with torch.set_grad_enabled(case.kind != "forward"):
        results = [t.detach().clone() for t in call(batch)]  # graphs reuse their memory
    if case.kind == "training":
        grads = {f"grad {n}": p.grad.clone() for n, p in own.named_parameters()}
        return {"loss": results[0], **grads}
    names = ["output"]
    if case.kind == "gradients":
        names += ["grad input"] * case.input_grad + [f"grad {n}" for n, _ in own.named_parameters()]
    return dict(zip(names, results, strict=True))


def _rotated_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return ROTATED_BYTES
    return ROTATED_CACHES * torch.cuda.get_device_properties(device).L2_cache_size


def _in_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    images, target = batch
    if target is not None and target.is_floating_point():  # labels are not
        target = target.to(dtype)
    return Batch(images.to(dtype), target)


class _Keep(nn.Module):
    """Dropout that keeps given elements."""

    def __init__(self, kept: Tensor, p: float) -> None:
        super().__init__()
        self.kept, self.scale = kept, 1 / (1 - p)

    def forward(self, input: Tensor) -> Tensor:
        return input * self.kept * self.scale


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    return (m for m in module.modules() if not any(m.children()))


@torch.no_grad()
def _decision_margin(stock: nn.Module, images: Tensor) -> Tensor:
    """[N]: how far each image is from changing any choice of a ReLU or a 2x2 pool."""
    layers = list(_leaves(stock))
    margin = images.new_full((len(images),), torch.inf)
    values = images
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, nn.ReLU):
            distance = values.abs()
            if isinstance(following, nn.MaxPool2d):
                windows = values.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
                first, second = windows.topk(2).values.unbind(-1)
                # Only the winner passes ReLU's choice on, and a window that is off has no winner.
                lead = torch.where(first > 0, first - second, torch.inf)
                distance = torch.minimum(first.abs(), lead)
            margin = torch.minimum(margin, distance.flatten(1).amin(1))
        values = layer(values)
    return margin
