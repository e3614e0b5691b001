"""Finds Conv2d -> (BatchNorm2d) -> ReLU -> MaxPool2d in modules, by torch.fx, and says what it may
not touch.

Nothing here changes a model: it is read, and copies without parameters of their own are traced.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from fusedcnn.modules import ConvReLUMaxPool2d
from fusedcnn.parts import used_in_parts
from fusedcnn.tracing import Tracer, optional_parameters, shadow, trace

# Near misses. Not adaptive average pooling, with which most classifiers end.
_OTHER_POOLS = (nn.AvgPool2d, nn.LPPool2d, nn.FractionalMaxPool2d, nn.AdaptiveMaxPool2d)
_OTHER_POOL_FUNCTIONS = (
    *(F.avg_pool2d, F.lp_pool2d, F.fractional_max_pool2d, F.fractional_max_pool2d_with_indices),
    *(F.adaptive_max_pool2d, F.adaptive_max_pool2d_with_indices),
)
# A call's kind: by the class of the module, or by the function or the name of the method.
_KINDS = (
    ("conv", nn.Conv2d, (F.conv2d, torch.conv2d)),
    ("norm", (nn.BatchNorm2d, nn.SyncBatchNorm), ()),
    ("relu", nn.ReLU, (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")),
    ("pool", nn.MaxPool2d, (F.max_pool2d, torch.max_pool2d, F.max_pool2d_with_indices)),
    ("other pool", _OTHER_POOLS, _OTHER_POOL_FUNCTIONS),
    ("pass", nn.Identity, ()),
)
_ORDER = {"relu": 1, "norm": 2, "conv": 3}  # from the pool upwards
_MOST_STEPS = 6  # of a near miss
_POOL_DEFAULTS = {
    "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False,
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One call in a chain.

    Attributes:
        kind: "conv", "norm", "relu" or "pool".
        module: path of the module that is called; None for a function or method.
        caller: path of the module whose forward makes the call ("" is the model).
        index: the how manieth call it is in that forward.
    """

    kind: str
    module: str | None
    caller: str
    index: int

    def __str__(self) -> str:
        if self.module is not None:
            return self.module
        return f"{self.kind} in the forward of {name_of(self.caller)}"


@dataclass
class Chain:
    """A convolution with ReLU and max pool behind it.

    Attributes:
        steps: in the order of the calls; the first is the convolution.
        pool: arguments of the pool, as from :class:`torch.nn.MaxPool2d`'s attributes.
        reason: why it cannot be fused; empty where it can.
    """

    steps: tuple[Step, ...]
    pool: dict[str, Any]
    reason: str = ""

    @property
    def name(self) -> str:
        """Path of the convolution, or what stands for it."""
        return str(self.steps[0])


class Trace(NamedTuple):
    """One symbolic run of a module.

    Attributes:
        training: the mode that it ran in.
        tracer: what was called.
        chains: what was found.
    """

    training: bool
    tracer: Tracer
    chains: list[Chain]


@dataclass
class Analysis:
    """All that is known of a model.

    Attributes:
        traces: of the model, or of the largest parts that torch.fx can follow.
        untraceable: why torch.fx cannot follow a forward, by module path.
        in_parts: why one of those may run a module without the rest of its chain, by the module's
            id.
    """

    traces: list[Trace] = field(default_factory=list)
    untraceable: dict[str, str] = field(default_factory=dict)
    in_parts: dict[int, str] = field(default_factory=dict)


def name_of(path: str) -> str:
    """A module's path for people."""
    return f"'{path}'" if path else "the model"


def hooks_of(module: nn.Module) -> list[str]:
    """Names of the module's hook tables that are not empty."""
    return [name for name, hooks in vars(module).items() if name.endswith("_hooks") and hooks]


