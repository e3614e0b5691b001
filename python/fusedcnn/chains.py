"""Finds Conv2d -> (BatchNorm2d) -> ReLU -> MaxPool2d in modules, by torch.fx, and says what it may
not touch.

Nothing here changes a model: it is read, and copies without parameters of their own are traced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from fusedcnn.modules import ConvReLUMaxPool2d
from fusedcnn.parts import used_in_parts
from fusedcnn.tracing import Method, Tracer, optional_parameters, shadow, trace

_RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_RELU_METHODS = ("relu", "relu_")
_POOL_FUNCTIONS = (F.max_pool2d, torch.max_pool2d)
_POOL_WITH_INDICES = (F.max_pool2d_with_indices,)
_CONV_FUNCTIONS = (F.conv2d, torch.conv2d)
# Near misses. Not adaptive average pooling, with which most classifiers end.
_OTHER_POOLS = (nn.AvgPool2d, nn.LPPool2d, nn.FractionalMaxPool2d, nn.AdaptiveMaxPool2d)
_OTHER_POOL_FUNCTIONS = (
    *(F.avg_pool2d, F.lp_pool2d, F.fractional_max_pool2d, F.fractional_max_pool2d_with_indices),
    *(F.adaptive_max_pool2d, F.adaptive_max_pool2d_with_indices),
)
_MOST_STEPS = 6  # of a near miss
_POOL_PARAMETERS = (
    "input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices",
)  # fmt: skip


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


@dataclass
class Trace:
    """What one symbolic run of a module showed; paths are the whole model's.

    Attributes:
        training: the mode that it ran in.
        chains: what was found.
        calls: how often each module was called.
        module_calls: by module, (caller, index) of each call.
        methods: (module, name) of the methods that ran.
    """

    training: bool
    chains: list[Chain]
    calls: Counter[str]
    module_calls: dict[str, set[tuple[str, int]]]
    methods: set[Method]


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


def _why_untraceable(module: nn.Module, opaque: set[str] | None) -> str:
    try:
        for training in (True, False):
            module.train(training)
            trace(module, opaque, defaults=False)
            if optional_parameters(module):
                trace(module, opaque, defaults=True)
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
    prefix = f"{path}." if path else ""
    within = {name.removeprefix(prefix) for name in opaque if name.startswith(prefix)}
    if path not in opaque:
        reason = _why_untraceable(part, within)
        if not reason:
            for training in (True, False):
                part.train(training)
                for defaults in (False, True) if optional_parameters(part) else (False,):
                    tracer, graph = trace(part, within, defaults)
                    found.traces.append(_read(model, path, training, tracer, graph))
            for name in within:
                for child, _ in part.get_submodule(name).named_children():
                    _analyse_part(model, copied, f"{prefix}{name}.{child}", opaque, found)
            return
        found.untraceable[path] = reason
    for child, _ in part.named_children():
        _analyse_part(model, copied, f"{prefix}{child}", opaque, found)


# ---- matching ------------------------------------------------------------------------------------


def _read(model: nn.Module, root: str, training: bool, tracer: Tracer, graph: fx.Graph) -> Trace:
    part = model.get_submodule(root)
    modules = dict(part.named_modules())

    def whole(path: str) -> str:
        return ".".join(p for p in (root, path) if p)

    chains = []
    for node in graph.nodes:
        kind = _kind(node, modules)
        nodes, pool, reason = None, None, ""
        if kind == "pool":
            nodes = _chain_at(node, modules)
        if nodes is not None:
            pool_node = next(n for n in nodes if _kind(n, modules) == "pool")
            pool = _pool_arguments(pool_node, modules)
            reason = _why_not(nodes, modules, pool, tracer)
        elif kind in ("pool", "other pool"):
            nodes, reason = _near_miss_at(node, modules)
        if not nodes:
            continue
        steps = tuple(
            Step(
                _kind(n, modules) or n.name,
                whole(n.target) if n.op == "call_module" else None,
                whole(n.meta["call"][0]),
                n.meta["call"][1],
            )
            for n in nodes
            if _kind(n, modules) != "pass"
        )
        chains.append(Chain(steps, pool or {}, reason))
    return Trace(
        training,
        chains,
        Counter({whole(path): n for path, n in tracer.calls.items()}),
        {
            whole(path): {(whole(caller), index) for caller, index in calls}
            for path, calls in tracer.module_calls.items()
        },
        {(whole(path), name) for n in graph.nodes for path, name in n.meta.get("methods", ())},
    )


def _kind(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        module = modules[node.target]
        if isinstance(module, ConvReLUMaxPool2d):
            return ""
        for kind, classes in (
            ("conv", nn.Conv2d),
            ("norm", (nn.BatchNorm2d, nn.SyncBatchNorm)),
            ("relu", nn.ReLU),
            ("pool", nn.MaxPool2d),
            ("other pool", _OTHER_POOLS),
            ("pass", nn.Identity),
        ):
            if isinstance(module, classes):
                return kind
    elif node.op == "call_function":
        for kind, functions in (
            ("conv", _CONV_FUNCTIONS),
            ("relu", _RELU_FUNCTIONS),
            ("pool", _POOL_FUNCTIONS + _POOL_WITH_INDICES),
            ("other pool", _OTHER_POOL_FUNCTIONS),
        ):
            if node.target in functions:
                return kind
    elif node.op == "call_method" and node.target in _RELU_METHODS:
        return "relu"
    return ""


def _source(node: fx.Node) -> fx.Node | None:
    """What the node is computed from: its first tensor."""
    value = node.args[0] if node.args else node.kwargs.get("input")
    return value if isinstance(value, fx.Node) else None


def _above(node: fx.Node, modules: dict[str, nn.Module]) -> Iterator[fx.Node]:
    """The nodes that this one is computed from, nearest first."""
    at = _source(node)
    while at is not None:
        yield at
        at = _source(at) if _kind(at, modules) else None


def _chain_at(pool: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node] | None:
    """The nodes from convolution to pool, or to the ReLU behind it; None where there is no chain.

    Looks at shape alone; whether the chain may be fused is another question.
    """
    nodes = [pool]
    wanted = {"relu": 0, "norm": 0, "conv": 0}
    for node in _above(pool, modules):
        kind = _kind(node, modules)
        if kind == "pass":
            nodes.insert(0, node)
            continue
        # Upwards: at most one ReLU, then at most one norm, then the convolution.
        if kind not in wanted or wanted[kind] or (kind == "relu" and wanted["norm"]):
            return None
        wanted[kind] += 1
        nodes.insert(0, node)
        if kind == "conv":
            break
    if not wanted["conv"]:
        return None
    if wanted["relu"]:
        return nodes
    # Conv -> MaxPool -> ReLU: the ReLU is among those that read the pool's output.
    at = pool
    while True:
        readers = list(at.users)
        relu = next((n for n in readers if _kind(n, modules) == "relu"), None)
        if relu is not None:
            return [*nodes, relu]
        passing = next((n for n in readers if _kind(n, modules) == "pass"), None)
        if passing is None:
            return None
        nodes.append(passing)
        at = passing


def _near_miss_at(pool: fx.Node, modules: dict[str, nn.Module]) -> tuple[list[fx.Node], str]:
    """The nodes from a convolution to a pool of any kind that are no chain, and why not.

    Empty where there is no convolution near, or a pool by itself behind it.
    """
    nodes, at = [pool], _source(pool)
    while at is not None and "call" in at.meta and len(nodes) < _MOST_STEPS:
        kind = _kind(at, modules)
        if "pool" in kind or isinstance(modules.get(str(at.target)), ConvReLUMaxPool2d):
            break
        nodes.insert(0, at)
        if kind == "conv":
            reason = _what_is_amiss(nodes, modules)
            return (nodes, reason) if reason else ([], "")
        at = _source(at)
    return [], ""


def _what_is_amiss(nodes: list[fx.Node], modules: dict[str, nn.Module]) -> str:
    """The first thing that keeps convolution to pool from being a chain; empty where all does."""
    kinds = [_kind(node, modules) for node in nodes]
    for node, kind in zip(nodes[1:-1], kinds[1:-1], strict=True):
        if not kind:
            return f"{_described(node, modules)} stands where only BatchNorm2d and ReLU may"
        if kind == "norm" and "relu" in kinds[: nodes.index(node)]:
            return f"{_described(node, modules)} stands behind ReLU, where it cannot be folded"
    if "relu" not in kinds:
        layers = [n for n, kind in zip(nodes, kinds, strict=True) if n.op == "call_module" and kind]
        others = filter(None, (_why_not_module(n.target, modules[n.target]) for n in layers[:-1]))
        return "" if kinds[-1] == "other pool" else next(others, "no ReLU is next to the pool")
    if kinds[-1] == "other pool":
        return f"{_described(nodes[-1], modules)} is no max pool"
    return "ReLU or the normalisation stands there twice"


def _pool_arguments(node: fx.Node, modules: dict[str, nn.Module]) -> dict[str, Any] | None:
    """The pool's arguments; None where the forward computes one of them."""
    if node.op == "call_module":
        module = modules[node.target]
        return {name: getattr(module, name) for name in _POOL_PARAMETERS[1:]}
    given = dict(zip(_POOL_PARAMETERS, node.args, strict=False)) | node.kwargs
    arguments = {
        "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False,
    } | given  # fmt: skip
    arguments.pop("input")
    symbols: list[fx.Node] = []
    fx.map_arg(tuple(arguments.values()), symbols.append)
    if symbols:
        return None
    if node.target in _POOL_WITH_INDICES:
        arguments["return_indices"] = True
    if arguments["stride"] is None or arguments["stride"] == ():
        arguments["stride"] = arguments["kernel_size"]
    return arguments


