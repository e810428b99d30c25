"""The charts of a report: plain values to Plotly figures as JSON.

All colours are in PALETTE: the page exchanges them for their partners in a dark colour scheme.
Every series has a marker shape or a hatch of its own besides its colour.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go

from pds_ray.report.values import Json
from pds_ray.store.evaluation_folder import AVERAGE, RECALL_TITLES

INK, GRID, FADED, PAPER = "#2a2d33", "#e2dfd8", "#8a8f98", "#fdfcfa"
SERIES = ("#0072b2", "#c4520a", "#00795a", "#a8447c", "#8f6200", "#4b5563")
"""After Okabe and Ito, darkened where needed to stand out by 3:1 from a white page."""
SCALE = ((0.0, "#d3e5f2"), (0.25, "#9cc5e0"), (0.5, "#5a9fcb"), (0.75, "#2372a8"), (1.0, "#08315c"))
PALETTE = {  # on light paper -> on dark paper
    INK: "#dcdee2",
    GRID: "#33373f",
    FADED: "#7e8590",
    PAPER: "#1b1d22",
    SERIES[0]: "#58aee6",
    SERIES[1]: "#f08c4f",
    SERIES[2]: "#35c196",
    SERIES[3]: "#e096c1",
    SERIES[4]: "#e3b545",
    SERIES[5]: "#aeb6c2",
    SCALE[0][1]: "#1f3a52",
    SCALE[1][1]: "#2b5f8a",
    SCALE[2][1]: "#4a90c2",
    SCALE[3][1]: "#93c3e6",
    SCALE[4][1]: "#e3f1fb",
}
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")
HATCHES = ("", "/", ".", "x", "-", "\\")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
RECALL_NAMES = {**RECALL_TITLES, "r_mean": "mean"}
HOVER_WIDTH, HOVER_LINES = 48, 4
BINS = 40


def plain(text: str) -> str:
    """Escape untrusted text for Plotly, which takes a part of HTML for markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def run_figures(report: Json) -> Json:
    """Return name -> figure of a run, for the figures that there is data for."""
    found: Json = {}
    clusters, plane = report["clusters"], report["space"]
    if clusters:
        found["sizes"] = _sizes(clusters)
        if clusters["shared"]:
            found["shared"] = _shared(clusters)
        if clusters["table"]:
            found["contingency"] = _contingency(clusters)
    if plane:
        found["map-image"] = _map(
            plane["image"],
            plane["captions"],
            "images",
            "image prototypes" if plane["made"] else "chosen images",
        )
        found["map-text"] = _map(
            plane["text"],
            plane["captions"],
            "captions",
            "text prototypes" if plane["made"] else "chosen captions",
        )
    if any(row["seconds"] for row in report["stages"]):
        found["stages"] = _seconds(report["stages"])
    for number, evaluation in enumerate(report["evaluations"]):
        found[f"evaluation-{number}"] = _recalls(evaluation)
    if report["baselines"]:
        found["baselines"] = _baselines(report["baselines"])
    return found


def comparison_figures(comparison: Json) -> Json:
    """Return the figures of a comparison, in the order of `comparison_axes`.

    They are `lines-B` for backbone number B, `bars-B-S` for it and size S, and, where the sets
    differ in bytes and these are known, the frontiers `bytes-B` and `pixels-B`.
    """
    methods, backbones, sizes = comparison_axes(comparison)
    found: Json = {}
    for number, backbone in enumerate(backbones):
        cells = [cell for cell in comparison["cells"] if cell["backbone"] == backbone]
        found[f"lines-{number}"] = _lines(cells, methods, len(sizes) > 1)
        for size in sizes:
            found[f"bars-{number}-{size}"] = _method_bars(
                [c for c in cells if c["size"] == size], methods
            )
        if len(sizes) > 1 and all(cell["bytes"] for cell in cells):
            found[f"bytes-{number}"] = _frontier(cells, methods, "bytes", "bytes")
        if len(sizes) > 1 and all(cell["pixels_per_epoch"] for cell in cells):
            title = "pixels per epoch of training"
            found[f"pixels-{number}"] = _frontier(cells, methods, "pixels_per_epoch", title)
    return found


