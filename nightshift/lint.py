"""Finds a train.py that sets its own seed, before a run is spent on it.

The runner sets every run's seed; a candidate that fixes one of its own would be judged on a single draw, however
often it is repeated. This is a courtesy to an honest proposer, not a fence: what it cannot see shows later as a
variance over seeds that vanishes.
"""

from __future__ import annotations

import ast
import hashlib

REMEDY = "the runner sets the seed of every run, so derive this from run.seed or delete it"
SETTERS = {"manual_seed", "manual_seed_all", "set_seed", "seed_everything", "seed", "seed_all"}
GENERATORS = {"numpy.random.default_rng", "numpy.random.RandomState", "numpy.random.SeedSequence", "random.Random"}
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def check(train_py: str) -> list[str]:
    """A reason with its line number for each place that sets a seed, in the order of the lines; empty is clean.

    Text that does not parse has no reasons here: running it says what is wrong with it.
    """
    try:
        tree = ast.parse(train_py)
    except (SyntaxError, ValueError, RecursionError):
        return []
    modules, derived = _imports(tree), _derived_names(tree)
    reasons: dict[int, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _sets_seed(node, modules, derived):
            shown = ast.unparse(node)
            shown = shown if len(shown) <= 80 else shown[:77] + "..."
            reasons.setdefault(node.lineno, f"line {node.lineno}: {shown} sets a seed of its own; {REMEDY}")
        elif isinstance(node, ast.Constant) and node.value == "PYTHONHASHSEED":
            reasons.setdefault(node.lineno, f"line {node.lineno}: PYTHONHASHSEED is set; {REMEDY}")
        elif isinstance(node, ast.keyword) and node.arg == "PYTHONHASHSEED":
            reasons.setdefault(node.value.lineno, f"line {node.value.lineno}: PYTHONHASHSEED is set; {REMEDY}")
    return [reasons[line] for line in sorted(reasons)]


def blob(train_py: str) -> str:
    """The name that git gives these bytes, by which a train.py of the night's history is known again."""
    content = train_py.encode()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _imports(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for: {"np": "numpy", "manual_seed": "torch.manual_seed"}."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _dotted(expression: ast.expr, modules: dict[str, str]) -> str:
    """`np.random.seed` as "numpy.random.seed"; what is no plain name, such as the result of a call, as ""."""
    if isinstance(expression, ast.Name):
        return modules.get(expression.id, expression.id)
    if isinstance(expression, ast.Attribute):
        return f"{_dotted(expression.value, modules)}.{expression.attr}"
    return ""


def _is_derived(expression: ast.AST, derived: set[str]) -> bool:
    """Whether a value comes from run.seed (any `.seed`; a call of one is itself found out) or from a name that does."""
    return any(
        (isinstance(node, ast.Attribute) and node.attr == "seed") or (isinstance(node, ast.Name) and node.id in derived)
        for node in ast.walk(expression)
    )


def _derived_names(tree: ast.Module) -> set[str]:
    """Names that carry run.seed, through any chain of assignments.

    A parameter counts, for its caller may pass the seed, unless its default is a constant number.
    """
    derived: set[str] = set()
    assignments: list[tuple[list[ast.expr], ast.expr]] = []
    for node in ast.walk(tree):
        if isinstance(node, Function):
            derived |= _parameters(node.args)
        elif isinstance(node, ast.Assign):
            assignments.append((node.targets, node.value))
        elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value is not None:
            assignments.append(([node.target], node.value))
    size = -1
    while size != len(derived):
        size = len(derived)
        for targets, value in assignments:
            if _is_derived(value, derived):
                derived |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return derived


def _parameters(args: ast.arguments) -> set[str]:
    positional = [*args.posonlyargs, *args.args]
    bare: list[ast.expr | None] = [None] * (len(positional) - len(args.defaults))
    defaults = [*bare, *args.defaults, *args.kw_defaults]
    return {
        parameter.arg
        for parameter, default in zip([*positional, *args.kwonlyargs], defaults, strict=True)
        if not (isinstance(default, ast.Constant) and isinstance(default.value, int | float))
    }


def _sets_seed(call: ast.Call, modules: dict[str, str], derived: set[str]) -> bool:
    name = _dotted(call.func, modules)
    last = call.func.attr if isinstance(call.func, ast.Attribute) else name.rpartition(".")[2]
    if name in GENERATORS:
        if not (call.args or call.keywords):
            return False  # fresh entropy, no seed
    elif last not in SETTERS:
        return False
    return not any(_is_derived(value, derived) for value in [*call.args, *(k.value for k in call.keywords)])
