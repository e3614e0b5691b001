"""SimpleCNN from stock layers and fused, side by side: output, one training step, time.

Usage: python examples/quickstart.py
"""

import copy
import time

import fusedcnn
import torch

torch.manual_seed(0)
stock = fusedcnn.SimpleCNN(num_classes=10)
fused = fusedcnn.fuse(copy.deepcopy(stock))  # the copy's own parameters, equal at the start
criterion = torch.nn.CrossEntropyLoss()

images, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
rows = {"output shape": [], "loss of the first step": [], "training step, batch 64": []}
outputs = []
for model in (stock, fused):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    with torch.no_grad():
        outputs.append(model.eval()(images[:4]))
    rows["output shape"].append(str(list(outputs[-1].shape)))

    torch.manual_seed(1)  # the same dropout masks for both
    model.train()
    loss = fusedcnn.train_step(model, criterion, optimizer, images, labels)
    rows["loss of the first step"].append(f"{loss.item():.4f}")

    begin = time.perf_counter()
    for _ in range(10):
        fusedcnn.train_step(model, criterion, optimizer, images, labels)
    rows["training step, batch 64"].append(f"{(time.perf_counter() - begin) / 10 * 1e3:.1f} ms")

print(f"{'':25}{'stock':>10}{'fused':>10}")
for what, (of_stock, of_fused) in rows.items():
    print(f"{what:25}{of_stock:>10}{of_fused:>10}")
print(f"largest difference of the outputs: {(outputs[0] - outputs[1]).abs().max():.1e}")
