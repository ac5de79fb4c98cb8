"""Plots from what bench_7b.py wrote: training's time and memory over the length, generation's time over the position.

python benchmarks/plot_7b.py FILE.json [--plot FILE.png]     # needs matplotlib: pip install '.[eval]'
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LABELS = {"distill": ("loss",), "finetune": ("attention",), "generate": ("attention", "batch")}
"""What tells the lines of a section apart."""
PANELS = (
    ("distill", "length", "seconds", 1.0, "s a step"),
    ("distill", "length", "peak_bytes", 1e-9, "GB over the weights"),
    ("finetune", "length", "seconds", 1.0, "s a step"),
    ("finetune", "length", "peak_bytes", 1e-9, "GB over the weights"),
    ("generate", "position", "ms_per_token", 1.0, "ms a token"),
)


def lines(report: Row, section: str, x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    """The points of each line; rows that ran out of memory or time have none."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in report.get(section, []):
        if not all(name in row for name in LABELS[section]):
            continue  # why there are no more rows
        words = [f"batch {row[name]}" if name == "batch" else str(row[name]) for name in LABELS[section]]
        if y in row:
            found.setdefault(", ".join(words), []).append((row[x], row[y]))
        if y == "seconds" and "teacher_seconds" in row:
            found.setdefault("teacher's forward pass", []).append((row[x], row["teacher_seconds"]))
    return {label: sorted(points) for label, points in found.items()}


def plot(report: Row, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [panel for panel in PANELS if lines(report, *panel[:3])]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, (section, x, y, factor, unit) in zip(axes[0], panels, strict=True):
        for label, points in lines(report, section, x, y).items():
            axis.plot([a for a, _ in points], [factor * b for _, b in points], marker="o", markersize=3, label=label)
        axis.set(title=section, xlabel="tokens" if x == "length" else x, ylabel=unit)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    figure.suptitle(f"{report['device']}, {report['dtype']}")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def plot_beside(report: Row, file: Path) -> str:
    """Writes the plot as PNG beside the JSON `file`; in words what came of it."""
    if not any(lines(report, *panel[:3]) for panel in PANELS):
        return "no plot: there is nothing to plot"
    picture = file.with_suffix(".png")
    try:
        plot(report, picture)
    except ImportError as error:
        return f"no plot: {error}; `python benchmarks/plot_7b.py {file}` makes it where there is matplotlib"
    return f"plot: {picture}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--plot", type=Path, help="by default beside the report, as PNG")
    chosen = parser.parse_args(arguments)
    file = chosen.plot or chosen.report.with_suffix(".png")
    report = json.loads(chosen.report.read_text(encoding="utf-8"))
    if not any(lines(report, *panel[:3]) for panel in PANELS):
        sys.exit(f"{chosen.report} has nothing to plot")
    try:
        plot(report, file)
    except ImportError as error:
        sys.exit(f"no plot: {error}; pip install '.[eval]'")
    print(f"plot: {file}")


if __name__ == "__main__":
    main()
