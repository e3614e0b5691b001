"""Puts fused blocks into models that know nothing of them, and takes them out again."""

from __future__ import annotations

import contextlib
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from fusedcnn.chains import Analysis, Chain, Step, analyse, hooks_of, name_of
from fusedcnn.folding import ConvBatchNormReLUMaxPool2d, FoldedBatchNorm2d
from fusedcnn.methods import NotedMethod, methods_that_run
from fusedcnn.modules import POOL_ARGUMENTS, ConvReLUMaxPool2d, conv_arguments
from fusedcnn.report import FuseReport, FuseResult, why_nothing
from fusedcnn.rewriting import Removed, RewrittenForward, rewritten_class, why_not_rewritable
from fusedcnn.tracing import copy_sharing


@overload
def fuse(model: nn.Module, *, inplace: bool = ..., report: Literal[False] = ...) -> nn.Module: ...


@overload
def fuse(
    model: nn.Module, *, inplace: bool = ..., report: Literal[True]
) -> tuple[nn.Module, FuseReport]: ...


def fuse(model, *, inplace=False, report=False):
    """Replace Conv2d -> ReLU -> MaxPool2d chains in any model by fused blocks.

    Equivalent to the model itself: the same outputs and gradients up to rounding, the same
    ``state_dict`` keys, and the very Parameters, so that an optimizer made before goes on. A
    :class:`fusedcnn.ConvReLUMaxPool2d` takes the convolution's place and ``nn.Identity`` those of
    ReLU and MaxPool2d. A BatchNorm2d may stand behind the convolution, which a
    :class:`fusedcnn.ConvBatchNormReLUMaxPool2d` then computes, too, in either mode; and the pool
    may stand before ReLU. Those two may be modules or function calls, anywhere in the model.

    docs/fuse.md says what is found, what is left alone and why, and docs/compatibility.md what
    changes around a fused chain: attributes that forward reads, for one, are fixed where a function
    call had to go.

    Args:
        model: any module, in training or evaluation mode.
        inplace: change the model itself, and return it. Otherwise a copy that shares all Parameters
            and buffers is changed.
        report: also return what was fused and what was not, and why.

    Returns:
        The fused model, or (model, :class:`FuseReport`) with ``report=True``: a list that prints as
        a line for each chain and each near miss.

    Warns:
        UserWarning: nothing was fused, and why.

    Raises:
        TypeError: model is no module or is compiled by TorchScript, a flag is no bool, or the model
            cannot be copied by :func:`copy.deepcopy`, which tracing needs. Whatever is raised, the
            model is as it was.
    """
    _check("fuse", model, inplace=inplace, report=report)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"model: fuse expected a module whose forward is Python, got a {type(model).__name__}; "
            "call fuse before TorchScript"
        )
    analysis = analyse(model)
    target = model if inplace else copy_sharing(model)
    plan = _Plan(model, analysis)
    with _Edits() as edits:
        plan.apply(target, edits)
    results = plan.results()
    if not any(row.fused for row in results):
        warnings.warn(why_nothing(model, results), stacklevel=2)
    return (target, results) if report else target


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Give back stock layers: the inverse of :func:`fuse`, for fused models of any origin.

    What :func:`fuse` replaced stands again in its place. In models written with
    :class:`fusedcnn.ConvReLUMaxPool2d`, such as :class:`fusedcnn.FusedSimpleCNN`, a block followed
    by two ``nn.Identity`` in an ``nn.Sequential`` becomes Conv2d, ReLU, MaxPool2d; any other
    becomes a :class:`StockConvReLUMaxPool2d` or :class:`StockConvBatchNormReLUMaxPool2d`, which
    call the stock layers one by one. Parameters are shared, and the ``state_dict`` keys are the
    same.

    Args:
        model: any module.
        inplace: change the model itself, and return it. Otherwise a copy that shares all Parameters
            and buffers is changed.

    Raises:
        TypeError: model is no module, or inplace is no bool.
        ValueError: hooks sit on a fused block, whose output no stock layer has, or on an
            ``nn.Identity`` that :func:`fuse` has put; or a fused part is of a class derived from
            its own, as parametrisations and ``fully_shard`` make them. Whatever is raised, the
            model is as it was.
    """
    _check("unfuse", model, inplace=inplace)
    for path, module in model.named_modules():
        _check_undoable(path, module)
    target = model if inplace else copy_sharing(model)
    convs: dict[int, nn.Conv2d] = {}  # by block: one that stands in several places stays one
    with _Edits() as edits:
        for module in list(target.modules()):
            if isinstance(module, RewrittenForward):
                edits.set_class(module, module.original_class)
            elif type(module) is FoldedBatchNorm2d:
                edits.set_class(module, nn.BatchNorm2d)
            for name in [n for n, v in vars(module).items() if isinstance(v, NotedMethod)]:
                edits.reset_method(module, name)
            _unfuse_children(module, edits, convs)
        if type(target) in _STOCK:
            edits.set_class(target, _STOCK[type(target)])
    return target


class StockConvReLUMaxPool2d(ConvReLUMaxPool2d):
    """A :class:`fusedcnn.ConvReLUMaxPool2d` that calls the stock functions; see :func:`unfuse`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the pooled output [N, OC, OH, OW] (or [OC, OH, OW])."""
        return self._stock_forward(input)


class StockConvBatchNormReLUMaxPool2d(ConvBatchNormReLUMaxPool2d):
    """The like of a :class:`fusedcnn.ConvBatchNormReLUMaxPool2d`; see :func:`unfuse`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the pooled output [N, OC, OH, OW]."""
        return self._stock_forward(input, self.batch_norm)


_STOCK = {
    ConvReLUMaxPool2d: StockConvReLUMaxPool2d,
    ConvBatchNormReLUMaxPool2d: StockConvBatchNormReLUMaxPool2d,
}


def _check(function: str, model: nn.Module, **flags: bool) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {function} expected a torch.nn.Module, got {type(model).__name__}")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {value!r}")


def _check_undoable(path: str, module: nn.Module) -> None:
    known = True
    if isinstance(module, RewrittenForward):
        known = RewrittenForward in type(module).__bases__
    elif isinstance(module, (ConvReLUMaxPool2d, FoldedBatchNorm2d)):
        known = type(module) in (*_STOCK, *_STOCK.values(), FoldedBatchNorm2d)
    if not known:
        raise ValueError(
            f"model: expected fused parts of fusedcnn's own classes, got {type(module).__name__} "
            f"at {name_of(path)}; undo what made that class (a parametrisation, say) first"
        )
    placed = isinstance(module, ConvReLUMaxPool2d) or "replaced" in vars(module)
    if placed and hooks_of(module):
        raise ValueError(
            f"model: expected no hooks on fused blocks, got some on {name_of(path)} "
            f"({', '.join(hooks_of(module))})"
        )


# ---- plan ----------------------------------------------------------------------------------------


@dataclass
class _Candidate:
    """One convolution's chains: one for each trace that calls it."""

    chains: dict[int, Chain] = field(default_factory=dict)
    reason: str = ""

    def refuse(self, reason: str) -> None:
        self.reason = self.reason or reason

    @property
    def chain(self) -> Chain:
        return next(iter(self.chains.values()))


