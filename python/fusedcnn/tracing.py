"""Follows a forward by torch.fx, on a copy, and notes who makes each call and what is around it."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

_AUTOCAST_DEVICES = ("cpu", "cuda")

Method = tuple[str, str]  # a module's path, and the name of a method of its class

# Leaves of the trace even where a user has derived from them: what the derived class computes is
# its own, so that it is named as a reason instead of being looked into.
LEAVES = (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.MaxPool2d)


def share_tensors(model: nn.Module) -> dict[int, Any]:
    """A memo that makes :func:`copy.deepcopy` share all tensors that modules hold."""
    tensors = [*model.parameters(), *model.buffers()]
    # Pruning and the older weight_norm keep computed tensors, which cannot be copied.
    tensors += [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor)]
    return {id(t): t for t in tensors}


def copy_sharing(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of the modules that shares their tensors, and what else ``memo`` names.

    Raises:
        TypeError: it cannot be copied.
    """
    try:
        return copy.deepcopy(model, share_tensors(model) | (memo or {}))
    except Exception as error:  # whatever an attribute may raise that is copied
        raise TypeError(
            f"model: expected one that copy.deepcopy can copy, got {type(model).__name__}, which "
            f"raises {type(error).__name__}: {error}"
        ) from error


def shadow(model: nn.Module) -> nn.Module:
    """A copy to be traced: the same tensors, no hooks, and side effects that stay in it.

    Layers that may be replaced are reached as children alone: where a forward calls one that it
    holds otherwise, in a list say, torch.fx finds it installed nowhere, and cannot follow.
    """
    tables = [
        table
        for module in model.modules()
        for name, table in vars(module).items()
        if name.endswith("_hooks") and isinstance(table, dict)
    ]
    copied = copy_sharing(model, {id(table): type(table)() for table in tables})
    layers = {id(m): copy.copy(m) for m in copied.modules() if type(m) in LEAVES}
    for module in copied.modules():
        for name, child in module._modules.items():
            module._modules[name] = layers.get(id(child), child)
    return copied