def comparison_axes(comparison: Json) -> tuple[list[str], list[str], list[int]]:
    """Return methods, backbones (the average first) and sizes (ascending).

    A size is a number of pairs, or a budget in bytes where budgets decide.
    """
    cells = comparison["cells"]
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    backbones = sorted(
        dict.fromkeys(cell["backbone"] for cell in cells), key=lambda name: name != AVERAGE
    )
    return methods, backbones, sorted({cell["size"] for cell in cells})


def make_figure(traces: list[Any], label: str, height: int, **layout: Any) -> Json:
    """Return a figure in the page's style; `label` is its text for screen readers."""
    title = {"standoff": 8, "font": {"size": 13}}
    axis = {
        "title": title,
        "gridcolor": GRID,
        "zerolinecolor": GRID,
        "linecolor": GRID,
        "tickcolor": GRID,
        "automargin": True,
    }
    figure = go.Figure(traces)
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 8, "r": 8, "t": 8, "b": 8, "pad": 2},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 13, "color": INK},
        hoverlabel={
            "bgcolor": PAPER,
            "bordercolor": FADED,
            "font": {"family": FONT, "size": 13, "color": INK},
        },
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        dragmode=False,
    )
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    figure.update_layout(**layout)
    return {"label": label, "figure": json.loads(figure.to_json())}


