"""The rules of STYLE.md that a machine can read: import direction, sizes, docstrings, no pickle, no printing."""

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest

import keeplora
from keeplora.methods.registry import METHODS

ROOT = Path(keeplora.__file__).parent

PACKAGES = (
    "config", "errors", "progress", "registry", "task", "subspace", "layers", "methods", "data", "models", "training",
    "evaluation", "report", "runs", "studies", "cli", "__main__", "__init__",
)  # fmt: skip
"""From the lowest up: a module may import its own package and those before it."""

ONLY_IMPORTERS = {
    "peft": {"layers/lora"},
    "accelerate": {"training/trainer"},
    "tyro": {"cli"},
    "rich": {"cli"},
}

FILES = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}

modules = pytest.mark.parametrize("name", FILES)


def part_of(name):
    """Return the package that a file belongs to, or its own name."""
    return name.split("/")[0]


def imports(tree):
    """Return every imported module, those inside functions too; `from keeplora import x` is keeplora.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (
                [f"keeplora.{alias.name}" for alias in node.names] if node.module == "keeplora" else [node.module]
            )


def definitions(tree):
    """Return every function and class with its qualified name."""

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield prefix + child.name, child
                yield from walk(child, f"{prefix}{child.name}.")

    yield from walk(tree, "")


def test_every_module_has_its_place_in_the_packages():
    assert {part_of(name) for name in FILES} <= set(PACKAGES)


def imports_upwards(name, tree):
    """List the modules of a package above its own that a file imports."""
    height = {part: i for i, part in enumerate(PACKAGES)}
    own = [module for module in imports(tree) if module.split(".")[0] == "keeplora"]
    return [module for module in own if height[module.split(".")[1]] > height[part_of(name)]]


@modules
def test_imports_go_down_never_up(name):
    assert not imports_upwards(name, TREES[name])


@pytest.mark.parametrize("lower", range(len(PACKAGES) - 2))
def test_an_import_the_wrong_way_round_is_found(lower):
    below, above = PACKAGES[lower], PACKAGES[lower + 1]
    for line in (f"from keeplora.{above} import x", f"import keeplora.{above}.x", f"from keeplora import {above}",
                 f"def f():\n    from keeplora.{above}.x import y"):  # fmt: skip
        assert imports_upwards(f"{below}/x", ast.parse(line)), line
        assert not imports_upwards(f"{above}/x", ast.parse(line.replace(above, below))), line


def test_the_top_level_is_short():
    assert len(list(ROOT.glob("*.py"))) <= 10


@modules
def test_a_wrapped_library_has_one_importer(name):
    for module in imports(TREES[name]):
        owners = ONLY_IMPORTERS.get(module.split(".")[0])
        assert owners is None or {name, part_of(name)} & owners, f"{name} imports {module}"


def test_the_modules_import_each_other_without_a_circle():
    edges = {
        name: {module.removeprefix("keeplora.").replace(".", "/") for module in imports(tree)
               if module.startswith("keeplora.")}
        for name, tree in TREES.items()
    }  # fmt: skip
    edges = {name.removesuffix("/__init__"): targets for name, targets in edges.items()}
    while edges:
        free = [name for name, targets in edges.items() if not targets & set(edges)]
        assert free, f"a circle among {sorted(edges)}"
        for name in free:
            del edges[name]


@modules
def test_no_method_is_asked_for_by_name_outside_the_methods(name):
    if part_of(name) == "methods":
        return
    for node in ast.walk(TREES[name]):
        # `"zero_shot" in record` asks for a key, so of a membership test only what stands on the right counts.
        if isinstance(node, ast.Compare | ast.Match):
            is_membership = isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn)
            asked = node.comparators if is_membership else [node]
            words = {leaf.value for part in asked for leaf in ast.walk(part) if isinstance(leaf, ast.Constant)}
            assert not words & set(METHODS), f"{name}:{node.lineno} compares with the name of a method"


def promised_by_a_base(name, qualified):
    """Say whether a method overrides one whose docstring is its promise too."""
    module = importlib.import_module(f"keeplora.{name.replace('/', '.')}".removesuffix(".__init__"))
    *owners, method = qualified.split(".")
    owner = functools.reduce(getattr, owners, module)
    bases = [getattr(base, method) for base in owner.__mro__[1:] if hasattr(base, method)] if owners else []
    return any(getattr(one.fget if isinstance(one, property) else one, "__doc__", None) for one in bases)


@modules
def test_every_public_name_has_a_docstring(name):
    assert ast.get_docstring(TREES[name]), f"{name} has no docstring"
    for qualified, node in definitions(TREES[name]):
        inside_function = any(part for part in qualified.split(".")[:-1] if part and part[0].islower())
        is_private = any(part.startswith("_") for part in qualified.split("."))
        if not is_private and not inside_function and not promised_by_a_base(name, qualified):
            assert ast.get_docstring(node), f"{name}: {qualified} has no docstring"


MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 40


def test_files_keep_to_the_size_limit():
    long = {name for name, path in FILES.items() if len(path.read_text().splitlines()) > MOST_LINES}
    assert not long


def test_functions_keep_to_the_size_limit():
    """Counted without the docstring, which is a promise and may be long."""
    long = set()
    for name, tree in TREES.items():
        for qualified, node in definitions(tree):
            if isinstance(node, ast.ClassDef):
                continue
            text = node.body[0] if ast.get_docstring(node) else None
            docstring = text.end_lineno - text.lineno + 1 if text else 0
            if node.end_lineno - node.lineno + 1 - docstring >= MOST_LINES_OF_A_FUNCTION:
                long.add(f"{name}.{qualified}")
    assert not long


@modules
def test_no_signature_has_more_than_six_parameters(name):
    for qualified, node in definitions(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])
            count -= bool(arguments.args) and arguments.args[0].arg in ("self", "cls")
            if node.name != "__init__":
                assert count <= 6, f"{name}: {qualified} has {count} parameters"


@modules
def test_nothing_prints_but_the_command_line(name):
    if part_of(name) == "cli":
        return
    for node in ast.walk(TREES[name]):
        called = node.func if isinstance(node, ast.Call) else None
        assert not (isinstance(called, ast.Name) and called.id in ("print", "breakpoint")), f"{name}:{node.lineno}"
        assert not (isinstance(called, ast.Attribute) and called.attr == "write" and "sys.std" in ast.unparse(called))


PROJECT = ROOT.parents[1]

TESTED_BY = {
    # Commands are tried as a user types them.
    "cli/test_main": ("__main__", "cli/flags", "cli/learn", "cli/progress", "cli/runs", "cli/tables"),
    "studies/test_doctor": (
        "cli/doctor", "studies/doctor/data", "studies/doctor/diagnose", "studies/doctor/dry_run",
        "studies/doctor/duplicates", "studies/doctor/findings", "studies/doctor/model",
    ),
    "studies/test_image_fingerprints": ("studies/doctor/image_fingerprints",),
    "studies/test_resource_estimate": ("studies/doctor/resource_estimate",),
    "studies/test_compare": (
        "studies/compare/comparison", "studies/compare/config", "studies/compare/process_pool", "studies/compare/run",
    ),
    # What every method has is tested on all methods.
    "methods/test_contract": ("methods/base", "methods/keeplora", "methods/protecting", "layers/names"),
    "methods/test_guards": ("layers/merging", "layers/module_state", "layers/weights"),
    "methods/test_variants": ("methods/registry",),
    "methods/test_ewc": ("layers/fisher",),
    # Passes over layers are tried where what they find is.
    "layers/test_statistics": ("layers/outside_uses",),
    "system/test_processes": ("layers/distributed",),
    "subspace/test_protected": ("subspace/certificate",),
    "runs/test_export": ("runs/exported", "subspace/low_rank_update"),
    "evaluation/test_accuracy_matrix": ("evaluation/metrics",),
    "models/test_families": ("models/dual_encoder", "models/registry", "models/interfaces"),
    "report/test_html": ("report/charts",),
    "runs/test_loop": ("runs/phases", "progress"),
    "training/test_trainer": ("training/checkpoints",),
    "test_config": ("errors",),
}  # fmt: skip
"""Which test has the files of the library that have none of their own, named like them in the same folder."""


def test_every_file_has_a_test():
    tests = PROJECT / "tests"
    elsewhere = {name for names in TESTED_BY.values() for name in names}
    assert all((tests / f"{place}.py").is_file() for place in TESTED_BY)
    for name in FILES:
        package, _, file = name.rpartition("/")
        has_own = (tests / package / f"test_{file}.py").is_file()
        assert has_own != (name in elsewhere) or file == "__init__", f"{name} has no test, or is named for nothing"
    assert elsewhere <= set(FILES)


OF_THE_PROJECT = sorted(
    [
        *ROOT.rglob("*.py"),
        *(path for part in ("tools", "tests", "benchmarks") for path in (PROJECT / part).rglob("*.py")),
    ]
)


@pytest.mark.slow
@pytest.mark.parametrize("path", OF_THE_PROJECT, ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_nothing_is_pickled(path):
    tree = ast.parse(path.read_text())
    modules = {module.split(".")[0] for module in all_imports(tree)}
    assert not modules & {"pickle", "_pickle", "cPickle", "cloudpickle", "shelve", "dill", "joblib", "marshal"}
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    allowed = {"torch.save"} if path.name == "test_no_pickle.py" else set()  # It writes what has to be refused.
    assert not used & ({"torch.load", "torch.save", "pd.read_pickle"} - allowed)
    # Without this word numpy reads no pickle.
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "allow_pickle"]


def all_imports(tree):
    """Return every imported module, by any form of import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@modules
