"""Takes calls out of a module's forward, where they are functions or shared modules.

A module that forward calls in one place only is replaced by ``nn.Identity`` and forward stays as it
is. For ``F.relu`` and the like there is no module to replace: the instance gets a class derived
from its own, whose forward is the one that torch.fx has traced, less those calls.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from fusedcnn.tracing import Tracer, optional_parameters, shadow, surroundings

Removed = dict[bool, tuple[int, ...]]  # by training mode: indices of the calls to take out


class RewrittenForward:
    """First base of the derived classes; ``original_class`` is the class that they derive from."""

    original_class: type[nn.Module]
    _removed: Removed
    _code: dict[bool, str]
    _fixed: frozenset[str]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._fixed and getattr(self, name, value) is not value:
            raise RuntimeError(
                f"{name}: the forward of this {self.original_class.__name__} was rewritten by "
                "fusedcnn.fuse for the value that it had; call fusedcnn.unfuse before setting it"
            )
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The derived class has no name to be imported by: it is made again from these.
        arguments = (self.original_class, dict(self._removed), dict(self._code))
        state = self.__getstate__() if hasattr(self, "__getstate__") else vars(self)
        return _restore, arguments, state


def why_not_rewritable(module: nn.Module) -> str:
    """Why a module's forward cannot be rewritten; empty where it can."""
    if isinstance(module, fx.GraphModule):
        return "it is a GraphModule, whose class torch.fx has made"
    if isinstance(module, RewrittenForward):
        return "it has been rewritten before: call fusedcnn.unfuse first"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if optional_parameters(module):
        # `if mask is None:` is decided when torch.fx traces, not when forward runs.
        return f"its forward has optional arguments ({', '.join(optional_parameters(module))})"
    for training in (True, False):
        sources = set()
        for plain, inside in ((True, training), (False, training), (True, not training)):
            copied = shadow(module).train(training)
            for child in copied.children():
                child.train(inside)
            before = _values(copied)
            try:
                with surroundings(plain):
                    tracer = Tracer(None)
                    graph = tracer.trace(copied)
            except Exception as error:  # whatever a forward may raise that is run on symbols
                return f"torch.fx cannot follow its forward: {type(error).__name__}"
            if tracer.switched:
                return "its forward switches gradients, autocast or checkpointing on or off"
            if any(str(node.target).startswith("_tensor_constant") for node in graph.nodes):
                return "its forward makes tensors, which torch.fx would freeze"
            # Where forward makes tensors, torch.fx stores them here; that is the case above.
            if _values(copied) != before:
                return "its forward sets attributes"
            sources.add(graph.python_code("self").src)
        if len(sources) > 1:
            return "its forward depends on gradients or autocast, or on another module's mode"
    return ""


def _values(module: nn.Module) -> dict[str, Any]:
    """The identities of the attributes' values, and of what lists and dicts among them hold."""

    def identity(value: Any) -> Any:
        if isinstance(value, (list, tuple, set)):
            return id(value), tuple(map(id, value))
        if isinstance(value, dict):
            return id(value), tuple((k, id(v)) for k, v in value.items())
        return id(value)

    return {name: identity(value) for name, value in vars(module).items() if name != "training"}


def rewritten_class(module: nn.Module, removed: Removed) -> type[nn.Module]:
    """A class derived from the module's, whose forward leaves the removed calls out.

    Args:
        module: of a class that :func:`why_not_rewritable` has nothing against.
        removed: what each left-out call returns is its first argument.
    """
    cls = type(module)
    forwards: dict[bool, Callable] = {}
    code: dict[bool, str] = {}
    guarded: set[str] = set()
    for training in (True, False):
        copied = shadow(module).train(training)
        with surroundings(plain=True):
            graph = Tracer(None).trace(copied)
        runs_modules = set().union(
            *(node.meta["methods"] for node in graph.nodes if node.op == "call_module")
        )
        for node in list(graph.nodes):
            call = node.meta.get("call")
            if call is not None and call[1] in removed.get(training, ()):
                within = node.meta["methods_within"] & runs_modules
                guarded |= {name for path, name in within if path == ""}
                node.replace_all_uses_with(node.args[0] if node.args else node.kwargs["input"])
                graph.erase_node(node)
        traced = fx.GraphModule(copied, graph)
        forwards[training], code[training] = type(traced).forward, traced.code
    fixed = _values_read(module)
    names = list(inspect.signature(module.forward).parameters)

    def forward(self, *args, **kwargs):
        for i, value in enumerate((*args, *kwargs.values())):
            if value is None:
                name = names[i] if i < len(args) else list(kwargs)[i - len(args)]
                raise TypeError(
                    f"{name}: expected a Tensor, got None; fusedcnn.fuse has rewritten this "
                    "forward for tensors, and fusedcnn.unfuse undoes it"
                )
        return forwards[self.training](self, *args, **kwargs)

    forward.__doc__ = cls.forward.__doc__
    forward.__wrapped__ = forwards[True]  # its signature, for torch.fx and torch.export
    return type(
        f"Fused{cls.__name__}",
        (RewrittenForward, cls),
        {name: _guard(cls, name) for name in guarded}
        | {
            "__doc__": f"{cls.__name__}, its forward rewritten by fusedcnn.fuse.",
            "__module__": __name__,
            "original_class": cls,
            "forward": forward,
            "_removed": removed,
            "_code": code,
            "_fixed": fixed,
        },
    )


def _guard(cls: type[nn.Module], name: str) -> Callable:
    """What stands for a method from which forward ran both modules and the removed calls."""

    @functools.wraps(getattr(cls, name))
    def method(self, *args, **kwargs):
        raise RuntimeError(
            f"{name}: expected to be called by forward only, as fusedcnn.fuse has replaced layers "
            f"that it runs and rewritten forward without it; call fusedcnn.unfuse before "
            f"{cls.__name__}.{name}"
        )

    return method


def _values_read(module: nn.Module) -> frozenset[str]:
    """The attributes that forward reads and torch.fx has frozen: neither tensors nor modules."""
    read: set[str] = set()

    class Recording(type(module)):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    for training in (True, False):
        copied = shadow(module).train(training)
        object.__setattr__(copied, "__class__", Recording)
        with surroundings(plain=True):
            Tracer(None).trace(copied)
    absent = object()

    def frozen(name: str) -> bool:
        if name in vars(module):
            return not isinstance(vars(module)[name], (Tensor, nn.Module))
        value = inspect.getattr_static(type(module), name, absent)  # a default in the class
        return not (value is absent or callable(value) or hasattr(type(value), "__get__"))

    own = nn.Module()
    return frozenset(name for name in read if not hasattr(own, name) and frozen(name))


class _Pending:
    """Stands for a module until pickle or copy has filled in its attributes."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        removed, code = vars(self).pop("_recipe")
        original = type(self).__bases__[1]
        self.__class__ = original
        setter = getattr(self, "__setstate__", None)
        if setter is not None:
            setter(state)
        else:
            vars(self).update(state)
        cls = rewritten_class(self, removed)
        if cls._code != code:
            raise RuntimeError(
                f"{original.__name__}: expected the forward that fusedcnn.fuse has rewritten, got "
                "another: load the state_dict into a model and fuse that"
            )
        self.__class__ = cls


def _restore(cls: type[nn.Module], removed: Removed, code: dict[bool, str]) -> nn.Module:
    pending = type(cls.__name__, (_Pending, cls), {})
    module = pending.__new__(pending)
    vars(module)["_recipe"] = (removed, code)
    return module
