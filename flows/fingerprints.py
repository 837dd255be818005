"""Which code a function reaches, as a digest that comments and unused methods do not change.

A stage depends on its code through these digests (code.yaml), so that editing a docstring reruns
nothing and editing a function reruns exactly the stages that reach it. Reach is read from the
syntax tree: names, imports and attributes. It errs towards too much: a method counts as reached if
anything that is reached mentions its name, decorated and double-underscore methods always do, and
a module that is used as a value counts whole.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PACKAGES = ("taskvec", "tasks")
EFFECTS = "<import>"
PLAIN_DECORATORS = {"property", "classmethod", "staticmethod", "override"}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Module:
    """The top level of one module."""

    name: str
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)  # alias -> (module, name)
    imported: set[str] = field(default_factory=set)  # every module that its import loads
    effects: list[ast.stmt] = field(default_factory=list)  # other statements that run at import


@dataclass(frozen=True)
class Part:
    """A piece of a definition: a function, an assignment, a method, or the rest of a class.

    Attributes:
        method: its name if it counts only when something mentions it, else empty.
        references: the definitions (module, name) that it uses.
        attributes: every attribute name in it.
        text: the syntax tree without docstrings and positions.
    """

    method: str
    references: frozenset[tuple[str, str]]
    attributes: frozenset[str]
    text: str


class Code:
    """The source of the packages below a directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._module = cache(self._read)
        self._parts = cache(self._split)
        self._loaded = cache(self._imported)

    def fingerprint(self, roots: Iterable[str]) -> str:
        """Return the md5 of all code that the roots reach.

        Args:
            roots: ``package.module:function``, or ``package.module`` for everything in a module.
        """
        queue: list[tuple[str, str]] = []
        for root in roots:
            name, _, function = root.partition(":")
            module = self._module(name)
            if module is None:
                raise ValueError(f"no module {name} below {self._root}")
            queue += [(name, function)] if function else [(name, d) for d in module.definitions]
        reached = self._reach(queue)
        lines = sorted(f"{where}:{part.text}" for where, part in reached)
        return hashlib.md5("\n".join(lines).encode(), usedforsecurity=False).hexdigest()

    def _reach(self, queue: list[tuple[str, str]]) -> set[tuple[str, Part]]:
        """Return all parts that definitions reach, with where they stand."""
        seen: set[tuple[str, str]] = set()
        waiting: dict[str, list[tuple[str, Part]]] = {}  # methods that nothing has mentioned yet
        mentioned: set[str] = set()
        reached: set[tuple[str, Part]] = set()
        ready: list[tuple[str, Part]] = []
        while queue or ready:
            while queue:
                module, name = queue.pop()
                if (module, name) in seen:
                    continue
                seen.add((module, name))
                # What a module does when it is imported belongs to everything in it.
                queue += [(loaded, EFFECTS) for loaded in self._loaded(module)]
                for part in self._parts(module, name):
                    where = f"{module}.{name}"
                    if part.method and part.method not in mentioned:
                        waiting.setdefault(part.method, []).append((where, part))
                    else:
                        ready.append((where, part))
            while ready:
                item = ready.pop()
                reached.add(item)
                queue += item[1].references - seen
                for attribute in item[1].attributes - mentioned:
                    mentioned.add(attribute)
                    ready += waiting.pop(attribute, [])
        return reached

    def _split(self, module: str, name: str) -> tuple[Part, ...]:
        """Return the parts of a definition, or of a module's effects."""
        source = self._module(module)
        if source is None:
            return ()
        nodes = source.effects if name == EFFECTS else source.definitions.get(name, [])
        parts = []
        for node in nodes:
            if not isinstance(node, ast.ClassDef):
                parts.append(self._part(source, "", [node]))
                continue
            optional = [item for item in node.body if _is_optional(item)]
            rest = [item for item in node.body if item not in optional]
            header = [*node.bases, *node.keywords, *node.decorator_list]
            parts.append(self._part(source, "", [*header, *rest]))
            parts += [self._part(source, item.name, [item]) for item in optional]  # type: ignore[attr-defined]
        return tuple(parts)

    def _part(self, module: Module, method: str, nodes: Sequence[ast.AST]) -> Part:
        walked = [sub for node in nodes for sub in ast.walk(node)]
        imports = dict(module.imports)
        qualified: dict[int, str] = {}
        attributes = set()
        for sub in walked:
            if isinstance(sub, ast.Import | ast.ImportFrom):
                imports.update(_aliases(sub, module.name))
            elif isinstance(sub, ast.Attribute):
                attributes.add(sub.attr)
                if isinstance(sub.value, ast.Name):
                    qualified[id(sub.value)] = sub.attr
        references: set[tuple[str, str]] = set()
        for sub in walked:
            if isinstance(sub, ast.Name):
                if sub.id in module.definitions:
                    references.add((module.name, sub.id))
                if sub.id in imports:
                    references |= self._imported_name(imports[sub.id], qualified.get(id(sub)))
        text = "".join(ast.dump(node) for node in nodes)
        return Part(method, frozenset(references), frozenset(attributes), text)

    def _imported_name(
        self, target: tuple[str, str], attribute: str | None
    ) -> set[tuple[str, str]]:
        module, name = target
        if name and self._module(f"{module}.{name}"):
            module, name = f"{module}.{name}", ""
        source = self._module(module)
        if source is None:
            return set()
        if name in source.imports and name not in source.definitions:
            return self._imported_name(source.imports[name], attribute)
        if name or attribute in source.definitions:
            return {(module, name or str(attribute))}
        return {(module, definition) for definition in source.definitions}

    def _imported(self, name: str) -> frozenset[str]:
        """Return a module and all local modules that importing it imports."""
        loaded, queue = set(), [name]
        while queue:
            name = queue.pop()
            module = self._module(name)
            if module is not None and name not in loaded:
                loaded.add(name)
                queue += sorted(module.imported)
        return frozenset(loaded)

    def _read(self, name: str) -> Module | None:
        if name.split(".")[0] not in PACKAGES:
            return None
        path = self._root.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not path.is_file():
            return None
        module = Module(name)
        for node in _without_docstrings(ast.parse(path.read_text())).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                module.imports.update(_aliases(node, name))
            elif isinstance(node, FUNCTION | ast.ClassDef):
                module.definitions.setdefault(node.name, []).append(node)
            elif targets := list(_targets(node)):
                for target in targets:
                    module.definitions.setdefault(target, []).append(node)
            else:
                module.effects.append(node)
        for source, attribute in module.imports.values():
            module.imported |= {source, f"{source}.{attribute}"}
        return module


def _is_optional(item: ast.stmt) -> bool:
    """Return whether a class member counts only if something mentions its name."""
    return (
        isinstance(item, FUNCTION)
        and not item.name.startswith("__")
        and all(_decorator(decorator) in PLAIN_DECORATORS for decorator in item.decorator_list)
    )


def _decorator(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _targets(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a top-level statement (also an if or a try) binds."""
    for sub in ast.walk(node):
        if isinstance(sub, ast.Name) and isinstance(sub.ctx, ast.Store):
            yield sub.id


def _aliases(node: ast.Import | ast.ImportFrom, module: str) -> dict[str, tuple[str, str]]:
    if isinstance(node, ast.Import):
        return {alias.asname or alias.name.split(".")[0]: (alias.name, "") for alias in node.names}
    package = module.split(".")[: -node.level] if node.level else []
    source = ".".join([*package, *([node.module] if node.module else [])])
    return {alias.asname or alias.name: (source, alias.name) for alias in node.names}


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | FUNCTION):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return tree