def test_no_code_runs_on_import(name):
    """Only definitions, assignments, and docstrings stand at the top; an assignment calls nothing that does work."""
    harmless = ("dict", "list", "frozenset", "Path", "TypeVar", "getLogger", "Console", "dataclass", "version")
    for node in TREES[name].body:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING"):
            continue
        if isinstance(node, ast.AugAssign) and ast.unparse(node.target).endswith(".__annotations__"):
            continue  # Flags of a command that are made of configurations.
        assert isinstance(
            node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign | ast.Expr
        ), f"{name}:{node.lineno}"
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"{name}:{node.lineno} runs on import"
        if isinstance(node, ast.Assign | ast.AnnAssign):
            for call in (leaf for leaf in ast.walk(node) if isinstance(leaf, ast.Call)):
                called = ast.unparse(call.func).split(".")[-1]
                assert called in (*harmless, "with_name") or called[0].isupper(), f"{name}:{node.lineno} calls {called}"


@modules
def test_no_exception_is_swallowed_and_no_bare_except(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name}:{node.lineno} bare except"
            # What a library raises for a user's files may be anything.
            is_allowed = name == "models/pretrained" and ast.unparse(node.type) == "Exception"
            assert is_allowed or ast.unparse(node.type) not in ("Exception", "BaseException"), f"{name}:{node.lineno}"
            assert not all(isinstance(line, ast.Pass) for line in node.body), f"{name}:{node.lineno} swallows"


@modules
def test_no_file_is_named_for_nothing(name):
    assert name.split("/")[-1] not in ("utils", "util", "helper", "helpers", "common", "misc", "manager")
    assert re.fullmatch(r"[a-z_]+", name.split("/")[-1])
