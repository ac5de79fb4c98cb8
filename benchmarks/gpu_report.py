"""Markdown tables and plots from what bench_gpu.py wrote.

python benchmarks/gpu_report.py FILE.json [--plot FILE.png]     # plots need matplotlib: pip install '.[eval]'
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLOURS = {
    "kernel": "C0",
    "kernel, one segment": "C9",
    "kernel, wgmma": "C6",
    "kernel, slices": "C4",
    "fla": "C2",
    "pytorch": "C1",
    "softmax, flash": "C3",
    "softmax, cudnn": "C4",
    "limit": "grey",
}
STYLES = ("--", "-", ":", "-.")


def tables(report: Row, short: bool = False) -> str:
    """What was measured, and on what."""
    times, decoding = report["times"], report["decoding"]
    if short:
        most = max((row["features"] or 0 for row in times), default=0)
        times = [row for row in times if row["method"] != "kernel, one segment" and row["features"] in (None, most)]
        decoding = [row for row in decoding if row["graph"] and row["features"] in (None, most)]
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items() if value)
    changed = " (with changes)" if report["changed_files"] else ""
    parts = [f"{report['device']}; {versions}; commit {report['commit']}{changed}."]
    if report["ceilings"]:
        tera = {name: value / 1e12 for name, value in report["ceilings"].items()}
        parts.append(
            f"Ceilings of the same run: {tera['flop_per_s']:.3g} TFLOP/s, {tera['bytes_per_s']:.3g} TB/s. In brackets, "
            "how much of the limit that they set was reached."
        )
    for passes, heads in sorted({(row["pass"], row["heads"]) for row in times}):
        rows = [row for row in times if (row["pass"], row["heads"]) == (passes, heads)]
        parts.append(_table(f"{passes}, {heads} heads, ms", rows, "length", time_cell))
        if not short:
            parts.append(_table(f"{passes}, {heads} heads, MB beyond inputs and outputs", rows, "length", memory_cell))
    if decoding:
        parts.append(_table(f"one token, {decoding[0]['heads']} heads, µs", decoding, "batch", token_cell))
    return "\n\n".join(parts)


def _table(title: str, rows: list[Row], column: str, cell: Callable[[Row], str]) -> str:
    columns = sorted({row[column] for row in rows})
    lines = [f"| {title} | " + " | ".join(_short(value) for value in columns) + " |"]
    lines.append("|:--|" + "--:|" * len(columns))
    for label in dict.fromkeys(map(label_of, rows)):
        found = {row[column]: cell(row) for row in rows if label_of(row) == label}
        lines.append(f"| {label} | " + " | ".join(found.get(value, "") for value in columns) + " |")
    return "\n".join(lines)


def label_of(row: Row) -> str:
    """The method and what sets its cost, apart from the length or the batch."""
    words = [row["method"]]
    if row.get("features"):
        words.append(f"F={row['features']}")
    if row.get("positions"):
        words.append(f"{_short(row['positions'])} positions")
    if row.get("graph"):
        words.append("in a graph")
    return ", ".join(words)


def _short(number: int) -> str:
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else str(number)


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _missing(row: Row) -> str | None:
    if "skipped" in row:
        return "–"
    return ("no memory" if row["failed"] == "out of memory" else "failed") if "failed" in row else None


def time_cell(row: Row) -> str:
    return _missing(row) or f"{_digits(1e3 * row['seconds'])} ({row['fraction_of_limit']:.0%})"


def token_cell(row: Row) -> str:
    return _missing(row) or f"{_digits(1e6 * row['seconds'])} ({row['fraction_of_limit']:.0%})"


def memory_cell(row: Row) -> str:
    return _missing(row) or _digits(row["extra_bytes"] / 1e6)


def plot(report: Row, file: Path) -> None:
    """Times over the length, one panel for each pass and number of heads; over the batch for decoding in a graph."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(row["pass"], row["heads"]) for row in report["times"]})
    figure, axes = pyplot.subplots(
        1, len(panels) + 1, figsize=(5 * (len(panels) + 1), 5), layout="constrained", squeeze=False
    )
    for axis, (passes, heads) in zip(axes[0], panels, strict=False):
        rows = [row for row in report["times"] if (row["pass"], row["heads"]) == (passes, heads)]
        limits = [{**row, "method": "limit", "seconds": row["limit_s"]} for row in rows if row["method"] == "kernel"
                  and "seconds" in row]  # fmt: skip
        _lines(axis, [*rows, *limits], "length", f"{passes}, {heads} heads", 1e3, "ms")
    in_graph = [row for row in report["decoding"] if row["graph"]]
    _lines(axes[0][-1], in_graph, "batch", "one token, in a graph", 1e6, "µs")
    figure.suptitle(str(report["device"]))
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def plot_beside(report: Row, file: Path) -> str:
    """Writes the plot as PNG beside the JSON `file`; in words what came of it."""
    picture = file.with_suffix(".png")
    if not report["times"]:
        return "no plot: nothing was timed"
    try:
        plot(report, picture)
    except ImportError as error:
        return f"no plot: {error}; `python benchmarks/gpu_report.py {file}` makes it where there is matplotlib"
    return f"plot: {picture}"


def _lines(axis: Any, rows: Iterable[Row], column: str, title: str, factor: float, unit: str) -> None:
    """A colour for each method, a style for each number of features or positions."""
    measured = [row for row in rows if "seconds" in row]
    for label in dict.fromkeys(map(label_of, measured)):
        mine = sorted((row for row in measured if label_of(row) == label), key=lambda row: row[column])
        method, size = mine[0]["method"], mine[0].get("features") or mine[0].get("positions")
        sizes = sorted(
            {row.get("features") or row.get("positions") or 0 for row in measured if row["method"] == method}
        )
        axis.plot(
            [row[column] for row in mine],
            [factor * row["seconds"] for row in mine],
            color=COLOURS[method],
            linestyle=STYLES[sizes.index(size or 0) % len(STYLES)],
            marker=None if method == "limit" else ".",
            label=label.removesuffix(", in a graph"),
        )
    ticks = sorted({row[column] for row in measured})
    axis.set(title=title, xlabel="tokens" if column == "length" else column, ylabel=unit, xscale="log", yscale="log")
    axis.set_xticks(ticks, [_short(value) for value in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    if measured:
        axis.legend(fontsize="x-small")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--plot", type=Path, help="by default beside the report, as PNG")
    chosen = parser.parse_args(arguments)
    report = json.loads(chosen.report.read_text(encoding="utf-8"))
    print(tables(report, chosen.short))
    print(f"\n{plot_beside(report, chosen.plot or chosen.report)}")


if __name__ == "__main__":
    main()