def analyse(model: nn.Module) -> Analysis:
    """Trace the model in training and evaluation mode, or else its traceable parts."""
    found = Analysis()
    copied = shadow(model)
    modules = dict(copied.named_modules())
    opaque = {path for path, m in modules.items() if path and isinstance(m, torch.jit.ScriptModule)}
    if _why_untraceable(copied, opaque):
        # Some forward cannot be followed. Asked alone, each says whether it is the one.
        for path, module in modules.items():
            leaf = path and Tracer(set()).is_leaf_module(module, path)
            reason = "" if leaf else _why_untraceable(module, None)
            if reason:
                opaque.add(path)
                found.untraceable[path] = reason
    _analyse_part(model, copied, "", opaque, found)
    for path in found.untraceable:
        module = model.get_submodule(path)
        for name, how in used_in_parts(module).items():
            reason = f"{name_of(path)}, which torch.fx cannot follow, may run parts of '{name}'"
            for part in (module._modules[name] or nn.Module()).modules():
                found.in_parts.setdefault(id(part), f"{reason}: {how}")
    return found


def _runs(
    module: nn.Module, opaque: set[str] | None, root: str = ""
) -> Iterator[tuple[bool, Tracer, fx.Graph]]:
    """Symbolic runs in both modes, with the optional parameters as symbols and as they are set."""
    for training in (True, False):
        module.train(training)
        for defaults in (False, True) if optional_parameters(module) else (False,):
            yield training, *trace(module, opaque, root, defaults)


def _why_untraceable(module: nn.Module, opaque: set[str] | None, root: str = "") -> str:
    try:
        for _ in _runs(module, opaque, root):
            pass
    except Exception as error:  # whatever a forward may raise that is run on symbols
        text = str(error).strip().splitlines() or [""]
        return f"torch.fx cannot follow its forward: {type(error).__name__}: {text[0]}"
    return ""


def _analyse_part(
    model: nn.Module, copied: nn.Module, path: str, opaque: set[str], found: Analysis
) -> None:
    part = copied.get_submodule(path)
    if isinstance(part, torch.jit.ScriptModule):
        return
    parents = [path]
    if path not in opaque:
        reason = _why_untraceable(part, opaque, path)
        if reason:
            found.untraceable[path] = reason
        else:
            found.traces += [_read(model, *run) for run in _runs(part, opaque, path)]
            parents = [name for name in opaque if name.startswith(f"{path}." if path else "")]
    for parent in parents:
        for child, _ in copied.get_submodule(parent).named_children():
            below = f"{parent}.{child}" if parent else child
            _analyse_part(model, copied, below, opaque, found)


# ---- matching ------------------------------------------------------------------------------------


def _read(model: nn.Module, training: bool, tracer: Tracer, graph: fx.Graph) -> Trace:
    for node in graph.nodes:
        node.meta["module"] = None
        if node.op == "call_module":
            node.meta["path"] = tracer.whole(node.target)
            node.meta["module"] = model.get_submodule(node.meta["path"])  # which has its hooks
        node.meta["kind"] = _kind(node)
    chains = []
    for node in graph.nodes:
        nodes, pool, reason = None, None, ""
        if node.meta["kind"] == "pool":
            nodes = _chain_at(node)
        if nodes is not None:
            pool = _pool_arguments(next(n for n in nodes if n.meta["kind"] == "pool"))
            reason = _why_not(nodes, model, pool, tracer)
        elif "pool" in node.meta["kind"]:
            nodes, reason = _near_miss_at(node)
        if not nodes:
            continue
        steps = tuple(
            Step(n.meta["kind"] or n.name, n.meta.get("path"), *n.meta["call"])
            for n in nodes
            if n.meta["kind"] != "pass"
        )
        chains.append(Chain(steps, pool or {}, reason))
    return Trace(training, tracer, chains)


def _kind(node: fx.Node) -> str:
    module = node.meta["module"]
    if isinstance(module, ConvReLUMaxPool2d):
        return ""
    by_name = node.op in ("call_function", "call_method")
    return next(
        (
            kind
            for kind, classes, functions in _KINDS
            if isinstance(module, classes) or (by_name and node.target in functions)
        ),
        "",
    )


