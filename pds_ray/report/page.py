"""One HTML file that stands alone: it sends no requests and runs only its own scripts.

Untrusted data (captions, keys, names of sources) reaches the page as JSON in a data block and from
there as text nodes. The policy in the page's head allows two scripts by their hashes: report.js and
Plotly.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from pds_ray.report.evaluations import ReportError
from pds_ray.report.figures import PALETTE, comparison_axes, comparison_figures, run_figures
from pds_ray.report.gather import gather
from pds_ray.report.learned_figures import learned_figures
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder
from pds_ray.telemetry.progress import progress_bar

_ONLY_FOR_FIGURES = ("clusters", "space", "baselines")


def write_report(path: str, out: str | None = None, quick: bool = False) -> str:
    """Write the report of a run folder or comparison, by default into it; return its path.

    `quick` leaves out what takes long on a very large run. Raises ReportError in one line if there
    is nothing to report on, or if the page cannot be written.
    """
    with progress_bar("report", None, "steps") as bar:
        page = render(gather(path, quick, bar.update))
    folder, _, name = out.rpartition("/") if out else (path, "", RunFolder.REPORT)
    target = Folder(folder or ("/" if out and out.startswith("/") else "."))
    try:
        target.write_bytes(name, page.encode())
    except OSError as error:
        raise ReportError(
            f"cannot write {(target / name).shown}: {error.strerror or error}"
        ) from error
    return (target / name).shown


def render(report: dict[str, Any]) -> str:
    """Return the page of what `gather` returned."""
    if report["kind"] == "run":
        figures = {**run_figures(report), **learned_figures(report["learned"])}
        shown = {name: value for name, value in report.items() if name not in _ONLY_FOR_FIGURES}
        if learned := report["learned"]:
            of_charts = ("history", "similarity")
            shown["learned"] = {n: v for n, v in learned.items() if n not in of_charts}
        shown["clusters"] = _cluster_figures(report["clusters"])
        shown["space"] = report["space"] and {
            "fitted_on": {m: report["space"][m]["fitted_on"] for m in ("image", "text")}
        }
        shown["baselines"] = report["baselines"] and {
            name: report["baselines"][name] for name in ("pairs", "budget", "protocol")
        }
    else:
        figures = comparison_figures(report)
        methods, backbones, pairs = comparison_axes(report)
        shown = {**report, "methods": methods, "backbones": backbones, "counts": pairs}
    own = files("pds_ray.report")
    script = _script(own.joinpath("report.js").read_text("utf-8"))
    plotly = _script(get_plotlyjs())
    return Template(own.joinpath("template.html").read_text("utf-8")).substitute(
        hashes=f"'{_hash(script)}' '{_hash(plotly)}'",
        css=own.joinpath("report.css").read_text("utf-8"),
        data=_data({**shown, "palette": PALETTE, "charts": list(figures)}),
        figures=_data(figures),
        script=script,
        plotly=plotly,
    )


def _cluster_figures(clusters: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the figures that the page's text gives; the arrays are in the charts."""
    if clusters is None:
        return None
    words = (
        "clusters",
        "empty",
        "pairless",
        "pairless_policy",
        "shared_pairs",
        "kept_pairs",
        "matches_total",
    )
    return {name: clusters[name] for name in words} | {"matches_shown": len(clusters["matches"])}


def _data(value: Any) -> str:
    """Return JSON that can neither end the script element around it nor begin another one."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _script(text: str) -> str:
    """Return a script as it stands in the page and is hashed: parsers see only line feeds."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "</script" in text.lower() or "<!--" in text:
        raise ValueError("a script that cannot stand inside a page")
    return text


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
