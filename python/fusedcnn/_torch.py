"""Says in one line which torch is needed where it is missing or too old. Imported first."""

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError("fusedcnn needs torch >= 2.10, found none") from None

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
    raise ImportError(f"fusedcnn needs torch >= 2.10, found {torch.__version__}")
