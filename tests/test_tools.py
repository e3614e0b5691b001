"""Tools that know layers by their type, on fused models: right, or an error that names unfuse."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import fusedcnn
import pytest
import torch
from fusing import block
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils import mkldnn

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def stock(norm: bool = False) -> nn.Sequential:
    layers = block(*[nn.BatchNorm2d(8)] * norm, channels=(3, 8))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 5)).eval()


MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "fused": lambda: fusedcnn.fuse(stock()),
    "fused with its norm": lambda: fusedcnn.fuse(stock(norm=True)),
    "written": lambda: nn.Sequential(fusedcnn.ConvReLUMaxPool2d(3, 8, 3), nn.Flatten()).eval(),
}
NAMES_UNFUSE = r"(?s)unfuse (first|before)"


@pytest.fixture
def quantization():
    """torch's own, which newer versions have moved elsewhere."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no fbgemm on this machine")
    return pytest.importorskip("torch.ao.quantization")


def eager(model, quantization, aware):
    """Quantization of a model that gets quantized images."""
    prepare = quantization.prepare_qat if aware else quantization.prepare
    wrapped = nn.Sequential(quantization.QuantStub(), model, quantization.DeQuantStub())
    wrapped.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    prepared = prepare(wrapped.train(aware))
    prepared(IMAGES)
    return quantization.convert(prepared.eval())(IMAGES)


def guided(function):
    """As captum registers its hooks: by a function that asks for the type of each module."""
    function.__module__ = "captum.attr._core.guided_backprop_deconvnet"
    return function


REFUSED = {
    "mkldnn": mkldnn.to_mkldnn,
    "fuse_conv_bn_eval": lambda m: fuse_conv_bn_eval(m[0], nn.BatchNorm2d(8).eval()),
    "captum": lambda m: m.apply(guided(lambda module: None)),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tool", REFUSED)
def test_an_error_where_the_tool_would_be_wrong(tool, model):
    with pytest.raises(RuntimeError, match=NAMES_UNFUSE):
        REFUSED[tool](MODELS[model]())


@pytest.mark.filterwarnings("ignore")  # deprecations and observers
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("aware", [False, True])
def test_eager_quantization_is_an_error(model, aware, quantization):
    with pytest.raises(RuntimeError, match=NAMES_UNFUSE):
        eager(MODELS[model](), quantization, aware)


@pytest.mark.parametrize("tool", REFUSED)
def test_the_tools_work_after_unfuse(tool):
    REFUSED[tool](fusedcnn.unfuse(MODELS["fused"]()))


def convert_syncbn_model(module):
    """As apex converts, and timm: by a walk through named_children."""
    for _, child in module.named_children():
        convert_syncbn_model(child)


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, convert_syncbn_model])
def test_a_folded_norm_is_not_replaced(convert):
    """It would be applied twice."""
    with pytest.raises(RuntimeError, match=r"SyncBatchNorm.*unfuse first"):
        convert(MODELS["fused with its norm"]())
    convert(MODELS["fused"]())


@pytest.mark.filterwarnings("ignore")
def test_fuse_modules_knows_no_block(quantization):
    for names in (["0", "1"], ["0", "1", "2"]):
        with pytest.raises((AssertionError, NotImplementedError), match="ConvReLUMaxPool2d"):
            quantization.fuse_modules(MODELS["fused"](), [names])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("aware", [False, True])
def test_fx_quantization_leaves_blocks_in_float(aware, quantization):
    """All else is quantized, and the block computes between in float; a folded norm is an error."""
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    prepare = quantize_fx.prepare_qat_fx if aware else quantize_fx.prepare_fx
    mapping = quantization.get_default_qconfig_mapping("fbgemm")
    model = MODELS["fused"]()
    prepared = prepare(copy.deepcopy(model).train(aware), mapping, (IMAGES,))
    prepared(IMAGES)
    converted = quantize_fx.convert_fx(prepared.eval())
    assert any(n.target is fusedcnn.conv_relu_max_pool2d for n in converted.graph.nodes)
    # The linear layer's inputs, weights and outputs in 7 bits or more; 128 products.
    error = (converted(IMAGES) - model(IMAGES)).norm() / model(IMAGES).norm()
    assert error < 3 * 2.0**-5
    with pytest.raises(torch.fx.proxy.TraceError):
        prepare(MODELS["fused with its norm"]().train(aware), mapping, (IMAGES,))


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantization_of_what_follows(quantization):
    model = MODELS["fused"]()
    quantized = quantization.quantize_dynamic(model, {nn.Linear})
    assert isinstance(quantized[0], fusedcnn.ConvReLUMaxPool2d)
    assert torch.equal(quantized[:5](IMAGES), model[:5](IMAGES))


@pytest.mark.parametrize("model", MODELS)
def test_ordinary_walks_copies_and_files_go_on(model):
    fused = MODELS[model]()
    seen = []
    fused.apply(seen.append)
    assert seen == [*list(fused.modules())[1:], fused]
    assert [list(m.named_children()) for m in fused] == [[] for _ in fused]
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(file, weights_only=False),
        nn.Sequential(*(copy.copy(m) for m in fused)),
    ):
        assert torch.equal(twin(IMAGES), fused(IMAGES))
