"""The tables of speed, memory and serving, from the newest result file of each benchmark; `tables.py` puts them into the documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from markdown import table
from results_file import source, stored


def throughput() -> str:
    """Time for each text of every variant, and what halting saves."""
    heads = [
        "",
        "one pass",
        "plain",
        "sorted",
        "engine",
        "plain / engine",
        "engine / one pass (bound)",
        "halting near 9",
        "near 18",
        "spread over 4-20",
    ]
    rows, sources = [], []
    for model in ("mini", "mini-full", "qwen", "qwen-bf16"):
        path, result = stored(f"throughput-{model}")
        sources.append(source(path))
        rows += [_throughput_row(model, one) for one in result["comparisons"]]
    note = (
        "Milliseconds a text; *halting*: share of the iteration saving saved in decoding; then of the whole time, with its ceiling. "
        "Near 18 a tenth is to be saved, less than what runs differ by: "
        "[turn by turn](docs/performance.md#is-halting-ever-slower-than-not-halting)."
    )
    return f"{note} {', '.join(sources)}.\n\n{table(heads, rows)}"


def _throughput_row(model: str, one: Mapping[str, Any]) -> list[str]:
    variants = one["variants"]
    saved = [variants[f"engine {trace}"]["saving"] for trace in ("near 9", "near 18", "4-20")]
    return [
        f"{model}, {one['texts']} {one['kind']}, mean {one['mean_tokens']:.0f} tokens",
        *(f"{variants[name]['ms_per_text']:.1f}" for name in ("causal-eos", "plain", "sorted", "engine")),
        f"{variants['engine']['plain_over_this']:.2f}x",
        f"{variants['engine']['to_causal_eos']:.2f} ({one['flop_bound']:.2f})",
        *(f"{saving['share']:.2f}; {saving['wall_clock']:.0%} of at most {saving['ceiling']:.0%}" for saving in saved),
    ]


def batches() -> str:
    """What a text costs in batches of different sizes."""
    path, result = stored("batches-mini")
    (one,) = result["comparisons"]
    found = {int(name.split()[-2]): row for name, row in one["variants"].items() if name.endswith("rows") and name.startswith("engine")}
    rows = [
        [
            f"{count:,}",
            f"{one['variants'][f'causal-eos, {count} rows']['ms_per_text']:.2f}",
            f"{row['ms_per_text']:.2f}",
            f"{row['to_causal_eos']:.2f}",
            f"{row['share_of_ceiling']:.0%}",
        ]
        for count, row in sorted(found.items())
    ]
    note = f"`mini`, {one['texts']:,} {one['kind']}, mean {one['mean_tokens']:.0f} tokens, K = 20; {source(path)}"
    return f"{note}.\n\n{table(['rows at most', 'one pass, ms a text', 'K = 20', 'ratio', 'of the ceiling'], rows)}"


def training() -> str:
    """Time and memory of a training update."""
    path, result = stored("training")
    rows = []
    for one in result["comparisons"]:
        for name, row in one["variants"].items():
            label = f"{one['shape']}, {name}"
            rows.append(
                [
                    label,
                    f"{row['median']:.2f}",
                    f"{row['faster']:.2f}x ({row['ceiling']:.1f})",
                    f"{row['peak_mib']:.0f}",
                    f"{row['memory']:.2f}",
                ]
            )
    return f"{source(path)}\n\n{table(['', 's / update', 'faster (ceiling)', 'peak MiB', 'of released'], rows)}"


def approximations() -> str:
    """What each approximation costs and gains."""
    path, result = stored("approximations-mini")
    named = {row["name"]: row for row in result["rows"]}
    sizes = [int(key.rsplit("_", 1)[1]) for key in result["rows"][0] if key.startswith("seconds_")]
    heads = [
        "",
        "cosine",
        "worst",
        *result["rows"][0]["quality"],
        *(f"ms, {size} quer{'y' if size == 1 else 'ies'}" for size in sizes),
        "faster",
    ]
    rows = []
    for row in result["rows"]:
        reference, dropped = named[row["reference"]], row["dropped"]
        rows.append(
            [
                row["name"] + (f" ({dropped:.0%} of the mass dropped)" if dropped is not None else ""),
                f"{row['cosine']:.5f}",
                f"{row['worst']:.3f}",
                *(f"{value:.2f}" for value in row["quality"].values()),
                *(f"{1e3 * row[f'seconds_{size}']:.0f}" for size in sizes),
                " / ".join(f"{reference[f'seconds_{size}'] / row[f'seconds_{size}']:.2f}x" for size in sizes),
            ]
        )
    return f"{source(path)}\n\n{table(heads, rows)}"


def latency() -> str:
    """One query at a time."""
    path, result = stored("latency")
    rows = [
        [one["model"], way, f"{own['p50']:.0f}", f"{own['p95']:.0f}", f"{own['least']:.0f}", f"{own['p50'] / own['least']:.1f}x"]
        for one in result["models"]
        for way, own in one["ways"].items()
    ]
    return f"{source(path)}\n\n{table(['', '', 'median, ms', '95 %, ms', 'ceiling, ms', 'of the ceiling'], rows)}"


def serving() -> str:
    """The server beside the engine it runs."""
    path, result = stored("serving")
    rows = [
        ["engine alone, texts/s", f"{result['offline']:.0f}", ""],
        [f"server, {result['clients']} clients, texts/s", f"{result['texts_per_second']:.0f}", f"{result['share']:.0%} (goal 85 %)"],
        *([name, f"{result[key]['p50']:.0f} ms, {result[key]['p95']:.0f} ms", ""] for name, key in _LOADS),
    ]
    rows[-1][-1] = f"{result['p95_ratio']:.1f} times unloaded at 95 % (goal 3)"
    note = f"`{result['model']}`, K = {result['steps']}, {result['machine']['threads']} cores for server and clients; median, 95 %"
    return f"{note}; {source(path)}.\n\n{table(['', '', ''], rows)}"


_LOADS = (("one text at a time, unloaded", "unloaded"), ("texts that arrive at random, at half of the above", "half_load"))


def soft_token() -> str:
    """The soft token alone."""
    path, result = stored("soft_token")
    ways = list(result["comparisons"][0]["ways"])
    rows = [
        [
            f"{one['shape']}, {'tied' if one['tied'] else 'untied'}",
            str(one["rows"]),
            *(f"{1e3 * one['ways'][way]['median']:.2f}" for way in ways),
            f"{one['ways'][ways[-1]]['faster']:.2f}x",
            f"{one['ways'][ways[-1]]['share']:.0%}",
        ]
        for one in result["comparisons"]
    ]
    heads = ["", "rows", *(f"{way}, ms" for way in ways), f"{ways[-1]} / {ways[0]}", "of the ceiling"]
    return f"{source(path)}\n\n{table(heads, rows)}"


def index_scale() -> str:
    """An index of random vectors on disk."""
    path, result = stored("index_scale")
    searches = (("every vector", "exact"), ("a tenth of them, by a filter", "exact_filtered"), ("words", "lexical"), ("both", "hybrid"))
    rows = [[f"search: {name}", f"{result[key]['median_ms']:.0f} ms, {result[key]['p95_ms']:.0f} ms"] for name, key in searches]
    recall = result["ann_recall_at_10_new_queries"]
    rows += [
        [
            "search: approximate",
            f"{result['ann']['median_ms']:.0f} ms, {result['ann']['p95_ms']:.0f} ms; finds {recall:.1%} of the true ten",
        ],
        ["building, without the model", f"{result['build_seconds']:.0f} s; the approximate index {result['ann_build_seconds']:.0f} s more"],
        ["update by 100 texts", f"{result['update_100_new_seconds']:.1f} s"],
        ["most memory", f"{result['peak_memory_mib']:,} MiB; {result['memory_before_mib']:,} MiB before the index was begun"],
        ["on disk", f"{result['disk_mib']:,.0f} MiB"],
    ]
    note = f"{result['rows']:,} random vectors of {result['dimensions']} dimensions, {result['machine']['threads']} cores; median, 95 %"
    return f"{note}; {source(path)}.\n\n{table(['', ''], rows)}"


def progressive_search() -> str:
    """Queries that halt when what they find no longer changes."""
    path, result = stored("progressive_search")
    rows = [
        [name, rule, *(f"{value:.2f}" for value in own.values())]
        for name, one in result["sets"].items()
        for rule, own in one["rules"].items()
    ]
    heads = ["set", "rule", "steps", "overlap with K = 20, %", "nDCG@10", "ms a query"]
    return f"`{result['model']}`; {source(path)}.\n\n{table(heads, rows)}"


def profitability() -> str:
    """Halting beside not halting, turn by turn."""
    path, result = stored("profitability")
    rows = [
        [
            *(one[name] for name in ("model", "kind", "trace")),
            f"{one['iterations']:.2f}",
            f"{one['median']:.3f} ({one['low']:.3f} to {one['high']:.3f})",
        ]
        for one in result["rows"]
    ]
    note = f"Median of {result['turns']} turns, 95 % interval"
    return f"{note}; {source(path)}.\n\n{table(['', '', 'halting', 'steps done / 20', 'seconds / K = 20'], rows)}"


def int8() -> str:
    """Products with 8-bit weights."""
    path, result = stored("int8")
    ways = list(result["rows"][0]["us"])
    rows = [[row["layer"], str(row["rows"]), *(f"{row['us'][way]:.0f}" for way in ways)] for row in result["rows"]]
    return f"{source(path)}, torchao {result['torchao']}; microseconds.\n\n{table(['', 'rows', *ways], rows)}"


def goals() -> str:
    """What was aimed at, and what is."""
    qwen, half, mini = (_compared(model) for model in ("qwen", "qwen-bf16", "mini"))
    ways = {one["model"]: one["ways"] for one in stored("latency")[1]["models"]}
    single = {name: ways[name]["K = 20, plain loop"]["p50"] / ways[name]["K = 20"]["p50"] for name in ("qwen", "qwen-bf16")}
    exact = ways["mini"]["K = 20"]["p50"]
    at_once = min(own["p50"] for name, own in ways["mini"].items() if "at once" in name)
    saved = {trace: [one["variants"][f"engine {trace}"]["saving"]["share"] for one in mini.values()] for trace in ("near 9", "4-20")}
    slower = [one for one in stored("profitability")[1]["rows"] if one["low"] > 1]
    rows = [
        [
            "0.5B shape, queries, engine / plain loop",
            "4x float32, 3x bfloat16",
            f"{_over(qwen, 'queries')}; bfloat16 {_over(half, 'queries')}",
        ],
        ["0.5B shape, documents", "4.5x", f"{_over(qwen, 'documents')}; bfloat16 {_over(half, 'documents')}"],
        ["0.5B shape, one query", "3x", f"{single['qwen']:.2f}x; bfloat16 {single['qwen-bf16']:.2f}x"],
        ["`mini`, queries", "3.5x", _over(mini, "queries")],
        ["`mini`, documents", "6x", "; ".join(_over(mini, kind) for kind in mini if kind != "queries")],
        [
            "`mini`, one query, K = 20",
            f"25 ms, or twice the ceiling: {max(25, 2 * ways['mini']['K = 20']['least']):.0f} ms",
            f"{exact:.0f} ms; all steps at once {at_once:.0f} ms",
        ],
        [
            "engine at K = 20 / one pass, over the FLOP bound",
            "1.2",
            ", ".join(f"{kind} {one['variants']['engine']['to_causal_eos'] / one['flop_bound']:.2f}" for kind, one in mini.items()),
        ],
        *(
            [f"decoding saved / steps saved, halting {trace}", goal, ", ".join(f"{share:.2f}" for share in saved[trace])]
            for trace, goal in (("near 9", "0.95"), ("4-20", "0.85"))
        ),
        ["halting slower than not halting", "never", "never seen" if not slower else f"in {len(slower)} of the rows below"],
        ["H200: ratios, rates, soft token", "", "not measured"],
    ]
    return table(["", "goal", "measured"], rows)


def _compared(model: str) -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in stored(f"throughput-{model}")[1]["comparisons"]}


def _over(kinds: Mapping[str, Any], kind: str) -> str:
    """Say how many times faster the engine is than the plain loop, and how many it would be at the machine's ceiling."""
    engine = kinds[kind]["variants"]["engine"]
    return f"{engine['plain_over_this']:.2f}x of at most {engine['plain_over_this'] / engine['share_of_ceiling']:.2f}x"


TABLES: Mapping[str, Callable[[], str]] = {
    "throughput": throughput,
    "batches": batches,
    "goals": goals,
    "training": training,
    "approximations": approximations,
    "latency": latency,
    "soft_token": soft_token,
    "profitability": profitability,
    "serving": serving,
    "index_scale": index_scale,
    "progressive_search": progressive_search,
    "int8": int8,
}
