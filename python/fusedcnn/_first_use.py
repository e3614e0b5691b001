"""Right or not used: whether a device's CUDA kernels compute what they should, asked once.

On an architecture where this version's kernels have been tested, nobody asks. On any other, the
first call of a block on a device runs every kernel on problems with known answers
(:mod:`fusedcnn._device_check`), for some milliseconds and once for this library, device and driver:
the findings are kept in a file. A kernel that differs or faults is not chosen there, and a warning
names it. Where that is one of those around the stock convolution, the stock layers compute.

``FUSEDCNN_CUDA_CHECK`` in the environment, or :data:`fusedcnn.backends.cuda`, turns it off, or on
everywhere. Programs that call the operators without Python are never checked: there the kernels
around the stock convolution serve on architectures that have not been tested.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from fusedcnn import _cuda, _device_check
from fusedcnn._device_check import BATCH_NORM, InconclusiveError, Kernel, LostError

AUTO, ALWAYS, NEVER = SWITCHES = ("auto", "always", "never")

switch = os.environ.get("FUSEDCNN_CUDA_CHECK") or AUTO
if switch not in SWITCHES:
    raise ImportError(f"FUSEDCNN_CUDA_CHECK: expected one of {', '.join(SWITCHES)}, got {switch!r}")


class Findings(NamedTuple):
    """What is known of a device.

    Attributes:
        device: its name and architecture.
        state: "checked ..." or "not checked: ...".
        failed: what is wrong with a kernel, by its key ("forward library").
        skipped: why a kernel could not be checked, likewise. Neither kind is used.
        stock: why the stock layers compute all blocks there, or None.
        stock_batch_norm: the same for those with a BatchNorm in training.
    """

    device: str
    state: str
    failed: Mapping[str, str] = MappingProxyType({})
    skipped: Mapping[str, str] = MappingProxyType({})
    stock: str | None = None
    stock_batch_norm: str | None = None


class DeviceLostError(RuntimeError):
    """A kernel's fault in the check has left the process without the device."""


# None: right. A kernel that is not among them has not been looked at.
Verdicts = dict[str, str | None]

_findings: dict[int, Findings] = {}  # by device; final, until the switch is turned
_lost: dict[int, Findings] = {}
_lock = threading.Lock()

# Neither is final. A tensor on a device that this process has not begun to use is a fake one, in
# which a program is traced for somewhere else.
_ELSEWHERE = Findings("", "not checked: not used yet")
_TOO_EARLY = "a CUDA graph that is captured before the kernels of its device have been checked"
_CAPTURING = _ELSEWHERE._replace(stock=_TOO_EARLY, stock_batch_norm=_TOO_EARLY)


def why_stock(device: torch.device) -> str | None:
    """Why the stock layers compute blocks on a CUDA device, or None."""
    findings = _findings.get(device.index)
    return (findings or find(device.index)).stock


def why_stock_batch_norm(device: torch.device) -> str | None:
    """The same where there is a BatchNorm in training."""
    findings = _findings.get(device.index)
    return (findings or find(device.index)).stock_batch_norm


# torch.compile calls them while it traces, and takes what they return for a constant. This is what
# torch.compiler.assume_constant_result does, which would import the compiler.
why_stock._dynamo_marked_constant = True
why_stock_batch_norm._dynamo_marked_constant = True


def find(index: int | None) -> Findings:
    """What is known of a device, found out at the first call.

    Raises:
        DeviceLostError: a kernel's fault in the check, then and at all further calls.
    """
    if not torch.cuda.is_initialized():
        return _ELSEWHERE
    if index in _findings:
        return _findings[index]
    if _capturing(index):  # where little can be asked of a device
        needless = switch == NEVER or (switch == AUTO and _tested(index))
        return _ELSEWHERE if needless else _CAPTURING
    with _lock:
        if index in _lost:
            raise DeviceLostError(_lost[index].state)
        if index not in _findings:
            findings = _findings[index] = _in_a_thread(index)
            if findings.failed or (findings.skipped and findings.stock):
                warnings.warn(_warning(findings), RuntimeWarning, stacklevel=4)
        return _findings[index]


