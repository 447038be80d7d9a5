"""What tests of pictures read back from a figure."""

from typing import Any

from matplotlib.figure import Figure


def axes_of(figure: Figure) -> list[Any]:
    return [*figure.axes]


def subplots(count: int) -> tuple[Figure, list[Any]]:
    """A figure of the caller's own, and its axes."""
    figure = Figure(figsize=(4 * count, 4))
    axes: Any = figure.subplots(1, count, squeeze=False)
    return figure, list(axes.flat)


def labels(ax: Any) -> list[str]:
    """The labels of the y axis."""
    return [text.get_text() for text in ax.get_yticklabels()]


def columns(ax: Any) -> list[str]:
    """The labels of the x axis."""
    return [text.get_text() for text in ax.get_xticklabels()]


def legend(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def texts(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.texts]
