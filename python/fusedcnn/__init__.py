"""Conv2d + bias + ReLU + MaxPool2d in one pass, forward and backward, for PyTorch."""

from fusedcnn import _torch  # noqa: F401 - the check of torch comes first

# isort: split
from fusedcnn import _derivatives, _fake, backends  # noqa: F401 (they register)
from fusedcnn._info import build_info
from fusedcnn._registrations import decompositions
from fusedcnn.autograd import ConvBatchNormReLUMaxPool2dFunction, ConvReLUMaxPool2dFunction
from fusedcnn.batch_norm import conv_batch_norm_relu_max_pool2d
from fusedcnn.explain import Choice, Explanation, explain
from fusedcnn.folding import ConvBatchNormReLUMaxPool2d
from fusedcnn.functional import conv_relu_max_pool2d
from fusedcnn.fuse import FuseReport, FuseResult, fuse, unfuse
from fusedcnn.graphs import GraphedTrainStep
from fusedcnn.model import FusedSimpleCNN, SimpleCNN
from fusedcnn.modules import ConvReLUMaxPool2d
from fusedcnn.training import train_step

__version__: str = build_info()["version"]

__all__ = [
    "Choice",
    "ConvBatchNormReLUMaxPool2d",
    "ConvBatchNormReLUMaxPool2dFunction",
    "ConvReLUMaxPool2d",
    "ConvReLUMaxPool2dFunction",
    "Explanation",
    "FuseReport",
    "FuseResult",
    "FusedSimpleCNN",
    "GraphedTrainStep",
    "SimpleCNN",
    "backends",
    "build_info",
    "conv_batch_norm_relu_max_pool2d",
    "conv_relu_max_pool2d",
    "decompositions",
    "explain",
    "fuse",
    "train_step",
    "unfuse",
]
