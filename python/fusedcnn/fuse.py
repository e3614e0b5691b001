"""Puts fused blocks into models that know nothing of them, and takes them out again."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from fusedcnn.chains import Analysis, Chain, Step, analyse, hooks_of, name_of
from fusedcnn.folding import ConvBatchNormReLUMaxPool2d, FoldedBatchNorm2d
from fusedcnn.methods import NotedMethod, methods_that_run
from fusedcnn.modules import ConvReLUMaxPool2d
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
    ReLU and MaxPool2d.

    Found are modules in ``nn.Sequential`` at any depth, attributes called in forward, calls of
    ``F.relu``, ``torch.relu``, ``Tensor.relu`` and their in-place forms, of ``F.max_pool2d`` and
    ``torch.max_pool2d``, across module boundaries, in these orders:

    - Conv2d -> ReLU -> MaxPool2d.
    - Conv2d -> MaxPool2d -> ReLU: the same values and gradients, ties included, since both send
      a window's gradient to its first maximum if that is above 0, and nowhere else.
    - Conv2d -> BatchNorm2d -> ReLU -> MaxPool2d (or pool before ReLU), where the normalisation is
      in evaluation mode. It is folded into weight and bias at every call, so that nothing goes
      stale; its parameters, statistics and keys stay, and all parameters get their gradients. After
      ``model.train()`` the stock layers compute such a block, by the batch's statistics as before.
      Where the normalisation is in training mode when ``fuse`` is called, the chain is left alone.

    Forwards are followed by torch.fx in training and in evaluation mode. One that it cannot follow
    is left alone; modules inside are fused nevertheless where its source, with the methods it uses,
    shows that it only calls them as a whole, ``self.features(x)``. Where it slices, indexes,
    iterates or hands on a module, ``self.features[:2]``, or where its source leaves that open, all
    within that module is left alone.

    What forward decides by an attribute (a flag, say) must not change afterwards. Where a function
    call has to go, the instance gets a class derived from its own with the traced forward:
    attributes of its own that forward reads, but for tensors and modules, cannot be set afterwards
    without :func:`unfuse`; what lists among them hold and what forward reads of other modules must
    not change; and a method that forward took such a call from raises when it is called by itself.
    Only what forward runs is followed: a method that it does not call, but that by its source runs
    some of the replaced layers, warns when it is called.

    A chain is left alone, with a reason in the report, when a value in between is used elsewhere or
    kept; a method that forward calls, and others may call, runs only a part of it; hooks sit on an
    inner module or on one that the value in between enters or leaves; the pool returns indices; the
    weights are shared, called twice or parametrised; or a type is derived from these and may
    compute something else. So is a near miss: another activation, a Dropout or anything else in
    between, another pool.

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
    becomes a :class:`StockConvReLUMaxPool2d`, which calls the three functions. Parameters are
    shared, and the ``state_dict`` keys are the same.

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
        if type(target) is ConvReLUMaxPool2d:
            edits.set_class(target, StockConvReLUMaxPool2d)
    return target


class StockConvReLUMaxPool2d(ConvReLUMaxPool2d):
    """A :class:`fusedcnn.ConvReLUMaxPool2d` that calls the stock functions; see :func:`unfuse`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the pooled output [N, OC, OH, OW] (or [OC, OH, OW])."""
        return self._stock_forward(input)


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
        fused = (ConvReLUMaxPool2d, ConvBatchNormReLUMaxPool2d, FoldedBatchNorm2d)
        known = type(module) in fused or isinstance(module, StockConvReLUMaxPool2d)
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
        self.paths: dict[int, str] = {}
        for path, module in model.named_modules():
            self.paths[id(module)] = path
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
                candidate.reason = candidate.reason or chain.reason
                candidate.chains.setdefault(i, chain)
        for name, candidate in self.candidates.items():
            conv = candidate.chain.steps[0].module
            for i, trace in enumerate(self.analysis.traces):
                if conv is not None and trace.calls[conv] and i not in candidate.chains:
                    mode = "training" if trace.training else "evaluation"
                    candidate.reason = candidate.reason or f"not followed by both in {mode} mode"
            pools = [chain.pool for chain in candidate.chains.values()]
            if any(pool != pools[0] for pool in pools):
                candidate.reason = candidate.reason or "pooled differently in training mode"
            if name != conv:
                candidate.reason = candidate.reason or "no Conv2d"

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
                candidate.reason = self.analysis.in_parts.get(id(module), "")
                for parameter in module._parameters.values():
                    others = [p for p in owners[id(parameter)] if p != step.module]
                    if parameter is not None and others:
                        candidate.reason = candidate.reason or (
                            f"the weights of '{step.module}' are shared with {name_of(others[0])}"
                        )
                for parent, _ in self.places[id(module)]:
                    if step.kind in ("conv", "norm") and parent in self.analysis.untraceable:
                        candidate.reason = candidate.reason or (
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
                for call in trace.module_calls.get(step.module, ())
            }
            places = self.places[id(module)]
            known = not any(parent in self.analysis.untraceable for parent, _ in places)
            if known and calls <= gone[step.module]:
                self.identities.update(places)
                return ""
        caller = self.model.get_submodule(step.caller)
        if any(trace.calls[step.caller] > 1 for trace in self.analysis.traces):
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
        ran = set().union(*(trace.methods for trace in self.analysis.traces))
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
    cls = ConvBatchNormReLUMaxPool2d if norms else ConvReLUMaxPool2d
    fused = cls.from_modules(conv, nn.MaxPool2d(**pool))
    if norms:
        fused.set_batch_norm(norms[0])
    for name, value in vars(conv).items():
        vars(fused).setdefault(name, value)  # a user's own attributes
    vars(fused)["from_fuse"] = True  # ReLU and pool stand elsewhere: for unfuse
    return fused


# ---- unfuse --------------------------------------------------------------------------------------


# What a fused block has and a Conv2d has not.
_BLOCK_ATTRIBUTES = frozenset(
    {
        *("pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation", "ceil_mode"),
        *("batch_norm", "from_fuse"),
    }
)


def _unfuse_children(parent: nn.Module, edits: _Edits, convs: dict[int, nn.Conv2d]) -> None:
    children = list(parent._modules.items())
    for i, (name, child) in enumerate(children):
        if "replaced" in vars(child or parent):
            replaced = vars(child)["replaced"].train(child.training)
            edits.set_child(parent, name, replaced)
        elif type(child) in (ConvReLUMaxPool2d, ConvBatchNormReLUMaxPool2d):
            following = [module for _, module in children[i + 1 : i + 3]]
            identities = [type(m) is nn.Identity and "replaced" not in vars(m) for m in following]
            if "from_fuse" in vars(child):
                conv = convs.setdefault(id(child), _conv_of(child))
                edits.set_child(parent, name, conv)
            elif type(parent) is nn.Sequential and identities == [True, True]:
                pool = nn.MaxPool2d(
                    child.pool_kernel_size,
                    child.pool_stride,
                    child.pool_padding,
                    child.pool_dilation,
                    ceil_mode=child.ceil_mode,
                )
                stock = (convs.setdefault(id(child), _conv_of(child)), nn.ReLU(), pool)
                for (place, _), module in zip(children[i : i + 3], stock, strict=True):
                    edits.set_child(parent, place, module.train(child.training))
            else:
                edits.set_class(child, StockConvReLUMaxPool2d)


def _conv_of(fused: ConvReLUMaxPool2d) -> nn.Conv2d:
    conv = nn.Conv2d(
        fused.in_channels,
        fused.out_channels,
        fused.kernel_size,
        fused.stride,
        fused.padding,
        fused.dilation,
        fused.groups,
        fused.bias is not None,
        fused.padding_mode,
        device="meta",  # the parameters are replaced; no random numbers are drawn
    )
    conv.weight = fused.weight
    conv.bias = fused.bias
    for name, value in vars(fused).items():
        if name not in _BLOCK_ATTRIBUTES:
            vars(conv).setdefault(name, value)  # a user's own attributes
    return conv.train(fused.training)


class _Edits:
    """Changes of a model that are undone when one of them fails."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> _Edits:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            for undo in reversed(self._undo):
                undo()

    def set_child(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        before = parent._modules[name]
        self._undo.append(lambda: parent._modules.__setitem__(name, before))
        parent._modules[name] = module

    def set_method(self, module: nn.Module, name: str, method: NotedMethod) -> None:
        self._undo.append(lambda: vars(module).pop(name))
        vars(module)[name] = method

    def reset_method(self, module: nn.Module, name: str) -> None:
        method = vars(module).pop(name)
        self._undo.append(lambda: vars(module).__setitem__(name, method))

    def set_class(self, module: nn.Module, cls: type[nn.Module]) -> None:
        before = type(module)
        # Past __setattr__, which modules override.
        self._undo.append(lambda: object.__setattr__(module, "__class__", before))
        object.__setattr__(module, "__class__", cls)
