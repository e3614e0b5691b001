"""Methods that forward does not call: those that may run fused layers warn when they are called."""

from __future__ import annotations

import ast
import inspect
import types
import warnings
from typing import Any

from torch import nn

from fusedcnn.parts import is_torchs, source_of

_WALKS = frozenset({"children", "modules", "named_children", "named_modules", "_modules"})


class NotedMethod:
    """Stands on an instance for a method of its class, and warns of what it may compute."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method, with a warning."""
        cls = type(self.module)
        warnings.warn(
            f"{cls.__name__}.{self.name} runs layers that fusedcnn.fuse has replaced, and forward "
            "does not call it: what it computes between them is not what it was; call "
            "fusedcnn.unfuse first",
            stacklevel=2,
        )
        return getattr(cls, self.name)(self.module, *args, **kwargs)


def methods_that_run(module: nn.Module, layers: set[int]) -> set[str]:
    """The methods of a module's class, as far as it is not torch's, that may run the layers.

    Args:
        module: read by its source; a method without source is none.
        layers: ids of modules.
    """
    holders = {
        name: child
        for name, child in module._modules.items()
        if child is not None and not layers.isdisjoint(map(id, child.modules()))
    }
    found = set()
    for name in dir(type(module)) if holders else ():
        method = inspect.getattr_static(type(module), name)
        own = isinstance(method, types.FunctionType) and name != "forward" and name[:2] != "__"
        if own and not is_torchs(method):
            tree = source_of(method)
            if tree is not None and _runs(tree, holders, layers):
                found.add(name)
    return found


def _runs(tree: ast.stmt, holders: dict[str, nn.Module], layers: set[int]) -> bool:
    """Whether a function calls one of the layers, or takes apart what holds some and calls that."""
    nodes = list(ast.walk(tree))
    attributes = [n for n in nodes if isinstance(n, ast.Attribute)]
    local = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    given = {n.arg for n in nodes if isinstance(n, ast.arg)}
    called = [n for n in nodes if isinstance(n, ast.Call)]
    whole = {
        id(n.func)
        for n in called
        if isinstance(n.func, ast.Attribute) and id(holders.get(n.func.attr)) not in layers
    }
    taken = [
        n for n in attributes if n.attr in _WALKS or (n.attr in holders and id(n) not in whole)
    ]
    functions = {id(n.func) for n in called}
    if any(id(n) in functions and n.attr in holders for n in taken):
        return True  # self.conv(images)
    calls_what_it_took = any(
        isinstance(n.func, ast.Subscript) or (isinstance(n.func, ast.Name) and n.func.id in local)
        for n in called
    )
    hands_on = any(
        any(argument in taken for argument in n.args)
        and any(isinstance(a, ast.Name) and a.id in given for a in n.args)
        for n in called
    )
    return bool(taken) and (calls_what_it_took or hands_on)
