"""Tables and pictures of benchmark documents."""

import sys


def table(rows: list[dict]) -> str:
    """The rows under one head, columns as wide as they need to be."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *[[str(row.get(name, "")) for name in names] for row in rows]]
    widths = [max(len(line[place]) for line in cells) for place in range(len(names))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths)) for line in cells)


def plot_bars(path: str, document: dict) -> None:
    """Decode speed of every cell and engine as bars. Says so, and draws nothing, where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("crane bench: --plot needs matplotlib (pip install matplotlib); nothing is drawn", file=sys.stderr)
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = document["rows"]
    columns = [name for name in rows[0] if name.endswith("decode tok/s")]
    figure, axes = pyplot.subplots(figsize=(2 + 1.2 * len(rows), 4), layout="constrained")
    width = 0.8 / len(columns)
    for place, name in enumerate(columns):
        left = [index + place * width for index in range(len(rows))]
        bars = axes.bar(left, [row[name] for row in rows], width, label=name.removesuffix(" decode tok/s"))
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    middle = 0.4 - width / 2
    axes.set_xticks([index + middle for index in range(len(rows))],
                    [f"batch {row['batch']}\ncontext {row['context']}" for row in rows], fontsize=8)
    axes.set_ylabel("decoded tokens/s")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
