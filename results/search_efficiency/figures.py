"""Medians over seeds as lines, ranges as bands."""

import statistics

import matplotlib as mpl
import matplotlib.pyplot as plt

COLOURS = {"random": "0.55", "TPE": "C0", "NSGA-II": "C2", "GP": "C1", "guide": "C3"}


def colour_of(name):
    """Return the colour of a sampler, the same in every figure."""
    return next((c for start, c in COLOURS.items() if name.startswith(start)), "C4")


def draw(file, lines, *, x, y):
    """Draw lines over a logarithmic axis, and write them as SVG.

    Args:
        file: Where to.
        lines: For each line its label, colour, style, places, and one column of values a place.
        x: Label of the axis.
        y: Label of the other.
    """
    mpl.rcParams["svg.hashsalt"] = file.stem
    figure, axes = plt.subplots(figsize=(7.0, 4.2), layout="constrained")
    for label, colour, style, places, columns in lines:
        axes.plot(places, list(map(statistics.median, columns)), style, color=colour, label=label)
        low, high = list(map(min, columns)), list(map(max, columns))
        axes.fill_between(places, low, high, color=colour, alpha=0.08, linewidth=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
