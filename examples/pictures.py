"""The training curves and a sample of predictions, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Sequence

# Figure without pyplot draws with Agg: no display, no state shared with whoever imports this.
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

# Blue and orange are told apart by colour-blind people too.
TRAIN, TEST, WRONG = "tab:blue", "tab:orange", "tab:red"


def draw_curves(history: Sequence[dict[str, float]], title: str) -> bytes:
    """Draw loss and accuracy by epoch.

    Args:
        history: the rows of the metrics, with keys ``epoch``, ``train_loss``, ``test_loss``,
            ``train_accuracy`` and ``test_accuracy``.
        title: a line for the top.

    Returns:
        A PNG file.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title, parse_math=False)
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for axes, name, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        for kind, colour in (("train", TRAIN), ("test", TEST)):
            values = [scale * row[f"{kind}_{name}"] for row in history]
            last = f"{values[-1]:.4f}" if scale == 1 else f"{values[-1]:.1f}%"
            axes.plot(
                epochs, values, color=colour, marker="o", markersize=4, label=f"{kind} {last}"
            )
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, title="last epoch")
    loss.set_ylabel("cross-entropy")
    loss.set_ylim(bottom=0)
    accuracy.set_ylabel("accuracy, % of images")
    figure.supxlabel("train: mean over the epoch, with dropout on", fontsize=8)
    return _png(figure)


def draw_predictions(
    images: Tensor,
    labels: Tensor,
    probabilities: Tensor,
    class_names: Sequence[str],
    title: str,
    columns: int = 10,
) -> bytes:
    """Draw images with the predicted class and how sure the model is; wrong ones framed in red.

    Args:
        images: uint8 [N, 3, H, W], N at least 1.
        labels: int64 [N], the true classes.
        probabilities: float [N, num_classes], the model's.
        class_names: by label.
        title: a line for the top.
        columns: images in a row.

    Returns:
        A PNG file.
    """
    count = len(labels)
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(1.25 * columns, 6), 1.65 * rows + 0.5), layout="constrained")
    figure.suptitle(title, parse_math=False)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    confidences, predictions = probabilities.max(1)
    for i, axes in enumerate(grid):
        axes.set_xticks([])
        axes.set_yticks([])
        if i >= count:
            axes.set_visible(False)
            continue
        axes.imshow(images[i].permute(1, 2, 0).numpy(), interpolation="nearest")
        label, prediction = int(labels[i]), int(predictions[i])
        text = f"{class_names[prediction]} {confidences[i]:.0%}"
        if prediction == label:
            axes.set_title(text, fontsize=8, pad=3, parse_math=False)
            axes.spines[:].set_visible(False)
        else:
            red = {"color": WRONG, "fontsize": 8, "parse_math": False}
            axes.set_title(text, pad=3, weight="bold", **red)
            axes.set_xlabel(f"is: {class_names[label]}", labelpad=3, **red)
            axes.spines[:].set(edgecolor=WRONG, linewidth=3)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
