"""Draw the server's memory over the long run, and over its negative control, into docs/soak.png.

python benchmarks/reliability/soak_graph.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # what benchmarks share


PICTURE = Path(__file__).parents[2] / "docs" / "soak.png"


def draw(path: Path = PICTURE) -> None:
    """Draw the newest result of each row, side by side: what they hold is of another order."""
    from matplotlib.figure import Figure
    from results_file import stored

    figure = Figure(figsize=(8, 3), layout="constrained")
    for place, (name, title) in enumerate(
        (("soak", "80 % load, clients that crash"), ("soak-control", "the same, leaking on purpose")), start=1
    ):
        result = stored(f"reliability-{name}")[1]
        rate, half = (result["figures"][key] for key in ("slope_mib_per_hour", "slope_interval_mib_per_hour"))
        axes = figure.add_subplot(1, 2, place, title=f"{title}\n{rate:,.1f} ± {half:,.1f} MiB an hour", xlabel="minutes", ylabel="MiB")
        axes.plot([second / 60 for second in result["series"]["seconds"]], result["series"]["mib"], linewidth=1.2)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw()
    print(f"written: {PICTURE}")
