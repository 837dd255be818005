"""Every merging method once: ours, and mergekit's where it has the same."""

import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.contenders import (
    COEFFICIENT,
    DENSITY,
    Bench,
    Command,
    Measured,
    expressed,
    interleave,
    mergekit,
    taskvec,
)
from benchmarks.generated import Shapes, block, elements, generate, write_config
from benchmarks.measuring import table
from taskvec import plugins
from taskvec.errors import InvalidExpression
from taskvec.expressions import parse

SHORT = 4.0  # seconds; what takes longer is run once

# Methods of mergekit with the parameters of each model, as its documents and the papers have them.
CONFIGS: Mapping[str, Mapping[str, float]] = {
    "linear": {"weight": 1.0},
    "slerp": {},
    "model_stock": {},
    "dare_linear": {"weight": COEFFICIENT, "density": 0.5},
    "dare_ties": {"weight": COEFFICIENT, "density": 0.5},
    "breadcrumbs": {"weight": COEFFICIENT, "density": DENSITY, "gamma": 0.1},
    "della": {"weight": COEFFICIENT, "density": 0.5, "epsilon": 0.15},
}
# Methods of taskvec/merging/ that are measured in one of these ways, and those that take more.
COVERED = {
    "task_arithmetic", "ties", "dare", "della", "breadcrumbs", "slerp", "average", "model_stock",
}  # fmt: skip
EXPRESSIONS = {
    "layers": "layers({sum}, last=5)",
    "lines": "lines({sum})",
    "tall_mask": 'tall_mask({all}, task="m0")',
}
BLOCK_ONLY = {"wudi"}  # measured on one block of the network


def section(bench: Bench, shapes: Shapes) -> str:
    """Return the words and the table."""
    rows = []
    few = 1 if bench.quick else None
    for method, own in list(CONFIGS.items())[:few]:
        config = _config(bench, method, own)
        bench.say(method)
        ours = _once_or_thrice(bench, taskvec(config))
        row = [f"`{method}` of mergekit", ours.times.cell(), ours.megabytes]
        if bench.program:
            bench.say(f"{method} by mergekit")
            theirs = interleave({"": mergekit(bench.program, config)}, 1, bench.out)[""]
            quotient = f"{ours.times.median / theirs.times.median:.3f}"
            row += [theirs.times.cell(), theirs.megabytes, quotient]
        rows.append(row)
    for method, expression in list(_expressions(bench.number).items())[:few]:
        bench.say(method)
        ours = _once_or_thrice(bench, expressed(expression, bench.merged))
        words = _template(method).format(all="...", sum="...")
        rows.append([f"`{words}`", ours.times.cell(), ours.megabytes])
    part = "" if bench.quick else _one_block(bench, shapes)
    header = ["method", "seconds", "private MB", "mergekit, seconds", "its MB", "times mergekit"]
    return "\n\n".join(
        [
            "### Every other method",
            table(header, [row + [""] * (6 - len(row)) for row in rows]),
            f"The same {bench.number} checkpoints (`slerp`: two of them), the same way of "
            f"measuring. What takes {SHORT:g} s or less is run three times after a warm-up, the "
            "rest once, mergekit's always once. Options are the defaults; mergekit's files have "
            f"weight {COEFFICIENT:g} and, as far as a method takes them, density 0.5 and epsilon "
            f"0.15, and for `breadcrumbs` density {DENSITY:g} and gamma 0.1." + part,
        ]
    )


def _config(bench: Bench, method: str, own: Mapping[str, float]) -> Path:
    """Return a file of mergekit for a method."""
    path, files = bench.directory / f"{method}.yml", bench.merged
    if method == "slerp":
        first, second = files.finetuned[:2]
        return write_config(path, method, {first: {}, second: {}}, first, t=0.5)
    base = None if method == "linear" else files.base
    return write_config(path, method, dict.fromkeys(files.finetuned, own), base)


def _expressions(number: int) -> dict[str, str]:
    """Return method -> expression of every method that vectors are enough for."""
    names = [f"m{place}" for place in range(number)]
    words = {"all": ", ".join(names), "sum": " + ".join(names)}
    result = {}
    for method in plugins.names("merging"):
        if method in COVERED | BLOCK_ONLY:
            continue
        expression = _template(method).format(**words)
        try:
            parse(expression, names, ())
        except InvalidExpression as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        result[method] = expression
    return result


def _template(method: str) -> str:
    return EXPRESSIONS.get(method, f"{method}({{all}})")


def _once_or_thrice(bench: Bench, command: Command) -> Measured:
    found = interleave({"": command}, 1, bench.out)[""]
    if bench.quick or found.times.median > SHORT:
        return found
    return interleave({"": command}, 3, bench.out)[""]


def _one_block(bench: Bench, shapes: Shapes) -> str:
    """Return a sentence about the methods that would take too long on the whole model."""
    sentences = []
    for method in sorted(BLOCK_ONLY & set(plugins.names("merging"))):
        bench.say(f"{method} on one block")
        files = generate(bench.directory / method, block(shapes), bench.number)
        names = ", ".join(f"m{place}" for place in range(bench.number))
        cost = interleave({"": expressed(f"{method}({names})", files)}, 1, bench.out)[""]
        scale = elements(shapes) / files.parameters
        files.remove()
        sentences.append(
            f" `{method}` was measured on the first block alone, {files.parameters / 1e6:.1f} M "
            f"parameters: {cost.times.median:.1f} s, {cost.megabytes} MB; times {scale:.1f} for "
            f"the whole model that is {cost.times.median * scale:.0f} s."
        )
    return "".join(sentences)