def _hatch(number: int) -> Json:
    """Return colour and hatch of the number-th series of bars."""
    return {
        "color": SERIES[number % len(SERIES)],
        "pattern": {
            "shape": HATCHES[(number + number // len(SERIES)) % len(HATCHES)],
            "fillmode": "overlay",
            "fgcolor": PAPER,
            "fgopacity": 0.6,
            "size": 6,
            "solidity": 0.25,
        },
        "line": {"width": 0},
    }


def _histogram(values: np.ndarray, edges: np.ndarray) -> tuple[list[float], list[int], list[str]]:
    """Return centres, counts and names of whole-number bins."""
    counts, _ = np.histogram(values, edges)
    names = [
        f"{int(low):,}" if high - low == 1 else f"{int(low):,} to {int(high) - 1:,}"
        for low, high in pairwise(edges)
    ]
    return ((edges[:-1] + edges[1:] - 1) / 2).tolist(), counts.tolist(), names


def _edges(largest: int) -> np.ndarray:
    """Return the edges of at most BINS bins of equal whole width from 0 to `largest`."""
    width = max(1, -(-(largest + 1) // BINS))
    return np.arange(0, largest + width + 1, width)


def _sizes(clusters: Json) -> Json:
    both = {modality: np.asarray(values) for modality, values in clusters["sizes"].items()}
    edges = _edges(int(max(values.max() for values in both.values())))
    traces = []
    for number, (modality, values) in enumerate(both.items()):
        x, y, names = _histogram(values, edges)
        traces.append(
            go.Bar(
                x=x,
                y=y,
                name=f"{modality} clusters",
                marker=_hatch(number),
                customdata=names,
                hovertemplate=f"%{{customdata}} pairs: %{{y:,}} {modality} clusters<extra></extra>",
            )
        )
    label = "Histogram of cluster sizes in pairs. " + " ".join(
        f"{modality} clusters: smallest {values.min():,}, median {np.median(values):,.0f}, "
        f"largest {values.max():,}."
        for modality, values in both.items()
    )
    axes = {
        "xaxis": {"title": {"text": "pairs in a cluster"}},
        "yaxis": {"title": {"text": "clusters"}},
    }
    return make_figure(traces, label, 300, barmode="group", bargap=0.08, bargroupgap=0, **axes)


def _shared(clusters: Json) -> Json:
    values = np.asarray(clusters["shared"])
    x, y, names = _histogram(values, _edges(int(values.max())))
    bar = go.Bar(
        x=x,
        y=y,
        marker={"color": SERIES[2], "line": {"width": 0}},
        customdata=names,
        hovertemplate="%{customdata} shared pairs: %{y:,} matches<extra></extra>",
    )
    label = (
        f"Histogram of the pairs that matches share: median {np.median(values):,.0f}, "
        f"largest {values.max():,}."
    )
    axes = {
        "xaxis": {"title": {"text": "pairs shared by a match"}},
        "yaxis": {"title": {"text": "matches"}},
    }
    return make_figure([bar], label, 300, bargap=0.08, **axes)


def _contingency(clusters: Json) -> Json:
    table = np.asarray(clusters["table"])
    largest = max(int(table.max()), 1)
    filled = table > 0
    z = np.where(filled, np.log10(np.maximum(table, 1)).round(3), np.nan)
    heat = go.Heatmap(
        z=[
            [value if mark else None for value, mark in zip(*row, strict=True)]
            for row in zip(z.tolist(), filled, strict=True)
        ],
        text=[[f"{value:,}" if value else "" for value in row] for row in table.tolist()],
        colorscale=SCALE,
        zmin=0,
        zmax=max(float(np.log10(largest)), 0.1),
        hoverongaps=False,
        hovertemplate="image cluster of match %{y}<br>text cluster of match %{x}<br>"
        "%{text} pairs<extra></extra>",
        colorbar=_log_scale(largest),
    )
    inside, total = int(np.trace(table)), int(table.sum())
    label = (
        f"Heat map of the contingency table of {len(table)} matches: {inside:,} of the {total:,} "
        "pairs in it lie on the diagonal, in matched clusters."
    )
    axis = {"automargin": False, "zeroline": False}
    layout = {
        "xaxis": {"title": {"text": "text clusters, in the order of matches"}, **axis},
        "yaxis": {
            "title": {"text": "image clusters, in the order of matches"},
            "autorange": "reversed",
            **axis,
        },
        "margin": {"l": 58, "r": 12, "t": 44, "b": 48, "pad": 2},
        "meta": {"square": True},
    }
    return make_figure([heat], label, 640, **layout)


def _log_scale(largest: int) -> Json:
    """Return a colour bar above the chart for the decimal logarithms of 1 to `largest`."""
    ticks = [
        value for power in range(8) for value in (10**power, 3 * 10**power) if value <= largest
    ]
    return {
        "tickvals": [float(np.log10(value)) for value in ticks],
        "ticktext": [f"{value:,}" for value in ticks],
        "tickangle": 0,
        "thickness": 10,
        "outlinewidth": 0,
        "orientation": "h",
        "len": 1,
        "x": 0,
        "xanchor": "left",
        "y": 1.01,
        "yanchor": "bottom",
    }


def _hover(number: int, caption: str) -> str:
    """Return a caption in a few lines, escaped."""
    lines, line = [], ""
    for word in caption[: HOVER_WIDTH * HOVER_LINES].split():
        for piece in (word[at : at + HOVER_WIDTH] for at in range(0, len(word), HOVER_WIDTH)):
            if line and len(line) + len(piece) + 1 > HOVER_WIDTH:
                lines.append(line)
                line = ""
            line = f"{line} {piece}".strip()
    lines.append(line)
    end = " …" if len(caption) > HOVER_WIDTH * HOVER_LINES else ""
    return f"pair {number}<br>" + "<br>".join(plain(line) for line in lines) + end


def _map(plane: Json, captions: list[str], rows: str, prototypes: str) -> Json:
    sample = np.asarray(plane["sample"], np.float32)
    ours = np.asarray(plane["prototypes"], np.float32)
    first, second = plane["explained"]
    grey = {"size": 4, "color": FADED, "opacity": 0.45, "symbol": "circle"}
    marked = {
        "size": 9 if len(ours) <= 300 else 6,
        "color": SERIES[1],
        "symbol": "diamond",
        "line": {"width": 1, "color": PAPER},
    }
    hovers = [_hover(number, caption) for number, caption in enumerate(captions)]
    named = {"text": hovers, "hovertemplate": "%{text}<extra></extra>"}
    traces = [
        _points(sample, rows, grey, hoverinfo="skip"),
        _points(ours, prototypes, marked, **named),
    ]
    label = (
        f"Scatter plot of {len(sample):,} {rows} and {len(ours):,} {prototypes} in the first two "
        f"principal components, which explain {first:.1%} and {second:.1%} of the variance."
    )
    across, up = f"first component, {first:.1%} of the variance", f"second component, {second:.1%}"
    axes = {
        "xaxis": {"title": {"text": across}, "zeroline": False},
        "yaxis": {"title": {"text": up}, "zeroline": False},
    }
    return make_figure(traces, label, 440, meta={"zoom": True}, **axes)


def _points(points: np.ndarray, name: str, marker: Json, **hover: Any) -> Any:
    """Return a trace of points [n, 2]."""
    x, y = points.T
    return go.Scatter(x=x, y=y, mode="markers", name=name, marker=marker, **hover)


def _seconds(stages: list[Json]) -> Json:
    bar = go.Bar(
        x=[row["seconds"] for row in stages],
        y=[plain(row["stage"]) for row in stages],
        orientation="h",
        marker={"color": SERIES[0], "line": {"width": 0}},
        text=[f"{row['seconds']:,.1f} s" for row in stages],
        textposition="auto",
        hovertemplate="%{y}: %{text}<extra></extra>",
    )
    label = (
        "Seconds of each stage: "
        + ", ".join(f"{row['stage']} {row['seconds']:,.1f}" for row in stages)
        + "."
    )
    return make_figure(
        [bar],
        label,
        60 + 34 * len(stages),
        xaxis={"title": {"text": "seconds"}, "rangemode": "tozero"},
        yaxis={"autorange": "reversed", "type": "category", "ticksuffix": " "},
        bargap=0.35,
    )


def _error(values: list[float | None]) -> Json:
    return {
        "type": "data",
        "array": [value or 0 for value in values],
        "color": INK,
        "thickness": 1.2,
        "width": 3,
    }


def _recalls(evaluation: Json) -> Json:
    series = [(row["name"], row["mean"], row["std"]) for row in evaluation["backbones"]]
    if len(series) > 1:
        series.append((AVERAGE, evaluation["mean"], evaluation["std"]))
    traces = [
        go.Bar(
            x=list(RECALL_NAMES.values()),
            y=[mean[name] for name in RECALL_NAMES],
            error_y=_error([std[name] for name in RECALL_NAMES]),
            name=plain(title),
            marker=_hatch(number),
            hovertemplate="%{x}: %{y:.1f} ± %{error_y.array:.1f} %<extra>%{fullData.name}</extra>",
        )
        for number, (title, mean, std) in enumerate(series)
    ]
    label = "Bar chart of recalls in percent; the figures are in the table below it."
    axes = {
        "xaxis": {"type": "category"},
        "yaxis": {"title": {"text": "recall, %"}, "rangemode": "tozero"},
    }
    return make_figure(
        traces, label, 340, barmode="group", bargap=0.25, bargroupgap=0.06, showlegend=True, **axes
    )


def _value_bars(
    names: list[str],
    means: list[float | None],
    stds: list[float | None],
    kinds: list[int],
    label: str,
) -> Json:
    """Return a chart with a bar per value, whose colour and hatch are number `kinds`.

    Each bar is a trace of its own, as a trace has only one hatch.
    """
    bars = [
        go.Bar(
            x=[mean],
            y=[plain(name)],
            orientation="h",
            error_x=_error([std]),
            marker=_hatch(kind),
            hovertemplate="%{y}: %{x:.1f} ± %{error_x.array:.1f} %<extra></extra>",
        )
        for name, mean, std, kind in zip(names, means, stds, kinds, strict=True)
    ]
    return make_figure(
        bars,
        label,
        70 + 36 * len(names),
        xaxis={"title": {"text": "mean recall, %"}, "rangemode": "tozero"},
        yaxis={"autorange": "reversed", "type": "category", "ticksuffix": " "},
        barmode="overlay",
        bargap=0.35,
        showlegend=False,
    )


def _baselines(baselines: Json) -> Json:
    bars = sorted(baselines["bars"], key=lambda bar: -(bar["mean"]["r_mean"] or 0))
    names = [
        bar["method"] + (" (this run)" if bar["own"] and bar["method"] != "this run" else "")
        for bar in bars
    ]
    means, stds = [bar["mean"]["r_mean"] for bar in bars], [bar["std"]["r_mean"] for bar in bars]
    size = (
        f"{baselines['budget']:,} bytes" if baselines["budget"] else f"{baselines['pairs']:,} pairs"
    )
    label = f"Bar chart of the mean recall at {size}: " + ", ".join(
        f"{name} {mean or 0:.1f} %" for name, mean in zip(names, means, strict=True)
    )
    return _value_bars(names, means, stds, [0 if bar["own"] else 5 for bar in bars], label)


def _spread(cell: Json) -> float | None:
    """Return the deviation of a cell's r_mean over its sets, or over models if there is one set."""
    of_sets = cell["set_std"]["r_mean"]
    return cell["std"]["r_mean"] if of_sets is None else of_sets


def _method_bars(cells: list[Json], methods: list[str]) -> Json:
    cells = sorted(cells, key=lambda cell: -(cell["mean"]["r_mean"] or 0))
    names = [cell["method"] for cell in cells]
    means, stds = [cell["mean"]["r_mean"] for cell in cells], list(map(_spread, cells))
    label = "Bar chart of the mean recall of each method; the figures are in the table."
    return _value_bars(names, means, stds, [methods.index(name) for name in names], label)


def _line(cells: list[Json], method: str, number: int, several: bool, over: str = "pairs") -> Any:
    """Return the trace of the number-th method `over` a count, at `several` sizes or one."""
    of_method = (cell for cell in cells if cell["method"] == method)
    own = sorted(of_method, key=lambda cell: cell[over])
    color, turn = SERIES[number % len(SERIES)], number // len(SERIES)
    return go.Scatter(
        x=[cell[over] for cell in own],
        y=[cell["mean"]["r_mean"] for cell in own],
        text=[f"{cell['pairs']:,} pairs" for cell in own],
        error_y={**_error(list(map(_spread, own))), "color": color},
        name=plain(method),
        mode="lines+markers" if several else "markers",
        line={"color": color, "width": 2, "dash": DASHES[turn % len(DASHES)]},
        marker={"symbol": SYMBOLS[(number + turn) % len(SYMBOLS)], "size": 9, "color": color},
        hovertemplate=("" if over == "pairs" else f"%{{x:,}} {over.replace('_', ' ')}, ")
        + "%{text}: %{y:.1f} ± %{error_y.array:.1f} %<extra>%{fullData.name}</extra>",
    )


def _frontier(cells: list[Json], methods: list[str], over: str, title: str) -> Json:
    """Return the chart of the mean recall of each method over what its sets cost."""
    traces = [_line(cells, method, number, True, over) for number, method in enumerate(methods)]
    label = (
        f"Line chart of the mean recall of each method over {title}; the figures are in the table."
    )
    return make_figure(
        traces,
        label,
        400,
        xaxis={"title": {"text": title}, "type": "log", "tickformat": "~s"},
        yaxis={"title": {"text": "mean recall, %"}},
        showlegend=True,
    )


def _lines(cells: list[Json], methods: list[str], several: bool) -> Json:
    traces = [_line(cells, method, number, several) for number, method in enumerate(methods)]
    counts = sorted({cell["pairs"] for cell in cells})
    label = (
        "Line chart of the mean recall of each method over the number of pairs; "
        "the figures are in the table."
    )
    return make_figure(
        traces,
        label,
        400,
        xaxis={
            "title": {"text": "pairs"},
            "type": "log",
            "tickvals": counts,
            "ticktext": [f"{c:,}" for c in counts],
        },
        yaxis={"title": {"text": "mean recall, %"}},
        showlegend=True,
    )