def find_everywhere() -> None:
    """What is known of each device that torch sees, for people who ask."""
    if _cuda.reason is not None or not torch.cuda.is_available():
        return
    torch.cuda.init()
    for index in range(torch.cuda.device_count()):
        with contextlib.suppress(DeviceLostError):  # the report has it
            find(index)


def forget() -> None:
    """Find out again, at each device's next use."""
    with _lock:
        for index in _findings:
            _cuda.settle(index, None)
        _findings.clear()


def _in_a_thread(index: int) -> Findings:
    # A thread of its own has none of the caller's modes: no grad mode or autocast, no fake tensors,
    # no transforms, no tracing, not its current stream and not its kernels that were forced.
    results: list[Findings | Exception] = []

    def run() -> None:
        try:
            results.append(_examine(index))
        except Exception as error:
            results.append(error)

    try:
        thread = threading.Thread(target=run, name="fusedcnn-check", daemon=True)
        thread.start()
        thread.join()
    except RuntimeError as error:  # no more threads
        results.append(error)
    result = results[0]
    if isinstance(result, DeviceLostError):
        raise result
    if isinstance(result, Exception):
        # Whatever it is, it must not keep a model from running.
        why = f"CUDA kernels that could not be checked: {type(result).__name__}: {result}"
        return Findings(f"device {index}", f"not checked: {result}", {}, {"all": why}, why, why)
    return result


def _examine(index: int) -> Findings:
    device, answer = _name(index), _cuda.device(index)
    if isinstance(answer, str):
        why = f"CUDA kernels do not run on {device}: {answer}"
        return Findings(device, f"not checked: {answer}", stock=why, stock_batch_norm=why)
    device += f" (sm_{answer.capability})"
    if switch == NEVER:
        state = "not checked: switched off"
    elif answer.measured and switch != ALWAYS:
        state = f"not checked: all kernels are tested on sm_{answer.capability}"
    else:
        return _checked(index, device, f"{device}, code of sm_{answer.code}")
    _cuda.settle(index, [None] * (len(_kernels()) + 1))
    return Findings(device, state)


def _kernels() -> list[Kernel]:
    rows = _cuda.info()["kernels"]
    return [Kernel(row["pass"], row["name"], row["tf32"]) for row in rows]


def _checked(index: int, device: str, described: str) -> Findings:
    path = _cache(described)
    verdicts = {} if path is None else _load(path)
    kernels = _kernels()
    keys = [*(kernel.key for kernel in kernels), BATCH_NORM]
    skipped: dict[str, str] = {}
    if not set(keys) <= set(verdicts):
        try:
            skipped = _run(index, kernels, verdicts)
        except LostError as lost:
            verdicts[str(lost)] = "it faulted, and took CUDA away from the process"
            if path is not None:
                _save(path, device, verdicts)
            _lost[index] = Findings(device, _loss(device, str(lost), path))
            raise DeviceLostError(_lost[index].state) from lost
        if path is not None:
            _save(path, device, verdicts)
    failed = {key: verdicts[key] for key in keys if verdicts.get(key)}
    unused = {
        **{key: f"not checked on {device}: {why}" for key, why in skipped.items()},
        **{key: f"failed its check on {device}: {why}" for key, why in failed.items()},
    }
    _cuda.settle(index, [unused.get(key) for key in keys])
    # Without those around the stock convolution there is none for everything.
    around = [key for key in keys if key.endswith(" library")]
    stock, norm = (
        next((f"{key}: {unused[key]}" for key in needed if key in unused), None)
        for needed in (around, [*around, BATCH_NORM])
    )
    return Findings(device, f"checked on {device}", failed, skipped, stock, norm)


def _run(index: int, kernels: list[Kernel], verdicts: Verdicts) -> dict[str, str]:
    """Adds the verdicts that are missing; returns why those that are missing still could not be."""
    device = _device(index)
    checks: dict[str, Callable[[], str | None]] = {
        kernel.key: functools.partial(_device_check.check, kernel, device, _cuda.trial)
        for kernel in kernels
    }
    checks[BATCH_NORM] = functools.partial(_device_check.check_batch_norm, device)
    skipped = {}
    with _on_a_stream(index):
        for key, check in checks.items():
            if key in verdicts:
                continue
            try:
                verdicts[key] = check()
            except InconclusiveError as error:
                skipped[key] = str(error)
    _device_check.forget_cases()
    return skipped


