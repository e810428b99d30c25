"""The charts of an optimisation: losses over iterations, similarity before and after."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from pds_ray.report.figures import DASHES, SCALE, SERIES, make_figure, plain
from pds_ray.report.values import Json


def learned_figures(learned: Json | None) -> Json:
    """Return name -> figure of the learned parts of a set, for those that there is data for."""
    found: Json = {}
    if learned is None:
        return found
    history, similarity = learned["history"], learned["similarity"]
    if history and history["ratios"]:
        title = "distance to the expert, of 1 at the start"
        found["learned-ratios"] = _lines(history["iteration"], history["ratios"], title)
    if history and history["others"]:
        found["learned-losses"] = _lines(history["iteration"], history["others"], "value")
    values = [value for matrix in similarity.values() for row in matrix for value in row]
    for name, matrix in similarity.items():
        found[f"similarity-{name}"] = _heat(matrix, name, min(values), max(values))
    return found


def _lines(iterations: list[int], series: dict[str, list[float | None]], title: str) -> Json:
    traces = [
        go.Scatter(
            x=iterations,
            y=values,
            name=plain(name),
            mode="lines",
            connectgaps=True,  # a score has a point every so many iterations
            line={
                "color": SERIES[number % len(SERIES)],
                "dash": DASHES[number % len(DASHES)],
                "width": 1.5,
            },
            hovertemplate="iteration %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
        )
        for number, (name, values) in enumerate(series.items())
    ]
    label = f"Line chart over the iterations, {title}. " + " ".join(
        f"{name}: {_known(values)}." for name, values in series.items()
    )
    axes: dict[str, Any] = {
        "xaxis": {"title": {"text": "iteration"}},
        "yaxis": {"title": {"text": title}},
    }
    return make_figure(traces, label, 320, showlegend=True, meta={"zoom": True}, **axes)


def _known(values: list[float | None]) -> str:
    """Return first and last value of a series in words."""
    numbers = [value for value in values if value is not None]
    return f"from {numbers[0]:.4g} to {numbers[-1]:.4g}" if numbers else "no numbers"


def _heat(matrix: list[list[float]], name: str, lowest: float, highest: float) -> Json:
    count = len(matrix)
    heat = go.Heatmap(
        z=matrix,
        colorscale=SCALE,
        zmin=lowest,
        zmax=max(highest, lowest + 1e-6),
        hovertemplate="image %{y}, text %{x}: %{z:.3f}<extra></extra>",
        colorbar={"thickness": 10, "outlinewidth": 0},
    )
    own = sum(matrix[pair][pair] for pair in range(count)) / count
    others = (sum(map(sum, matrix)) - own * count) / max(1, count * (count - 1))
    label = (
        f"Heat map of the similarity of {count} images and text vectors {name} the optimisation: "
        f"{own:.3f} on average within a pair, {others:.3f} between pairs."
    )
    axis = {"automargin": False, "zeroline": False}
    return make_figure(
        [heat],
        label,
        440,
        xaxis={"title": {"text": "text vector of pair"}, **axis},
        yaxis={"title": {"text": "image of pair"}, "autorange": "reversed", **axis},
        margin={"l": 58, "r": 12, "t": 12, "b": 48, "pad": 2},
    )
