"""Models that other people have defined: torchvision's and timm's."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from torch import nn


def import_or_skip(name: str) -> ModuleType:
    """torchvision or timm; torchvision also beside a torch that its binary was not built for.

    Its model definitions are Python and need no operators of its own. But it describes one to torch
    when it is imported, which fails where its library did not load: a schema mends that.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is not installed: {error}")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    import_or_skip.library = library  # the schemas live as long as it does
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(name)


def build(library: str, name: str) -> nn.Module:
    """A model in float64, with parameters that keep activations and gradients near 1.

    The wide linear layers of AlexNet and VGG, 120 million parameters behind the last pool, are made
    narrow: they say nothing about the convolutions, and would take most of the time.
    """
    import_or_skip("torchvision")
    # With init_weights it would draw numbers for parameters that have no memory yet.
    options = {"aux_logits": True, "init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        if library == "timm":
            model = import_or_skip("timm").create_model(name, num_classes=10)
            if name.startswith("vgg"):
                model.pre_logits = type(model.pre_logits)(512, 32, 7)
                model.head.fc = nn.Linear(32, 10)
        else:
            models = importlib.import_module("torchvision.models")
            model = getattr(models, name)(num_classes=10, **options)
            if name.startswith(("alexnet", "vgg")):
                places = [i for i, m in enumerate(model.classifier) if isinstance(m, nn.Linear)]
                widths = [model.classifier[places[0]].in_features, 32, 32, 10]
                for place, inputs, outputs in zip(places, widths, widths[1:], strict=False):
                    model.classifier[place] = nn.Linear(inputs, outputs)
    model = model.to_empty(device="cpu").double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.uniform_(module.bias, -0.1, 0.1)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
                module.num_batches_tracked.zero_()
    return model