# What is asked of torch about a device; tests put other answers in their place.


def _device(index: int) -> torch.device:
    return torch.device("cuda", index)


def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def _capturing(index: int) -> bool:
    with torch.cuda.device(index):
        return torch.cuda.is_current_stream_capturing()


def _tested(index: int) -> bool:
    """As the library would say, which asks CUDA more than a capture may allow."""
    architecture, info = "".join(map(str, torch.cuda.get_device_capability(index))), _cuda.info()
    compiled = {name.partition("-")[0] for name in info["architectures"]}
    return architecture in info["measured"] and architecture in compiled


def _driver() -> str:
    with contextlib.suppress(OSError):
        return Path("/sys/module/nvidia/version").read_text().strip()
    return str(torch._C._cuda_getDriverVersion())


@contextlib.contextmanager
def _on_a_stream(index: int) -> Iterator[None]:
    torch.cuda.set_device(index)  # of this thread, which is about to end
    torch.cuda.set_stream(torch.cuda.Stream())
    mode = torch.cuda.get_sync_debug_mode()  # which may forbid to wait for the device
    if mode:
        torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)


# ---- what people see -----------------------------------------------------------------------------


def state_of(index: int, key: str) -> str:
    """Of a kernel: "checked on ...", "not checked: ..." or "failed: ..."."""
    findings = _findings.get(index, _ELSEWHERE)
    if key in findings.failed:
        return f"failed: {findings.failed[key]}"
    if key in findings.skipped:
        return f"not checked: {findings.skipped[key]}"
    return findings.state


def report() -> list[dict[str, object]]:
    """A dict of plain values for every device that this process has used a block on."""
    known = sorted({**_findings, **_lost}.items())
    return [
        {"index": index, **f._asdict(), "failed": dict(f.failed), "skipped": dict(f.skipped)}
        for index, f in known
    ]


def _warning(findings: Findings) -> str:
    if not findings.failed:
        return f"fusedcnn: the stock layers compute on {findings.device}: {findings.stock}"
    wrong = "; ".join(f"{key}: {why}" for key, why in findings.failed.items())
    instead = "the stock layers" if findings.stock else "others"
    return (
        f"fusedcnn has CUDA kernels that fail their check on {findings.device}, and {instead} "
        f"compute in their place: {wrong}. FUSEDCNN_CUDA_CHECK=never in the environment turns the "
        "check off."
    )


def _loss(device: str, key: str, path: Path | None) -> str:
    kept = path is not None and path.is_file()
    return (
        f"fusedcnn: {key}, a CUDA kernel, faulted on {device} when it was checked, and this "
        "process cannot use CUDA any more. "
        + ("The next one will not run it." if kept else "FUSEDCNN_CUDA_CHECK=never avoids that.")
    )


# ---- what is kept on disk ------------------------------------------------------------------------


def _cache(described: str) -> Path | None:
    """The file of a device's verdicts: named by all that they depend on."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
        digest = hashlib.sha256()
        for path in (_cuda._PATH, _device_check.__file__):
            digest.update(Path(path).read_bytes())
    except (OSError, RuntimeError):  # no such file; no home
        return None
    digest.update(f"{described}, {_driver()}, {torch.__version__}".encode())
    return folder / "fusedcnn" / f"cuda_{digest.hexdigest()[:32]}.json"


def _load(path: Path) -> Verdicts:
    try:
        verdicts = json.loads(path.read_bytes())["kernels"]
        good = all(value is None or isinstance(value, str) for value in verdicts.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return verdicts if good else {}


def _save(path: Path, device: str, verdicts: Verdicts) -> None:
    """Whole or not at all: other processes may be doing the same."""
    text = json.dumps({"device": device, "driver": _driver(), "kernels": verdicts}, indent=1)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text + "\n")
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
