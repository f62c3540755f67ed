"""Tables and pictures of benchmark documents."""

import sys
from collections.abc import Callable

from crane.errors import SettingsError


def table(rows: list[dict]) -> str:
    """The rows under one head, columns as wide as they need to be."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *[[str(row.get(name, "")) for name in names] for row in rows]]
    widths = [max(len(line[place]) for line in cells) for place in range(len(names))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths)) for line in cells)


def numbers(flag: str, text: str) -> list[int]:
    """Whole numbers above 0, separated by commas. Raises SettingsError naming the flag."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise SettingsError(f"{flag} must be whole numbers above 0, separated by commas, got {text!r}")
    return found


def plot_bars(path: str, rows: list[dict], columns: dict[str, str], label: Callable[[dict], str]) -> None:
    """Bars of some columns, by their names in the picture, for every row. Says so where matplotlib is missing.

    label(row): what stands below its bars.
    """
    try:
        import matplotlib
    except ImportError:
        print("crane bench: --plot needs matplotlib (pip install matplotlib); nothing is drawn", file=sys.stderr)
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(2 + 1.2 * len(rows), 4), layout="constrained")
    width = 0.8 / len(columns)
    for place, (name, column) in enumerate(columns.items()):
        left = [index + place * width for index in range(len(rows))]
        bars = axes.bar(left, [row[column] for row in rows], width, label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    middle = 0.4 - width / 2
    axes.set_xticks([index + middle for index in range(len(rows))], [label(row) for row in rows], fontsize=8)
    axes.set_ylabel("tokens/s")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