class _Plan:
    """What is to be changed; paths are the model's, so that it also fits a copy."""

    def __init__(self, model: nn.Module, analysis: Analysis) -> None:
        self.model = model
        self.analysis = analysis
        self.candidates: dict[str, _Candidate] = {}
        self.places: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for path, module in model.named_modules():
            for name, child in module._modules.items():
                self.places[id(child)].append((path, name))
        self.identities: set[tuple[str, str]] = set()  # (parent, name) that become Identity
        self.rewritten: dict[str, Removed] = {}
        self._rewritable: dict[str, str] = {}
        self._collect()
        self._refuse_shared()
        while self._refuse_unremovable():
            pass

    def _collect(self) -> None:
        for i, trace in enumerate(self.analysis.traces):
            for chain in trace.chains:
                candidate = self.candidates.setdefault(chain.name, _Candidate())
                candidate.refuse(chain.reason)
                candidate.chains.setdefault(i, chain)
        for name, candidate in self.candidates.items():
            conv = candidate.chain.steps[0].module
            for i, trace in enumerate(self.analysis.traces):
                if conv is not None and trace.tracer.calls[conv] and i not in candidate.chains:
                    mode = "training" if trace.training else "evaluation"
                    candidate.refuse(f"not followed by both in {mode} mode")
            pools = [chain.pool for chain in candidate.chains.values()]
            if any(pool != pools[0] for pool in pools):
                candidate.refuse("pooled differently in training mode")
            if name != conv:
                candidate.refuse("no Conv2d")

    def _refuse_shared(self) -> None:
        owners: dict[int, list[str]] = defaultdict(list)
        for path, module in self.model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners[id(parameter)].append(path)
        for candidate in self.candidates.values():
            for step in candidate.chain.steps:
                if candidate.reason or step.module is None:
                    continue
                module = self.model.get_submodule(step.module)
                candidate.refuse(self.analysis.in_parts.get(id(module), ""))
                for parameter in module._parameters.values():
                    others = [p for p in owners[id(parameter)] if p != step.module]
                    if parameter is not None and others:
                        candidate.refuse(
                            f"the weights of '{step.module}' are shared with {name_of(others[0])}"
                        )
                for parent, _ in self.places[id(module)]:
                    if step.kind in ("conv", "norm") and parent in self.analysis.untraceable:
                        candidate.refuse(
                            f"{name_of(parent)}, which torch.fx cannot follow, may call "
                            f"'{step.module}', too"
                        )

    # A ReLU or pool that several chains share can go when all its calls go; so when one chain is
    # refused, others may have to be, until nothing changes.

    def _refuse_unremovable(self) -> bool:
        """Find out how each call can go; refuse chains with one that cannot, and say if any."""
        self.identities.clear()
        self.rewritten.clear()
        gone: dict[str, set[tuple[int, str, int]]] = defaultdict(set)
        accepted = [c for c in self.candidates.values() if not c.reason]
        for candidate in accepted:
            for i, chain in candidate.chains.items():
                for step in chain.steps[1:]:
                    if step.module is not None:
                        gone[step.module].add((i, step.caller, step.index))
        for candidate in accepted:
            for i, chain in candidate.chains.items():
                for step in chain.steps[1:]:
                    if step.kind != "norm" and not candidate.reason:
                        candidate.reason = self._remove(i, step, gone)
        return any(c.reason for c in accepted)

    def _remove(self, i: int, step: Step, gone: dict[str, set[tuple[int, str, int]]]) -> str:
        if step.module is not None:
            module = self.model.get_submodule(step.module)
            calls = {
                (k, *call)
                for k, trace in enumerate(self.analysis.traces)
                for call in trace.tracer.module_calls.get(step.module, ())
            }
            places = self.places[id(module)]
            known = not any(parent in self.analysis.untraceable for parent, _ in places)
            if known and calls <= gone[step.module]:
                self.identities.update(places)
                return ""
        caller = self.model.get_submodule(step.caller)
        if any(trace.tracer.calls[step.caller] > 1 for trace in self.analysis.traces):
            return f"{name_of(step.caller)}, whose forward calls {step}, is called several times"
        if type(caller).forward is nn.Sequential.forward and "forward" not in vars(caller):
            self.identities.add((step.caller, list(caller._modules)[step.index]))
            return ""
        if step.caller not in self._rewritable:
            self._rewritable[step.caller] = why_not_rewritable(caller)
        if self._rewritable[step.caller]:
            where = name_of(step.caller)
            return f"{step} cannot be taken out of {where}: {self._rewritable[step.caller]}"
        training = self.analysis.traces[i].training
        removed = self.rewritten.setdefault(step.caller, {})
        removed[training] = tuple(sorted({*removed.get(training, ()), step.index}))
        return ""

    def results(self) -> FuseReport:
        """The report: chains in the order of the model, then modules that were not looked into."""
        rows = [
            FuseResult(name, tuple(map(str, c.chain.steps)), not c.reason, c.reason)
            for name, c in self.candidates.items()
        ]
        untraceable = self.analysis.untraceable.items()
        rows += [FuseResult(path, (), False, reason) for path, reason in untraceable]
        return FuseReport(rows)

    def apply(self, target: nn.Module, edits: _Edits) -> None:
        """Change the model, or a copy of it."""
        modules = dict(target.named_modules())
        for candidate in self.candidates.values():
            if candidate.reason:
                continue
            chain = candidate.chain
            conv = modules[chain.steps[0].module]
            norms = [modules[s.module] for s in chain.steps if s.kind == "norm"]
            fused = _fused(conv, norms, chain.pool)
            for norm in norms:
                edits.set_class(norm, FoldedBatchNorm2d)
            places = self.places[id(self.model.get_submodule(chain.steps[0].module))]
            for parent, name in places:
                edits.set_child(modules[parent], name, fused)
        for path, removed in self.rewritten.items():
            edits.set_class(modules[path], rewritten_class(modules[path], removed))
        for parent, name in self.identities:
            replaced = modules[parent]._modules[name]
            identity = nn.Identity().train(replaced.training)
            vars(identity)["replaced"] = replaced  # not a child: no keys, no part in repr
            edits.set_child(modules[parent], name, identity)
        ran = set().union(*(trace.tracer.methods for trace in self.analysis.traces))
        layers = {
            id(self.model.get_submodule(step.module))
            for candidate in self.candidates.values()
            for step in candidate.chain.steps
            if not candidate.reason and step.module is not None
        }
        for path, module in self.model.named_modules():
            for name in methods_that_run(module, layers):
                if (path, name) not in ran and name not in vars(module):
                    edits.set_method(modules[path], name, NotedMethod(modules[path], name))