def _source(node: fx.Node) -> fx.Node | None:
    """What the node is computed from: its first tensor."""
    value = node.args[0] if node.args else node.kwargs.get("input")
    return value if isinstance(value, fx.Node) else None


def _chain_at(pool: fx.Node) -> list[fx.Node] | None:
    """The nodes from convolution to pool, or to the ReLU behind it; None where there is no chain.

    Looks at shape alone; whether the chain may be fused is another question.
    """
    nodes = [pool]
    reached, at = 0, _source(pool)
    while at is not None and reached < _ORDER["conv"]:
        kind = at.meta["kind"]
        if kind != "pass":
            if _ORDER.get(kind, 0) <= reached:
                return None
            reached = _ORDER[kind]
        nodes.insert(0, at)
        at = _source(at)
    if reached < _ORDER["conv"]:
        return None
    if any(node.meta["kind"] == "relu" for node in nodes):
        return nodes
    # Conv -> MaxPool -> ReLU: the ReLU is among those that read the pool's output.
    at = pool
    while at is not None:
        readers = {node.meta["kind"]: node for node in reversed(at.users)}
        if "relu" in readers:
            return [*nodes, readers["relu"]]
        at = readers.get("pass")
        nodes.append(at)
    return None


def _near_miss_at(pool: fx.Node) -> tuple[list[fx.Node], str]:
    """The nodes from a convolution to a pool of any kind that are no chain, and why not.

    Empty where there is no convolution near, or a pool by itself behind it.
    """
    nodes, at = [pool], _source(pool)
    while at is not None and "call" in at.meta and len(nodes) < _MOST_STEPS:
        kind = at.meta["kind"]
        if "pool" in kind or isinstance(at.meta["module"], ConvReLUMaxPool2d):
            break
        nodes.insert(0, at)
        if kind == "conv":
            reason = _what_is_amiss(nodes)
            return (nodes, reason) if reason else ([], "")
        at = _source(at)
    return [], ""


def _what_is_amiss(nodes: list[fx.Node]) -> str:
    """The first thing that keeps convolution to pool from being a chain; empty where all does."""
    kinds = [node.meta["kind"] for node in nodes]
    for i, node in enumerate(nodes[1:-1], start=1):
        if not kinds[i]:
            return f"{_described(node)} stands where only BatchNorm2d and ReLU may"
        if kinds[i] == "norm" and "relu" in kinds[:i]:
            return f"{_described(node)} stands behind ReLU, where it cannot be folded"
    if "relu" not in kinds:
        layers = [n for n in nodes[:-1] if n.op == "call_module" and n.meta["kind"]]
        others = filter(None, map(_why_not_module, layers))
        return "" if kinds[-1] == "other pool" else next(others, "no ReLU is next to the pool")
    if kinds[-1] == "other pool":
        return f"{_described(nodes[-1])} is no max pool"
    return "ReLU or the normalisation stands there twice"


def _pool_arguments(node: fx.Node) -> dict[str, Any] | None:
    """The pool's arguments; None where the forward computes one of them."""
    names = ("kernel_size", *_POOL_DEFAULTS)
    if node.op == "call_module":
        return {name: getattr(node.meta["module"], name) for name in names}
    given = dict(zip(("input", *names), node.args, strict=False)) | node.kwargs
    arguments = _POOL_DEFAULTS | given
    arguments.pop("input")
    symbols: list[fx.Node] = []
    fx.map_arg(tuple(arguments.values()), symbols.append)
    if symbols:
        return None
    if node.target is F.max_pool2d_with_indices:
        arguments["return_indices"] = True
    if arguments["stride"] is None or arguments["stride"] == ():
        arguments["stride"] = arguments["kernel_size"]
    return arguments


# ---- reasons -------------------------------------------------------------------------------------


