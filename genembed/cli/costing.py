"""What it costs: `genembed cost`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genembed.cli.options import Json, command
from genembed.cli.output import print_result

if TYPE_CHECKING:
    from genembed.cost import Shape


@command
def cost(
    model: Annotated[str, typer.Argument(help="Built-in model (mini), model folder, or a folder with a config.json alone.")],
    *,
    tokens: Annotated[int, typer.Option(help="Prompt tokens of a text.")] = 128,
    steps: Annotated[int, typer.Option(help="Refinement steps.")] = 20,
    weight_bytes: Annotated[int, typer.Option(help="Bytes of a weight, and of a kept key or value.")] = 2,
    as_json: Json = False,
) -> None:
    """Count the operations and the memory of an embedding from the configuration alone."""
    from genembed.cost import Cost

    counted = Cost(shape=model_shape(model), tokens=tokens, steps=steps, weight_bytes=weight_bytes)
    rows = {
        "one pass": (counted.one_pass, counted.linear_one_pass),
        "refined, with cache": (counted.cached, counted.linear_cached),
        "refined, without": (counted.recomputed, counted.linear_recomputed),
    }
    value: dict[str, Any] = {
        "model": model,
        "tokens": tokens,
        "steps": steps,
        "flops": {name: flops for name, (flops, _) in rows.items()},
        "flops_of_linear_layers": {name: linear for name, (_, linear) in rows.items()},
        "weights_bytes": counted.weights_memory,
        "cache_bytes": counted.cache_memory,
        "attention_ratio": counted.attention_ratio,
        "training_memory_ratio": counted.training_memory_ratio,
    }
    lines = [f"{'one text, ' + str(tokens) + ' tokens, K = ' + str(steps):<28}{'FLOPs':>12}{'':>9}{'linear layers alone':>21}"]
    for name, (flops, linear) in rows.items():
        against = f"{flops / counted.one_pass:.2f}x", f"{linear / counted.linear_one_pass:.2f}x"
        lines.append(f"{name:<28}{_amount(flops):>12}{against[0]:>9}{_amount(linear):>12}{against[1]:>9}")
    lines += [
        f"{'weights':<28}{counted.weights_memory / 2**30:>10.2f} GiB",
        f"{'keys and values of a text':<28}{counted.cache_memory / 2**20:>10.2f} MiB",
        f"{'attention, eq. 9':<28}{counted.attention_ratio:>11.2f}x",
        f"{'training memory, eq. 10':<28}{counted.training_memory_ratio:>11.2f}x",
    ]
    print_result(value, "\n".join(lines), as_json=as_json)


def model_shape(model: str) -> Shape:
    """Count a model folder, with its own settings and head where it has them, or a folder of nothing but a configuration."""
    from safetensors import safe_open

    from genembed.cost import Shape
    from genembed.source import SETTINGS_FILE, resolve

    folder = Path(model).expanduser()
    if (folder / "config.json").is_file() and not (folder / SETTINGS_FILE).is_file():
        return Shape.of(folder)
    source = resolve(model, adapter=None, preset=None, offline=True)
    spoken = None
    if source.head is not None:
        with safe_open(source.head, framework="pt") as head:
            spoken = head.get_slice("tokens").get_shape()[0] if "tokens" in head.keys() else None  # noqa: SIM118
    return Shape.of(source.base, causal=source.settings.attention == "causal", spoken=spoken)


def _amount(operations: int) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if operations >= size:
            return f"{operations / size:.2f} {unit}"
    return str(operations)
