"""Which code a function reaches, as a digest that comments and unused methods do not change.

A stage depends on its code through these digests (code.yaml), so that editing a docstring reruns
nothing and editing a function reruns exactly the stages that reach it. Reach is read from the
syntax tree: names, imports and attributes. It errs towards too much: a method counts as reached if
anything that is reached mentions its name; decorated and double-underscore methods always do, and
all methods of a class with a base from elsewhere, which may call them (`forward` of a torch
module); and a module that is used as a value counts whole.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from taskvec.errors import InvalidInput

PACKAGES = ("taskvec", "tasks")
ROOMS = ("flows", *PACKAGES)
EFFECTS = "<import>"
PLAIN_DECORATORS = {"property", "classmethod", "staticmethod", "override"}
LOOKUPS = {"getattr", "hasattr", "attrgetter", "methodcaller"}  # take attributes as strings
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
IMPORT = ast.Import | ast.ImportFrom
COMPOUND = ast.If | ast.Try | ast.With | ast.For | ast.While | ast.Match

Target = tuple[str, str]  # a module and a name in it, which is empty for the module itself


def state(root: Path) -> tuple[tuple[str, int, int], ...]:
    """Return name, time and size of every source below ``root``; they change with the code."""
    paths = [path for room in ROOMS for path in (root / room).rglob("*.py")]
    found = [(path, path.stat()) for path in sorted(paths)]
    return tuple((str(path), info.st_mtime_ns, info.st_size) for path, info in found)


@dataclass
class Module:
    """The top level of one module."""

    package: str  # what its relative imports start from
    name: str
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, set[Target]] = field(default_factory=dict)  # by alias; `try` may give two
    imported: set[str] = field(default_factory=set)  # every module that its import loads
    effects: list[ast.stmt] = field(default_factory=list)  # other statements that run at import


@dataclass(frozen=True)
class Part:
    """A piece of a definition: a function, an assignment, a method, or the rest of a class.

    Attributes:
        method: its name if it counts only when something mentions it, else empty.
        references: the definitions (module, name) that it uses.
        attributes: every attribute name in it.
        text: the syntax tree without docstrings and positions, and what its names are imported as.
    """

    method: str
    references: frozenset[Target]
    attributes: frozenset[str]
    text: str


class Code:
    """The source of the packages below a directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._module = cache(self._read)
        self._parts = cache(self._split)
        self._loaded = cache(self._imported)
        self._digest = cache(self._compute)

    def fingerprint(self, roots: Iterable[str]) -> str:
        """Return the md5 of all code that the roots reach.

        Args:
            roots: ``package.module:function``, or ``package.module`` for everything in a module.
        """
        return self._digest(tuple(roots))

    def _compute(self, roots: Sequence[str]) -> str:
        queue: list[Target] = []
        for root in roots:
            name, _, function = root.partition(":")
            module = self._module(name)
            if module is None:
                raise ValueError(f"no module {name} below {self._root}")
            queue += [(name, function)] if function else [(name, d) for d in module.definitions]
        reached = self._reach(queue)
        lines = sorted(f"{where}:{part.text}" for where, part in reached)
        return hashlib.md5("\n".join(lines).encode(), usedforsecurity=False).hexdigest()

    def _reach(self, queue: list[Target]) -> set[tuple[str, Part]]:
        """Return all parts that definitions reach, with where they stand."""
        seen: set[Target] = set()
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
        # Together and in their order: of two definitions of a name the later one holds.
        plain = [node for node in nodes if not isinstance(node, ast.ClassDef)]
        parts = [self._part(source, "", plain)] if plain else []
        for node in nodes:
            if not isinstance(node, ast.ClassDef):
                continue
            foreign = self._has_foreign_base(source, node)
            optional = [item for item in node.body if not foreign and _is_optional(item)]
            rest = [item for item in node.body if item not in optional]
            header = [*node.bases, *node.keywords, *node.decorator_list]
            parts.append(self._part(source, "", [*header, *rest]))
            parts += [self._part(source, item.name, [item]) for item in optional]  # type: ignore[attr-defined]
        return tuple(parts)

    def _has_foreign_base(self, module: Module, node: ast.ClassDef) -> bool:
        """Return whether a class or a base of it derives from a class of another package."""
        for base in node.bases:
            expression = base.value if isinstance(base, ast.Subscript) else base
            attribute = expression.attr if isinstance(expression, ast.Attribute) else None
            root = expression.value if isinstance(expression, ast.Attribute) else expression
            if not isinstance(root, ast.Name):
                return True
            found = {(module.name, root.id)} if root.id in module.definitions else set()
            for target in module.imports.get(root.id, ()):
                local = self._imported_name(target, attribute)
                if not local:
                    return True
                found |= local
            for name, definition in found:
                if source := self._module(name):
                    classes = [i for i in source.definitions.get(definition, []) if i is not node]
                    if any(
                        isinstance(item, ast.ClassDef) and self._has_foreign_base(source, item)
                        for item in classes
                    ):
                        return True
        return False

    def _part(self, module: Module, method: str, nodes: Sequence[ast.AST]) -> Part:
        walked = [sub for node in nodes for sub in ast.walk(node)]
        own: dict[str, set[Target]] = {}  # imports inside a function
        references: set[Target] = set()
        qualified: dict[int, str] = {}
        attributes: set[str] = set()
        for sub in walked:
            if isinstance(sub, IMPORT):
                for alias, target in _aliases(sub, module.package):
                    own.setdefault(alias, set()).add(target)
                    references |= {(loaded, EFFECTS) for loaded in _modules(target)}
            elif isinstance(sub, ast.Attribute):
                attributes.add(sub.attr)
                if isinstance(sub.value, ast.Name):
                    qualified[id(sub.value)] = sub.attr
            elif isinstance(sub, ast.MatchClass):
                attributes.update(sub.kwd_attrs)
            elif isinstance(sub, ast.Call):
                attributes.update(_looked_up(sub))
        used: set[str] = set()
        for sub in walked:
            if isinstance(sub, ast.Name):
                if sub.id in module.definitions:
                    references.add((module.name, sub.id))
                for target in module.imports.get(sub.id, set()) | own.get(sub.id, set()):
                    used.add(f"{sub.id} = {'.'.join(target)}")
                    references |= self._imported_name(target, qualified.get(id(sub)))
        text = "\n".join([*sorted(used), *(ast.dump(node) for node in nodes)])
        return Part(method, frozenset(references), frozenset(attributes), text)

    def _imported_name(self, target: Target, attribute: str | None) -> set[Target]:
        """Return the definitions that an imported name means; none if they are not local."""
        module, name = target
        if name and self._module(f"{module}.{name}"):
            module, name = f"{module}.{name}", ""
        source = self._module(module)
        if source is None:
            return set()
        wanted = name or attribute or ""
        if wanted in source.imports and wanted not in source.definitions:
            further = attribute if name else None
            return {
                found
                for onward in source.imports[wanted]
                for found in self._imported_name(onward, further)
            }
        if name or wanted in source.definitions:
            return {(module, wanted)}
        return {(module, definition) for definition in source.definitions}

    def _imported(self, name: str) -> frozenset[str]:
        """Return a module and all local modules that importing it imports, packages included."""
        loaded, queue = set(), [name]
        while queue:
            name = queue.pop()
            module = self._module(name)
            if module is not None and name not in loaded:
                loaded.add(name)
                queue += [*module.imported, name.rpartition(".")[0]]
        return frozenset(loaded)

    def _read(self, name: str) -> Module | None:
        if name.split(".")[0] not in PACKAGES:
            return None
        path = self._root.joinpath(*name.split("."))
        is_package = path.is_dir()
        path = path / "__init__.py" if is_package else path.with_suffix(".py")
        if not path.is_file():
            return None
        try:
            tree = _without_docstrings(ast.parse(path.read_text()))
        except SyntaxError as error:
            raise InvalidInput(f"{path}:{error.lineno}: {error.msg}") from None
        module = Module(name if is_package else name.rpartition(".")[0], name)
        for node in tree.body:
            if isinstance(node, FUNCTION | ast.ClassDef):
                module.definitions.setdefault(node.name, []).append(node)
                continue
            for sub in ast.walk(node) if isinstance(node, IMPORT | COMPOUND) else ():
                if isinstance(sub, IMPORT):
                    for alias, target in _aliases(sub, module.package):
                        module.imports.setdefault(alias, set()).add(target)
                        module.imported |= _modules(target)
            targets = set(_targets(node))
            for target_name in targets:
                module.definitions.setdefault(target_name, []).append(node)
            if isinstance(node, COMPOUND) or not (targets or isinstance(node, IMPORT)):
                module.effects.append(node)
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
        elif isinstance(sub, FUNCTION | ast.ClassDef):
            yield sub.name


def _aliases(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[tuple[str, Target]]:
    """Yield what an import binds: a name and what it stands for."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.asname or alias.name.split(".")[0], (alias.name, "")
        return
    above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    source = ".".join([*above, *([node.module] if node.module else [])])
    for alias in node.names:
        yield alias.asname or alias.name, (source, alias.name)


def _modules(target: Target) -> set[str]:
    """Return the modules that importing a name may load: its own, and the name as a module."""
    module, name = target
    return {module, f"{module}.{name}"} if name else {module}


def _looked_up(call: ast.Call) -> Iterator[str]:
    """Yield the attributes that a call such as ``getattr(x, "name")`` mentions."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else call.func
    if (function.id if isinstance(function, ast.Name) else function) in LOOKUPS:
        for argument in call.args:
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield from argument.value.split(".")


def _without_docstrings(tree: ast.Module) -> ast.Module:
    """Remove every statement that is only a string: docstrings, also those of attributes."""
    for node in ast.walk(tree):
        for block in ("body", "orelse", "finalbody"):
            statements = getattr(node, block, None)
            if isinstance(statements, list):
                setattr(node, block, [item for item in statements if not _is_text(item)])
    return tree


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
