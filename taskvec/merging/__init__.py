"""Published ways to merge task vectors: one method a module, found by its name.

A method is a function of its module's name that takes vectors (label -> `taskvec.lazy.Lazy`) and
keyword options whose annotations and defaults are read from the source, and returns a vector that
is computed when it is read. Constants of the module say what the language must know:
``OPERANDS = 1`` takes exactly one vector, ``ORDERED = True`` keeps the operands in the order they
are written in.

A method that needs statistics of data, such as Fisher information or inner products of activations,
names them: ``STATISTICS = ("fisher",)``, and takes a second mapping ``statistics``: label -> name
of the statistic -> `Lazy` with the vector's names and shapes. No stage computes statistics yet, so
such a method is refused in an expression and can be called from Python only.
"""
