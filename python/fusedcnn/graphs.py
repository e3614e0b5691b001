"""A training step recorded as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusedcnn.training import check_step, train_step

# Eager steps before a recording: what is initialised lazily (the optimizer's state, cuDNN's
# choices) allocates and synchronises, which a graph cannot record. torch's own recipe takes three;
# for further shapes only what depends on the shape is left.
_WARM_UP_STEPS = 3
_WARM_UP_STEPS_OF_FURTHER_SHAPES = 1


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Tensor  # what replays read
    labels: Tensor
    loss: Tensor  # what they write


class GraphedTrainStep:
    """:func:`fusedcnn.train_step` as a CUDA graph: one launch for the whole step.

    For small batches, where launching the kernels one by one takes longer than running them.
    Called like :func:`fusedcnn.train_step`, once the three that do not change are given::

        step = fusedcnn.GraphedTrainStep(model, criterion, optimizer)
        for inputs, labels in loader:
            loss = step(inputs, labels)

    Equivalent to::

        loss = fusedcnn.train_step(model, criterion, optimizer, inputs, labels)

    On a CUDA device the first three calls run eagerly on a side stream, the next one records the
    graph, and from then on a call copies the batch into the graph's own buffers and replays it.
    Every call is one step, whichever way it runs. Tensors of another shape, dtype or layout, or a
    model in another mode (train or eval), get a graph of their own after one eager step. On other
    devices every call is ``train_step``.

    A graph repeats what was recorded. Learning rates that a scheduler changes must therefore be
    tensors (``lr=torch.tensor(1e-3, device="cuda")``); hooks and other Python code in the model do
    not run at a replay; and adding parameters, or replacing them, needs a new object.

    Args:
        model: all parameters on one device.
        criterion: maps (outputs, labels) to a 0-d loss; without host synchronisation.
        optimizer: over the model's parameters. On CUDA it must be capturable: constructed with
            ``capturable=True`` where it has that option (Adam, AdamW, RMSprop, ...).

    Raises:
        TypeError: model is no module, or what :func:`fusedcnn.train_step` refuses.
        ValueError: the optimizer has a ``capturable`` option that is off, on CUDA; or the model has
            no parameters, or has them on more than one device.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Tensor, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        check_step(model, criterion, optimizer)
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1:
            found = ", ".join(sorted(map(str, devices))) or "none"
            raise ValueError(f"model: expected parameters on one device, got {found}")
        self.model = model
        self.criterion = criterion
        self.optimizer = optimizer
        self.device = devices.pop()
        self._recordings: dict[tuple, _Recording] = {}
        self._eager_steps: dict[tuple, int] = {}
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            _check_capturable(optimizer)

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Run one step.

        Args:
            inputs: one batch, such as [N, 3, 32, 32]; on any device.
            labels: what the criterion takes, such as int64 [N]; on any device.

        Returns:
            The loss before the step, detached, 0-d, on the model's device; on CUDA a copy, which
            the next step does not overwrite.

        Raises:
            TypeError: the criterion's result is no tensor.
            RuntimeError: what :func:`fusedcnn.train_step` refuses. No parameter has changed then.
        """
        if self.device.type != "cuda":
            return train_step(self.model, self.criterion, self.optimizer, inputs, labels)
        key = (
            *(field for t in (inputs, labels) for field in (t.shape, t.stride(), t.dtype)),
            # The mode of every module: dropout and batch norm are recorded as they are.
            tuple(module.training for module in self.model.modules()),
        )
        with torch.cuda.device(self.device):
            recording = self._recordings.get(key)
            if recording is None:
                steps = self._eager_steps.get(key, 0)
                first = not self._recordings
                if steps < (_WARM_UP_STEPS if first else _WARM_UP_STEPS_OF_FURTHER_SHAPES):
                    loss = self._eager(inputs, labels)
                    self._eager_steps[key] = steps + 1
                    return loss
                recording = self._recordings[key] = self._record(inputs, labels)
            recording.inputs.copy_(inputs, non_blocking=True)
            recording.labels.copy_(labels, non_blocking=True)
            recording.graph.replay()
            return recording.loss.clone()

    def _eager(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """One step on a side stream, as a recording would run."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            inputs = inputs.to(self.device)
            labels = labels.to(self.device)
            loss = train_step(self.model, self.criterion, self.optimizer, inputs, labels)
        current.wait_stream(self._stream)
        for tensor in (inputs, labels, loss):  # the other stream's memory, used here
            tensor.record_stream(current)
        return loss

    def _record(self, inputs: Tensor, labels: Tensor) -> _Recording:
        _check_capturable(self.optimizer)
        # In the memory format given, but dense: elements of an expanded tensor share memory.
        buffers = [torch.empty_like(t, device=self.device) for t in (inputs, labels)]
        for buffer, tensor in zip(buffers, (inputs, labels), strict=True):
            buffer.copy_(tensor)
        # The last eager step's gradients live outside the graph's memory: it allocates its own.
        self.optimizer.zero_grad(set_to_none=True)
        # Graphs of one object never run at the same time, so they share memory.
        pool = next((r.graph.pool() for r in self._recordings.values()), None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            loss = train_step(self.model, self.criterion, self.optimizer, *buffers)
        return _Recording(graph, *buffers, loss)


def _check_capturable(optimizer: torch.optim.Optimizer) -> None:
    for number, group in enumerate(optimizer.param_groups):
        if group.get("capturable") is False:
            raise ValueError(
                f"optimizer: expected capturable=True, got a {type(optimizer).__name__} whose "
                f"parameter group {number} has capturable=False; construct it with "
                "capturable=True"
            )
