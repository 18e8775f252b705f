"""Circuits as drawings: text of box characters, or pictures of several circuits side by side."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

from data.circuit_gates import Circuit, Gate
from data.errors import DataError

_WIRE, _LINK, _EDGE = "#94a3b8", "#1e293b", "#1e293b"
_BOXES = {"H": "#fde68a", "X": "#bfdbfe", "Y": "#bfdbfe", "Z": "#bbf7d0"}
_OTHER_BOX = "#e9d5ff"
_LABELS = {"sdg": "S†", "tdg": "T†"}
_INCHES = 0.44
"""Between two wires, and between two gates."""
_WIDEST = 17.0
"""Inches of a picture that chooses how many drawings are side by side."""


def draw_text(circuit: Circuit) -> str:
    """Return a circuit as text, a line for each qubit and one between them; gates act from left to right."""
    size = len(str(max(0, circuit.num_qubits - 1)))
    lines = [
        f"q{row // 2:<{size}}: ─" if row % 2 == 0 else " " * (size + 4)
        for row in range(2 * circuit.num_qubits - 1)
    ]
    for gate in circuit.gates:
        symbols = _symbols(gate)
        width = max(len(symbol) for symbol in symbols.values())
        top, bottom = min(symbols), max(symbols)
        for row in range(len(lines)):
            qubit, is_wire = row // 2, row % 2 == 0
            fill = "─" if is_wire else " "
            if is_wire and qubit in symbols:
                symbol = symbols[qubit]
            elif is_wire:
                symbol = "┼" if top < qubit < bottom else "─"
            else:
                symbol = "│" if top <= qubit < bottom else " "
            lines[row] += symbol.center(width, fill) + fill * 2
    return "\n".join(line.rstrip() for line in lines)


def draw_picture(
    circuits: Sequence[tuple[str, Circuit]], path: Path | str, *, title: str = "", columns: int | None = None
) -> Path:
    """Draw circuits, each below its own line of text, as a PNG.

    Args:
        circuits: Texts and circuits, drawn row by row.
        path: The PNG to write.
        title: Printed above.
        columns: Drawings side by side; None takes as many as make a picture that is not too wide.

    Raises:
        DataError: there is none to draw.
    """
    if not circuits:
        raise DataError(f"{path}: not drawn, for there is no circuit")
    num_gates = max(5, max(len(circuit.gates) for _, circuit in circuits))
    num_qubits = max(circuit.num_qubits for _, circuit in circuits)
    width, height = (num_gates + 1.4) * _INCHES, (num_qubits + 0.2) * _INCHES
    num_columns = min(len(circuits), columns or max(1, int(_WIDEST / width)))
    num_rows = math.ceil(len(circuits) / num_columns)
    figure = Figure(
        figsize=(num_columns * width + 0.2, num_rows * (height + 0.36) + (0.42 if title else 0.05)),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    cells = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axes in cells:
        axes.set_axis_off()
    for axes, (text, circuit) in zip(cells, circuits, strict=False):
        _draw(axes, circuit, num_gates, num_qubits)
        axes.set_title(text, fontsize=9, loc="left", pad=3)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    return Path(path)


def _draw(axes: Axes, circuit: Circuit, num_gates: int, num_qubits: int) -> None:
    """Draw one circuit, in the scale of the largest."""
    axes.set_xlim(-0.9, num_gates + 0.5)
    axes.set_ylim(num_qubits - 0.4, -0.8)
    axes.set_aspect("equal")
    for qubit in range(circuit.num_qubits):
        axes.plot(
            [-0.2, max(1, len(circuit.gates)) + 0.2], [qubit, qubit], color=_WIRE, linewidth=1.1, zorder=1
        )
        axes.text(-0.35, qubit, f"q{qubit}", ha="right", va="center", fontsize=8, color=_LINK)
    for index, gate in enumerate(circuit.gates):
        _draw_gate(axes, gate, index + 0.5)


def _draw_gate(axes: Axes, gate: Gate, x: float) -> None:
    nodes = (*gate.controls, *gate.targets)
    if len(nodes) > 1:
        axes.plot([x, x], [min(nodes), max(nodes)], color=_LINK, linewidth=1.4, zorder=2)
    for qubit, symbol in _symbols(gate).items():
        if symbol == "●":
            axes.plot(x, qubit, marker="o", markersize=5.5, color=_LINK, zorder=4)
        elif symbol == "⊕":
            axes.add_patch(
                Circle((x, qubit), 0.27, facecolor="white", edgecolor=_EDGE, linewidth=1.3, zorder=3)
            )
            axes.plot([x - 0.27, x + 0.27], [qubit, qubit], color=_EDGE, linewidth=1.3, zorder=4)
            axes.plot([x, x], [qubit - 0.27, qubit + 0.27], color=_EDGE, linewidth=1.3, zorder=4)
        elif symbol == "╳":
            for side in (-1, 1):
                axes.plot(
                    [x - 0.17, x + 0.17],
                    [qubit - side * 0.17, qubit + side * 0.17],
                    color=_EDGE,
                    linewidth=1.6,
                    zorder=4,
                )
        else:
            box = FancyBboxPatch(
                (x - 0.3, qubit - 0.3),
                0.6,
                0.6,
                boxstyle="round,pad=0.02,rounding_size=0.08",
                facecolor=_BOXES.get(symbol, _OTHER_BOX),
                edgecolor=_EDGE,
                linewidth=1.0,
                zorder=3,
            )
            axes.add_patch(box)
            axes.text(x, qubit, symbol, ha="center", va="center", fontsize=9, color=_EDGE, zorder=5)


def _symbols(gate: Gate) -> dict[int, str]:
    """Return what is drawn on each qubit that a gate acts on."""
    if gate.base == "swap":
        target = "╳"
    elif gate.base == "x" and gate.controls:
        target = "⊕"
    elif gate.base == "z" and gate.controls:
        target = "●"  # symmetric: any of its qubits may be called the target
    else:
        target = _LABELS.get(gate.base, gate.base.upper())
    return {**dict.fromkeys(gate.controls, "●"), **dict.fromkeys(gate.targets, target)}