def _fused(conv: nn.Conv2d, norms: list[nn.Module], pool: dict[str, Any]) -> ConvReLUMaxPool2d:
    pool = nn.MaxPool2d(**pool)
    if norms:
        fused = ConvBatchNormReLUMaxPool2d.from_modules(conv, *norms, pool)
        fused.leave_batch_norm()
    else:
        fused = ConvReLUMaxPool2d.from_modules(conv, pool)
    for name, value in vars(conv).items():
        vars(fused).setdefault(name, value)  # a user's own attributes
    vars(fused)["from_fuse"] = True  # ReLU and pool stand elsewhere: for unfuse
    return fused


# ---- unfuse --------------------------------------------------------------------------------------


# What a fused block has and a Conv2d has not.
_BLOCK_ATTRIBUTES = frozenset((*POOL_ARGUMENTS, "batch_norm", "from_fuse"))


def _unfuse_children(parent: nn.Module, edits: _Edits, convs: dict[int, nn.Conv2d]) -> None:
    children = list(parent._modules.items())
    for i, (name, child) in enumerate(children):
        if "replaced" in vars(child or parent):
            replaced = vars(child)["replaced"].train(child.training)
            edits.set_child(parent, name, replaced)
        elif type(child) in _STOCK:
            following = [module for _, module in children[i + 1 : i + 3]]
            identities = [type(m) is nn.Identity and "replaced" not in vars(m) for m in following]
            if "from_fuse" in vars(child):
                conv = convs.setdefault(id(child), _conv_of(child))
                edits.set_child(parent, name, conv)
            elif (
                type(child) is ConvReLUMaxPool2d
                and type(parent) is nn.Sequential
                and identities == [True, True]
            ):
                *pool, ceil_mode = (getattr(child, argument) for argument in POOL_ARGUMENTS)
                pool = nn.MaxPool2d(*pool, ceil_mode=ceil_mode)
                stock = (convs.setdefault(id(child), _conv_of(child)), nn.ReLU(), pool)
                for (place, _), module in zip(children[i : i + 3], stock, strict=True):
                    edits.set_child(parent, place, module.train(child.training))
            else:
                edits.set_class(child, _STOCK[type(child)])