def _why_not(
    nodes: list[fx.Node], model: nn.Module, pool: dict[str, Any] | None, tracer: Tracer
) -> str:
    """Why a chain must stay as it is, as far as one trace shows; empty where it need not."""
    for node in nodes:
        if node.op == "call_module":
            reason = _why_not_module(node)
            if reason:
                return reason
            times = tracer.calls[node.meta["path"]]
            if node.meta["kind"] in ("conv", "norm") and times > 1:
                return f"the weights of {_label(node)} are shared: it is called {times} times"
        elif node.meta["kind"] == "conv":
            return "the convolution is a function call: there is no Conv2d to replace"
    if pool is None:
        return "the pool's arguments are computed in forward"
    if pool["return_indices"]:
        return "the pool returns indices"
    for node in nodes[:-1]:
        if len(node.users) != 1:
            return f"the output of {_label(node)} is used in {len(node.users)} places"
        if tracer.keeps(node):
            return f"the output of {_label(node)} is kept by the forward, or what is read of it"
    if any(node.meta["modes"] != nodes[0].meta["modes"] for node in nodes):
        return "gradients, autocast or checkpointing are switched in between"
    first = nodes[0].meta["callers"]
    for node in nodes[1:]:
        # The modules that the value in between enters or leaves.
        for path in set(first) ^ set(node.meta["callers"]):
            hooks = hooks_of(model.get_submodule(path))
            if hooks:
                return f"hooks on '{path}', through which the value passes ({', '.join(hooks)})"
    reason = _why_not_methods(nodes)
    if reason:
        return reason
    kinds = [node.meta["kind"] for node in nodes]
    padded = any(_pair(pool["padding"])) and _pair(pool["dilation"]) != (1, 1)
    if kinds.index("pool") < kinds.index("relu") and padded:
        # relu(-inf) is 0, where the other order leaves -inf.
        return "ReLU after a padded and dilated pool, whose windows may be empty"
    return ""


def _why_not_methods(nodes: list[fx.Node]) -> str:
    """Why a method that forward calls would compute something else when it is called by itself.

    It would where it runs some of the modules that are replaced, and not all of the chain; or all,
    but a function among them, which stays in the method. Where forward has to be rewritten for that
    function, the rewritten class has an error for it; another class would have none.
    """
    steps = [node for node in nodes if node.meta["kind"] != "pass"]
    of_modules = [node.meta["methods"] for node in steps if node.op == "call_module"]
    for path, name in sorted(set().union(*of_modules)):
        method = f"'{name}' of {name_of(path)}"
        if any((path, name) not in node.meta["methods"] for node in steps):
            return f"{method} can be called by itself, and runs only a part of it"
        for node in steps:
            other = node.meta["callers"][-1] != path
            if other and node.op != "call_module" and (path, name) in node.meta["methods_within"]:
                return f"{method} can be called by itself, and {_label(node)} cannot go there"
    return ""


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values[0], values[-1]


def _label(node: fx.Node) -> str:
    return f"'{node.meta['path']}'" if node.op == "call_module" else node.name


def _described(node: fx.Node) -> str:
    kind = f" ({type(node.meta['module']).__name__})" if node.op == "call_module" else ""
    return f"{_label(node)}{kind}"


def _why_not_module(node: fx.Node) -> str:
    path, module = node.meta["path"], node.meta["module"]
    if parametrize.is_parametrized(module):
        return f"'{path}' is parametrised"
    exact = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.Identity)
    if type(module) not in exact:
        # A SyncBatchNorm is none of these by class; it stands for a BatchNorm2d.
        base = next((c for c in exact if isinstance(module, c)), nn.BatchNorm2d).__name__
        return f"'{path}' is a {type(module).__name__}, and may not compute what {base} does"
    if "forward" in vars(module):
        return f"the forward of '{path}' was replaced on the instance"
    if hooks_of(module):
        return f"hooks on '{path}' ({', '.join(hooks_of(module))})"
    return ""
