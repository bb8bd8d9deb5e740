"""The figure that studies share: one panel a value of a column, in it one curve a series."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def panels(table: Table, *, panel: str, series: str, x: str, y: str) -> Figure:
    """``y`` against ``x``, on a logarithmic axis, for each value of ``series``; a series of one row is a level, drawn across.

    Args:
        panel: column whose values get a panel each, in the table's order.
        series: column whose values get a curve each, of one colour in all panels.
    """
    from matplotlib.figure import Figure

    values, names = (list(dict.fromkeys(table.column(column))) for column in (panel, series))
    figure = Figure(figsize=(2.5 + 3 * len(values), 3), layout="constrained")
    for axes, value in zip(figure.subplots(1, len(values), sharey=True, squeeze=False)[0], values):
        for i, name in enumerate(names):
            rows = table.where(**{panel: value, series: name})
            heights = rows.column(y)
            if len(rows) == 1:
                axes.axhline(heights[0], color=f"C{i}", linestyle="--", label=name)
            else:
                axes.plot(rows.column(x), heights, f"C{i}o-", label=name)
        axes.set_xscale("log", base=2)
        axes.set(title=f"{panel} {value}", xlabel=x)
    figure.axes[0].set_ylabel(y)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles=handles, labels=labels, loc="outside right upper")
    return figure