def _conv_of(fused: ConvReLUMaxPool2d) -> nn.Conv2d:
    conv = nn.Conv2d(*conv_arguments(fused), device="meta")
    conv.weight = fused.weight
    conv.bias = fused.bias
    for name, value in vars(fused).items():
        if name not in _BLOCK_ATTRIBUTES:
            vars(conv).setdefault(name, value)  # a user's own attributes
    return conv.train(fused.training)


class _Edits(contextlib.ExitStack):
    """Changes of a model that are undone when one of them fails."""

    def __exit__(self, kind: object, *details: Any) -> bool | None:
        """Undo what was done where there is an error."""
        if kind is None:
            self.pop_all()
        return super().__exit__(kind, *details)

    def set_child(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        self.callback(parent._modules.__setitem__, name, parent._modules[name])
        parent._modules[name] = module

    def set_method(self, module: nn.Module, name: str, method: NotedMethod) -> None:
        self.callback(vars(module).pop, name)
        vars(module)[name] = method

    def reset_method(self, module: nn.Module, name: str) -> None:
        self.callback(vars(module).__setitem__, name, vars(module).pop(name))

    def set_class(self, module: nn.Module, cls: type[nn.Module]) -> None:
        # Past __setattr__, which modules override.
        self.callback(object.__setattr__, module, "__class__", type(module))
        object.__setattr__(module, "__class__", cls)