def _modes() -> tuple[Any, ...]:
    """What contexts decide around a call, and a graph of torch.fx does not hold."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # checkpointing sets them
    autocast = [
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in _AUTOCAST_DEVICES
    ]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), hooks is None, *autocast


@contextlib.contextmanager
def surroundings(plain: bool) -> Iterator[None]:
    """Modes to trace in: gradients and no autocast, or else autocast and no gradients.

    A forward that sets one of them by itself shows in one of the two. Random numbers that it draws
    are not missed afterwards.
    """
    before = [torch.is_autocast_enabled(device) for device in _AUTOCAST_DEVICES]
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.set_grad_enabled(plain),
    ):
        try:
            for device in _AUTOCAST_DEVICES:
                torch.set_autocast_enabled(device, not plain)
            yield
        finally:
            for device, enabled in zip(_AUTOCAST_DEVICES, before, strict=True):
                torch.set_autocast_enabled(device, enabled)
            torch.clear_autocast_cache()


class Tracer(fx.Tracer):
    """A tracer that notes of each call who makes it, its number there, and what is around it.

    That is the modes, and the methods that are running.

    ``switched`` says whether a call was made in other modes than the tracer.

    Args:
        opaque: paths of modules whose forward is not entered; None enters no child at all. A
            call has the same index in both cases.
        root: the path of the module that is traced; all paths noted are the whole model's.
    """

    proxy_buffer_attributes = True  # an in-place update while tracing must not reach a buffer

    def __init__(self, opaque: set[str] | None, root: str = "") -> None:
        super().__init__()
        self.opaque = opaque
        self.path = root
        self.callers: list[str] = [root]
        self.made: Counter[str] = Counter()
        self.module_calls: dict[str, set[tuple[str, int]]] = {}  # by module: caller, index
        self.calls: Counter[str] = Counter({root: 1})
        self.methods: set[Method] = set()  # that ran
        self._next: tuple[str, int] = ("", 0)
        self._modes = _modes()
        self.switched = False
        self._symbols: dict[fx.Node, list[weakref.ref]] = {}

    def proxy(self, node):
        """The symbol of a node, remembered as long as anything holds it."""
        symbol = super().proxy(node)
        self._symbols.setdefault(node, []).append(weakref.ref(symbol))
        return symbol

    def keeps(self, node: fx.Node) -> bool:
        """Whether forward has put a node's value somewhere: in an attribute, a list outside."""
        kept = any(symbol() is not None for symbol in self._symbols[node])
        if kept:
            gc.collect()  # cycles keep nothing for anybody
        return kept and any(symbol() is not None for symbol in self._symbols[node])

    def whole(self, path: str) -> str:
        """A path in the traced module as one in the whole model."""
        return ".".join(part for part in (self.path, path) if part)

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        """Whether the call is one node, not entered."""
        if self.opaque is None or self.whole(path) in self.opaque or isinstance(module, LEAVES):
            return True
        return super().is_leaf_module(module, path)

    def _count(self) -> tuple[str, int]:
        caller = self.callers[-1]
        self.made[caller] += 1
        return caller, self.made[caller] - 1

    def call_module(self, m, forward, args, kwargs):
        """Enter or record a call, with its place."""
        path = self.whole(self.path_of_module(m))
        self._next = self._count()
        self.module_calls.setdefault(path, set()).add(self._next)
        self.calls[path] += 1
        self.callers.append(path)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.callers.pop()

    def _methods(self) -> tuple[set[Method], set[Method]]:
        """The methods of the model's modules that are running, forwards left out.

        Also those among them that run within the innermost forward, which calls them as methods.
        """
        running: set[Method] = set()
        within: set[Method] = set()
        frame = sys._getframe(2)
        while frame is not None and frame.f_code is not fx.Tracer.trace.__code__:
            code, name = frame.f_code, frame.f_code.co_name
            owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            path = self.submodule_paths.get(owner) if isinstance(owner, nn.Module) else None
            path = path if path is None else self.whole(path)
            if name == "forward":
                if path == self.callers[-1]:
                    within |= running
            elif path is not None:
                function = inspect.unwrap(getattr(type(owner), name, None))
                own = getattr(function, "__code__", None) is code
                if own and not function.__module__.startswith("torch."):
                    running.add((path, name))
            frame = frame.f_back
        return running, within

    def create_node(self, kind, target, args, kwargs, name=None, type_expr=None):
        """Record a node, with its place."""
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind == "call_module":
            node.meta["call"], node.meta["callers"] = self._next, tuple(self.callers[:-1])
        elif kind in ("call_function", "call_method"):
            node.meta["call"], node.meta["callers"] = self._count(), tuple(self.callers)
        if kind in ("call_module", "call_function", "call_method"):
            node.meta["methods"], node.meta["methods_within"] = self._methods()
            self.methods |= node.meta["methods"]
            node.meta["modes"] = _modes()
            self.switched |= node.meta["modes"] != self._modes
        return node


def optional_parameters(module: nn.Module) -> dict[str, Any]:
    """Parameters of ``forward`` that have defaults, and * and **."""
    signature = inspect.signature(module.forward)
    return {
        name: p.default
        for name, p in signature.parameters.items()
        if p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


def trace(
    module: nn.Module, opaque: set[str] | None, root: str, defaults: bool
) -> tuple[Tracer, fx.Graph]:
    """Run a module on symbols, in its mode; ``defaults``: with its optional parameters as set."""
    concrete = None
    if defaults:
        concrete = {
            name: value
            for name, value in optional_parameters(module).items()
            if value is not inspect.Parameter.empty
        }
    with surroundings(plain=module.training):  # each mode once: both are traced
        tracer = Tracer(opaque, root)
        return tracer, tracer.trace(module, concrete)
