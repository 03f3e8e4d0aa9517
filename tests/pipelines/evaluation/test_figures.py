"""Figures are drawn without a display and without pyplot."""

import subprocess
import sys

PROGRAM = """
import sys
from pathlib import Path
from pipelines.evaluation.figures import hide_box, save, subplots

figure, axes = subplots(1, 2, size=(4, 2), sharey=True)
hide_box(axes[0])
save(figure, Path(sys.argv[1]))
assert "matplotlib.pyplot" not in sys.modules
"""


def test_a_figure_is_written_without_pyplot(tmp_path):
    subprocess.run([sys.executable, "-c", PROGRAM, tmp_path / "figure.png"], check=True)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
