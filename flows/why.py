"""Why a stage would run, or why it ran last time, in words."""

from typing import Any

from flows import difference
from flows.lineage import Lineage
from flows.nodes import Node
from flows.records import Execution

Facts = dict[str, Any]
TOLD = {
    "when": "at", "who": "by",
    "recorded": "in commit", "committed": "of", "author": "by",
}  # fmt: skip


def why(lineage: Lineage, node: Node) -> Facts:
    """Return why a stage is stale, or what was new when it was last made.

    Args:
        lineage: of the checkout.
        node: the stage, as `Dag.plan` gives it.
    """
    found: Facts = {"stage": node.name, "stale": [reason.words for reason in node.reasons]}
    last, before = lineage.last_two(node.command)
    if last:
        found["last"] = _facts(last)
        if before:
            found["before"] = _facts(before)
            found["changes"] = difference.words(before, last)
    return found


def render(found: Facts) -> str:
    """Return the answer as text."""
    lines = [found["stage"]]
    if found["stale"]:
        lines.append("would run, because")
        lines += [f"  {words}" for words in found["stale"]]
    else:
        lines.append("up to date")
    if "last" not in found:
        return "\n".join([*lines, "no execution of it is recorded"])
    lines.append(f"last made{_told(found['last'])}")
    if because := found["last"].get("because"):
        lines += [f"  because {reason}" for reason in because.split("; ")]
    if "before" not in found:
        return "\n".join([*lines, "  no earlier execution is recorded"])
    lines.append(f"what was new against the one before{_told(found['before'])}")
    return "\n".join([*lines, *(f"  {words}" for words in found["changes"] or ["nothing"])])


def _facts(execution: Execution) -> Facts:
    return {"outputs": execution.outputs, **execution.run}


def _told(facts: Facts) -> str:
    words = [f"{label} {_short(key, facts[key])}" for key, label in TOLD.items() if facts.get(key)]
    return f" ({', '.join(words)})" if words else ""


def _short(key: str, value: str) -> str:
    """Return a commit by its first digits, and anything else as it is."""
    return value[:12] if key == "recorded" else value