# ---- reasons -------------------------------------------------------------------------------------


def _why_not(
    nodes: list[fx.Node],
    modules: dict[str, nn.Module],
    pool: dict[str, Any] | None,
    tracer: Tracer,
) -> str:
    """Why a chain must stay as it is, as far as one trace shows; empty where it need not."""
    for node in nodes:
        if node.op == "call_module":
            reason = _why_not_module(node.target, modules[node.target])
            if reason:
                return reason
            kind = _kind(node, modules)
            if kind in ("conv", "norm") and tracer.calls[node.target] > 1:
                times = tracer.calls[node.target]
                return f"the weights of '{node.target}' are shared: it is called {times} times"
        elif _kind(node, modules) == "conv":
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
            if hooks_of(modules[path]):
                hooks = hooks_of(modules[path])
                return f"hooks on '{path}', through which the value passes ({', '.join(hooks)})"
    reason = _why_not_methods(nodes, modules)
    if reason:
        return reason
    kinds = [_kind(node, modules) for node in nodes]
    padded = any(_pair(pool["padding"])) and _pair(pool["dilation"]) != (1, 1)
    if kinds.index("pool") < kinds.index("relu") and padded:
        # relu(-inf) is 0, where the other order leaves -inf.
        return "ReLU after a padded and dilated pool, whose windows may be empty"
    return ""


def _why_not_methods(nodes: list[fx.Node], modules: dict[str, nn.Module]) -> str:
    """Why a method that forward calls would compute something else when it is called by itself.

    It would where it runs some of the modules that are replaced, and not all of the chain; or all,
    but a function among them, which stays in the method. Where forward has to be rewritten for that
    function, the rewritten class has an error for it; another class would have none.
    """
    steps = [node for node in nodes if _kind(node, modules) != "pass"]
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
    return f"'{node.target}'" if node.op == "call_module" else f"{node.name}"


def _described(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    kind = f" ({type(modules[node.target]).__name__})" if node.op == "call_module" else ""
    return f"{_label(node)}{kind}"


def _why_not_module(path: str, module: nn.Module) -> str:
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
    if isinstance(module, nn.BatchNorm2d):
        if module.training:
            return f"'{path}' is in training mode and normalises by the batch: call eval() first"
        if module.running_mean is None or module.running_var is None:
            return f"'{path}' keeps no running statistics and normalises by the batch"
    return ""
