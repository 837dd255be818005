"""`python -m benchmarks.expressed EXPRESSION OUT BASE FILE...`: one merge by an expression.

In the expression the files are called m0, m1 and so on. A merge that no file of mergekit can
describe is measured through this program, which does what `taskvec merge` does with the rest.
"""

import sys
from pathlib import Path

from taskvec.allocation import keep_freed_memory
from taskvec.edits import at
from taskvec.expressions import parse
from taskvec.mapped import difference, open_weights
from taskvec.streaming import Computed, Output, write


def main() -> None:
    """Merge files."""
    keep_freed_memory()
    expression, out, base, *files = sys.argv[1:]
    pretrained = open_weights(Path(base))
    vectors = {
        f"m{number}": difference(pretrained, open_weights(Path(file)))
        for number, file in enumerate(files)
    }
    merged = at(parse(expression, vectors, ()), {}, vectors)
    assert merged is not None  # there is no coefficient that could be zero
    output: Output = {
        name: Computed(merged, name, tensor.dtype, tensor)
        for name, tensor in pretrained.tensors.items()
    }
    write(Path(out), output, kind="checkpoint", metadata={"expression": expression})


if __name__ == "__main__":
    main()
