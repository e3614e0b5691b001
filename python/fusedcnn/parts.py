"""Reads in a forward's source which of its modules it may use in parts.

For forwards that torch.fx cannot follow. What the source does not show counts as use in parts.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

# What of nn.Module and object gives no module.
_HARMLESS = frozenset(
    {
        *("training", "forward", "parameters", "named_parameters", "buffers", "named_buffers"),
        *("get_parameter", "get_buffer", "register_buffer", "register_parameter", "__class__"),
    }
)
_LOOKING = frozenset({"super", "isinstance", "len", "type", "id"})  # only look at their arguments
_OPAQUE = frozenset({"eval", "exec", "vars", "locals", "globals"})  # reach what no name shows
_PLAIN = (
    *(Tensor, str, bytes, int, float, complex, type(None), type, slice, range),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)


class _UnknownError(Exception):
    """Any of the module's children may be used in parts."""


def used_in_parts(module: nn.Module) -> dict[str, str]:
    """Which children a module's forward may use otherwise than by calling them, and why.

    Read are ``forward``, the methods and properties whose names it mentions, and so on. Only
    ``self.child(...)`` shows a whole call; an attribute of a child that holds no module, such as
    ``self.child.out_channels``, shows no use. The forwards of torch's own classes, ``DataParallel``
    say, call what they hold.
    """
    try:
        if isinstance(module, fx.GraphModule):
            raise _UnknownError("it is a GraphModule")
        if is_torchs(type(module)):
            return {}
        if "forward" in vars(module):
            raise _UnknownError("its forward was replaced on the instance")
        return {
            name: how
            for function, me, tree in _functions(type(module))
            for name, how in _used_by(module, function, me, tree)
        }
    except (_UnknownError, ValueError) as why:  # ValueError: an empty cell of a closure
        return dict.fromkeys(module._modules, str(why))


def is_torchs(value: type | types.FunctionType) -> bool:
    """Whether a class or function is torch's own."""
    return (value.__module__ or "").partition(".")[0] == "torch"


def source_of(function: types.FunctionType) -> ast.stmt | None:
    """A function's source; None where it cannot be read."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None


def _functions(cls: type) -> Iterator[tuple[types.FunctionType, str, ast.FunctionDef]]:
    """All that forward mentions, in all bases but torch's: function, name of self, source."""
    wanted = ["__call__", "__getattribute__", "forward"]
    for name in wanted:  # grows
        for base in cls.__mro__:
            value = vars(base).get(name)
            function = getattr(value, "fget", getattr(value, "__func__", value))
            if is_torchs(base) or not isinstance(function, types.FunctionType):
                continue
            tree = source_of(function)
            if tree is None:
                raise _UnknownError(f"the source of its {name} cannot be read")
            if not isinstance(tree, ast.FunctionDef):
                raise _UnknownError(f"its {name} is no def")
            for decorator in map(ast.unparse, tree.decorator_list):
                known = decorator in ("property", "staticmethod", "classmethod")
                if not (known or decorator.startswith("torch.")):
                    raise _UnknownError(f"its {name} is decorated by {decorator}")
            arguments = [] if isinstance(value, staticmethod) else tree.args.args
            yield inspect.unwrap(function), arguments[0].arg if arguments else "", tree
            mentioned = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            wanted += sorted(mentioned.difference(wanted))


def _used_by(
    module: nn.Module, function: types.FunctionType, me: str, tree: ast.FunctionDef
) -> Iterator[tuple[str, str]]:
    """The children that one function uses in parts, and how."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    outside = function.__globals__ | {name: cell.cell_contents for name, cell in cells}
    above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}

    def looked_at(node: ast.AST) -> bool:
        call = above[node]
        named = isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        return named and node in call.args and call.func.id in _LOOKING

    for name in (node for node in ast.walk(tree) if isinstance(node, ast.Name)):
        if name.id in _OPAQUE or isinstance(outside.get(name.id), nn.Module):
            raise _UnknownError(f"it uses {name.id}")
        node = above[name] if name.id == "super" else name  # super().forward is one of self's
        if name.id not in ("super", me) or looked_at(node):
            continue
        attribute = above[node]
        if not isinstance(attribute, ast.Attribute):
            raise _UnknownError(_how(node, attribute))
        child = module._modules.get(attribute.attr)
        if child is None:
            stored = isinstance(attribute.ctx, ast.Store)
            if not (stored or _holds_no_module(module, attribute.attr, tree)):
                raise _UnknownError(_how(attribute, above[attribute]))
            continue
        user = above[attribute]
        called = isinstance(user, ast.Call) and user.func is attribute
        plain = isinstance(user, ast.Attribute) and _is_plain(getattr(child, user.attr, child))
        if not (called or plain or looked_at(attribute)):
            yield attribute.attr, _how(attribute, user)


def _how(node: ast.AST, user: ast.AST) -> str:
    text = ast.unparse(user if isinstance(user, ast.expr) else node).splitlines()[0]
    return f"it uses {text}"


def _holds_no_module(module: nn.Module, name: str, tree: ast.FunctionDef) -> bool:
    if name in module._parameters or name in module._buffers:
        return True
    if name in vars(module):
        return name != "_modules" and _is_plain(vars(module)[name])
    for base in type(module).__mro__:
        if name in vars(base):
            value = vars(base)[name]
            if is_torchs(base) or base is object:
                return name in _HARMLESS
            read = (types.FunctionType, property, staticmethod, classmethod)
            return isinstance(value, read) or _is_plain(value)
    # What forward sets itself is none of the children, unless it uses one to set it.
    stores = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute))
    return any(n.attr == name and isinstance(n.ctx, ast.Store) for n in stores)


def _is_plain(value: Any, seen: frozenset[int] = frozenset()) -> bool:
    """Whether nothing that the value holds can be a module."""
    if isinstance(value, _PLAIN) or id(value) in seen:
        return True
    seen |= {id(value)}
    if type(value) is dict:
        return all(_is_plain(v, seen) for item in value.items() for v in item)
    if type(value) in (list, tuple, set, frozenset):
        return all(_is_plain(v, seen) for v in value)
    if isinstance(value, types.FunctionType):
        held = (value.__defaults__, value.__kwdefaults__, value.__closure__)
        return is_torchs(value) or _is_plain(held, seen)
    if isinstance(value, types.BuiltinFunctionType):
        return isinstance(value.__self__, (types.ModuleType, type, type(None)))
    if isinstance(value, nn.Module) or hasattr(type(value), "__get__"):
        return False
    # An object of classes written in Python holds what is in its __dict__.
    classes = type(value).__mro__[:-1]
    known = all("__weakref__" in vars(cls) for cls in classes if cls.__base__ is object)
    known &= not any("__slots__" in vars(cls) for cls in classes)
    return known and hasattr(value, "__dict__") and _is_plain(vars(value), seen)
