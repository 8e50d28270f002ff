"""How pictures look: axes, colours, and files that are the same for the same numbers.

The background is transparent and every colour is of medium lightness, so that a picture can be read
on white and on black.
"""

from __future__ import annotations

from pathlib import Path

from fused_rl.system.outputs import replacing

INK = "#767c85"
STRONG = "#2f81f7"
MUTED = ("#a9824f", "#8f7fa8", "#6f9479", "#b07a78", "#5f93a3", "#98934f", "#a57798")
MARKERS = "osD^vPX"


def new_figure(size: tuple[float, float]):
    """A figure of this width and height in inches, without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor="none")
    FigureCanvasAgg(figure)
    return figure


def frame(panel) -> None:
    """The looks of a panel's axes; call it first, or labels set before stay black."""
    panel.set_facecolor("none")
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(INK)
    panel.tick_params(labelsize=8, colors=INK)
    panel.xaxis.label.set(color=INK, size=9)
    panel.yaxis.label.set(color=INK, size=9)
    panel.grid(color=INK, alpha=0.2, lw=0.6)
    panel.set_axisbelow(True)


def title(figure, case: str, where: str) -> None:
    """Two lines over all panels."""
    figure.suptitle(f"{case}\n{where}", x=0.01, ha="left", color=INK, fontsize=9)


def save(figure, path: Path) -> None:
    """The same bytes for the same records."""
    import matplotlib

    metadata = {"Date": None} if path.suffix == ".svg" else {}
    settings = {"svg.hashsalt": path.name, "svg.fonttype": "none"}
    with replacing(path) as partial, matplotlib.rc_context(settings):
        figure.savefig(partial, dpi=130, metadata=metadata)
