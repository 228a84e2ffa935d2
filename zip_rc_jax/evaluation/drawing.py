"""What evaluation and training both draw: `matplotlib.figure.Figure` objects on the Agg canvas (no
pyplot, so no global state)."""

from __future__ import annotations

import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from zip_rc_jax.evaluation.metrics import total_variation
from zip_rc_jax.grid import Grid
from zip_rc_jax.runtime.extras import optional_import
from zip_rc_jax.runtime.temporaries import whole_file

with optional_import():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

# No label above 100%: the axis may reach higher to make room for the names of the curves.
percent = FuncFormatter(lambda share, _: f"{round(100 * share, 2):g}%" if share < 1.001 else "")


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A white figure of `width` x `height` inches and its `[rows, columns]` axes.

    `options` go to `Figure.subplots`.
    """
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
        axis.set_axisbelow(True)
    return figure, axes


def save(figure: Figure, path: str | pathlib.Path) -> pathlib.Path:
    """Writes a PNG through a temporary file, so that a reader never sees half an image.

    Returns the path.
    """
    path = pathlib.Path(path)
    with whole_file(path) as file:
        figure.savefig(file, format="png")
    return path


def joint_heatmaps(
    predicted: Any, empirical: Any, grid: Grid, titles: Sequence[str] = (), note: str = ""
) -> Figure:
    """Predicted against empirical joint, one row per prefix: the same colour scale on both sides,
    probability in percent.

    Args:
      predicted, empirical: `[K, B_V, B_T]` (or one `[B_V, B_T]`), each joint summing to 1.
      grid: names the bins.
      titles: K row titles.
      note: text above everything.
    """
    predicted = np.asarray(predicted, np.float64).reshape(-1, grid.n_reward, grid.n_length)
    empirical = np.asarray(empirical, np.float64).reshape(predicted.shape)
    distance = total_variation(predicted, empirical)
    height = 0.9 + (0.9 + 0.3 * grid.n_reward) * len(predicted)
    figure, axes = new_figure(
        3.0 + 1.0 * grid.n_length, height, len(predicted), 2, sharex=True, sharey=True
    )
    if note:
        # 13 characters an inch
        figure.suptitle(
            textwrap.fill(note, round(13 * figure.get_figwidth())), fontsize=9, parse_math=False
        )
    top = max(predicted.max(), empirical.max())
    for k, row in enumerate(axes):
        prefix = f"{titles[k]}: " if titles else ""
        for axis, joint, title in zip(
            row, (predicted[k], empirical[k]), ("predicted", "empirical"), strict=True
        ):
            image = axis.imshow(
                joint, origin="lower", aspect="auto", cmap="cividis", vmin=0, vmax=top
            )
            compared = f" (total variation {distance[k]:.2f})" if title == "predicted" else ""
            axis.set_title(f"{prefix}{title}{compared}", fontsize=10, parse_math=False)
            for (b, cell), p in np.ndenumerate(joint):
                if p >= 0.005:
                    axis.text(
                        cell,
                        b,
                        f"{100 * p:.0f}",
                        ha="center",
                        va="center",
                        fontsize=7.5,
                        color="black" if p > top / 2 else "white",
                    )
        row[0].set_ylabel("final reward", fontsize=9)
        row[0].set_yticks(range(grid.n_reward), [f"{v:.2g}" for v in grid.reward_centres])
    ends = [str(edge) for edge in grid.length_edges[1:-1]]
    names = [f"<{ends[0]}", *(f"{a}+" for a in ends)] if ends else ["all"]
    for axis in axes[-1]:
        axis.set_xlabel("remaining tokens", fontsize=9)
        axis.set_xticks(range(grid.n_length), names)
    figure.colorbar(image, ax=axes, shrink=0.9, label="probability", format=percent)
    return figure
