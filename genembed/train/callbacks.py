"""What a run shows and keeps: a progress bar, curves as CSV and picture, the best weights."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from genembed.files import publish, recover, replacing
from genembed.train.durable import replace_text, writing
from genembed.train.model import TrainableEmbedder
from genembed.train.recipe import Recipe

HISTORY = "history.csv"
CURVES = "curves.png"
BEST = "best"


class ProgressBar(TrainerCallback):
    """One bar on stderr, with the newest loss; Transformers' own writes its log lines to stdout."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_others: Any) -> None:
        """Show the bar, on the first process alone."""
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="update", mininterval=0.5)

    def on_step_end(self, args: Any, state: Any, control: Any, **_others: Any) -> None:
        """Move on."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_others: Any) -> None:
        """Show the loss."""
        if self.bar is not None and logs is not None and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_others: Any) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Give the line back to the terminal, also after an error; a second time nothing happens."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class OwnIntervals(TrainerCallback):
    """Logs, evaluates and saves as often as this run's recipe says.

    A resumed Transformers run takes these intervals from its checkpoint, and changed ones would have no effect.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **_others: Any) -> None:
        """Put the intervals of the arguments in the place of the checkpoint's."""
        state.compute_steps(args, state.max_steps)


class History(TrainerCallback):
    """Writes every logged number to `history.csv`, and the curves to `curves.png` at each checkpoint and at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **_others: Any) -> None:
        """Write what is known by now."""
        self._write(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_others: Any) -> None:
        """Write the whole run."""
        self._write(state)

    def _write(self, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        rows = merged(state.log_history)
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(rows)
        replace_text(self.folder / HISTORY, text.getvalue())
        draw_curves(rows, self.folder / CURVES)


def merged(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the log lines of one update; keep the numbers of a run, not Transformers' counters."""
    rows: dict[int, dict[str, Any]] = {}
    for line in log_history:
        kept = {name: value for name, value in line.items() if name not in ("epoch", "total_flos")}
        rows.setdefault(int(line["step"]), {}).update({"step": kept.pop("step"), **kept})
    return list(rows.values())


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw loss, gradient norm and held-out quality over the updates (GIRCSE, figures 4 and 5)."""
    from matplotlib.figure import Figure

    quality = sorted({name for row in rows for name in row if name.startswith("eval_mean_k")}, key=lambda name: int(name.split("k")[-1]))
    panels = [("loss", ["loss", "step_losses_first", "step_losses_last"]), ("gradient norm", ["grad_norm"])]
    panels += [("held-out quality", quality)] if quality else []
    figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    for number, (title, names) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number, title=title, xlabel="update")
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=name.removeprefix("eval_mean_").replace("_", " "), linewidth=1.2)
        if axes.lines:
            axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    with replacing(path) as file:
        file.write(picture.getvalue())


class KeepBest(TrainerCallback):
    """Keeps the weights that were best on held-out pairs, and stops a run that no longer gets better.

    All processes must be told the same numbers, or some would stop and leave the others waiting.

    Args:
        model: What is trained.
        recipe: The run, with an evaluation.
        folder: Of the run; the weights are kept in its folder `best`.
        headline: Name of the number that decides.
    """

    def __init__(self, model: TrainableEmbedder, recipe: Recipe, folder: Path, headline: str) -> None:
        assert recipe.evaluation is not None
        self.model, self.settings = model, recipe.served or model.settings
        self.folder, self.name, self.patience = folder, f"eval_{headline}", recipe.evaluation.patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **_others: Any) -> None:
        """Bring back the best weights, if the run was killed while it put better ones in their place."""
        if state.is_world_process_zero:
            recover(self.folder / BEST)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_others: Any) -> None:
        """Save a new best; count the evaluations since."""
        past = [(line[self.name], line["step"]) for line in state.log_history if self.name in line]
        best, place = max(past, key=lambda point: (point[0], -point[1]))
        if place == state.global_step:
            self._save(best, place, write=state.is_world_process_zero)
        since = sum(step > place for _, step in past)
        if self.patience and since >= self.patience:
            control.should_training_stop = True

    def _save(self, value: float, step: int, *, write: bool) -> None:
        staged, final = self.folder / f".{BEST}", self.folder / BEST
        if write:
            shutil.rmtree(staged, ignore_errors=True)
        with writing(final, leftover=staged):
            self.model.save(staged, self.settings)  # on every process, as parts of weights are joined
            if write:
                (staged / "score.json").write_text(json.dumps({"step": step, self.name: value}) + "\n", encoding="utf-8")
                publish(staged, final)
