"""`python -m tasks STAGE [ITEM]`: what dvc.yaml calls; does one stage in this directory.

Refuses (exit 3) when a rendered file does not match params.yaml or the code: DVC would then record
the stage under dependencies that it did not have. Progress goes to stderr.
"""

import sys
from pathlib import Path

# The one place below `flows` that knows the plan: an entry point, which checks before it works.
from flows import plan
from tasks.artifacts import Artifacts
from tasks.stages import NAMES, Emit, Progress, run
from taskvec import params as parameters
from taskvec.errors import InvalidInput, TaskvecError, nearest

USAGE = f"usage: python -m tasks STAGE [ITEM]\nstages: {', '.join(NAMES)}\n"


def main(arguments: list[str]) -> int:
    """Do the stage that the arguments name; return the exit code."""
    if not 1 <= len(arguments) <= 2:
        sys.stderr.write(USAGE)
        return 2
    stage, item = arguments[0], arguments[1] if len(arguments) == 2 else ""
    root = Path.cwd()
    try:
        if stage not in NAMES:
            raise InvalidInput(f"unknown stage {stage!r}; {nearest(stage, NAMES)}")
        params = parameters.load(root / "params.yaml")
        plan.check(root, params)
        perform(stage, item, params, root, _show)
    except TaskvecError as error:
        sys.stderr.write(f"{stage} {item}: {error}\n")
        return error.exit_code
    return 0


def perform(
    stage: str,
    item: str,
    params: parameters.Params,
    root: Path,
    emit: Emit,
    *,
    assist: bool = False,
) -> None:
    """Do one stage with deterministic arithmetic, or assist the process that does it."""
    from taskvec.numeric import make_deterministic

    make_deterministic()
    run(stage, item, params, Artifacts(root), emit, assist=assist)


def _show(progress: Progress) -> None:
    step, steps = int(progress["step"]), int(progress["steps"])
    if step in (1, steps) or step % max(1, steps // 10) == 0:
        rest = {name: value for name, value in progress.items() if name not in ("step", "steps")}
        figures = "  ".join(f"{name} {value:.4g}" for name, value in rest.items())
        sys.stderr.write(f"  {step}/{steps}  {figures}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
