"""Small enough to be read: files, functions, parameters; and what is nowhere to be found."""

from __future__ import annotations

import ast
import re

from source_tree import PACKAGE, ROOT, code_tokens, functions, modules, short, tree

MOST_FILE_LINES, LONG_FILE_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 400, 600, 80, 8


def test_files_are_short() -> None:
    """Up to 600 lines if the docstring says why the file is one ("One file: ...")."""
    long = {}
    for p in modules():
        n, said = len(p.read_text().splitlines()), "One file:" in (ast.get_docstring(tree(p)) or "")
        if n > (LONG_FILE_LINES if said else MOST_FILE_LINES):
            long[short(p)] = n
    assert long == {}


def test_functions_are_short() -> None:
    long = {
        f"{short(p)}:{f.name}": n
        for p in modules()
        for f in functions(p)
        if (n := (f.end_lineno or f.lineno) - f.lineno + 1) > MOST_FUNCTION_LINES
    }
    assert long == {}


def test_functions_take_few_parameters() -> None:
    """``self`` and ``ctx`` are not asked for by a caller."""
    many = {}
    for path in modules():
        for f in functions(path):
            names = [a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)]
            asked = [n for n in names if n not in ("self", "cls", "ctx")]
            is_verb = short(path) in (
                "cli/audit.py",
                "cli/evaluation.py",
            )  # their parameters are the options that a user sees
            if len(asked) > MOST_PARAMETERS and not is_verb:
                many[f"{short(path)}:{f.name}"] = len(asked)
    assert many == {}


def test_no_drawer_for_everything() -> None:
    names = {p.stem for p in PACKAGE.rglob("*.py")} | {p.name for p in PACKAGE.rglob("*") if p.is_dir()}
    assert names & {"utils", "util", "common", "helpers", "helper", "misc", "manager", "tools"} == set()


CALLS = ("eval", "exec", "compile", "parse_expr", "sympify", "__import__")
WORDS = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "parse_expr", "sympify"}


def test_nothing_runs_what_it_reads() -> None:
    guilty = []
    for path in modules():
        for number, token in code_tokens(path):
            if token in WORDS:
                guilty.append(f"{short(path)}:{number} {token}")
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name) and node.func.id in CALLS:
                guilty.append(f"{short(path)}:{node.lineno} {node.func.id}()")
            if ast.unparse(node.func) in ("torch.load", "torch.save", "np.load", "numpy.load", "os.system"):
                guilty.append(f"{short(path)}:{node.lineno} {ast.unparse(node.func)}()")
            for keyword in node.keywords:
                if keyword.arg in ("shell", "allow_pickle") and not _is_false(keyword.value):
                    guilty.append(f"{short(path)}:{node.lineno} {keyword.arg}")
    assert guilty == []


LOADERS = ("from_pretrained", "from_config", "load_dataset")


def test_code_of_a_model_or_data_set_is_refused_in_words() -> None:
    """Without the word, transformers asks on stdin whether to run a folder's code."""
    guilty, seen = [], 0
    for path in [*modules(), *sorted((ROOT / "benchmarks").rglob("*.py"))]:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                said = [k.value for k in node.keywords if k.arg == "trust_remote_code"]
                loads = isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS
                seen += loads
                if (loads and not said) or not all(map(_is_false, said)):
                    guilty.append(f"{short(path)}:{node.lineno}")
    assert guilty == []
    assert seen >= 10, "the search finds nothing"


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_only_one_module_prints() -> None:
    """It makes control characters visible and hides secrets."""
    guilty = []
    for path in modules("cli"):
        for node in ast.walk(tree(path)):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if (
                name in ("print", "typer.echo", "typer.secho", "Console", "rich.print")
                and short(path) != "cli/output.py"
            ):
                guilty.append(f"{short(path)}:{node.lineno} {name}")
    assert guilty == []


def test_nobody_catches_everything() -> None:
    """Except if a user's function is called, or the parser of formulas or the readers of model files, which raise
    plain exceptions. A clean-up that raises again does not count."""
    guilty: list[str] = []
    excepted: dict[str, list[str]] = {"user_code.py": [], "grade/symbolic.py": [], "model/load.py": []}
    for path in modules():
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = ast.unparse(node.type) if node.type else "everything"
            if re.search(r"\b(everything|Exception|BaseException)\b", caught):
                again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
                if not again:
                    excepted.get(short(path), guilty).append(f"{short(path)}:{node.lineno} {caught}")
    assert guilty == []
    assert all(len(found) == 1 for found in excepted.values()), "one place only"


def test_records_are_frozen() -> None:
    for path in (PACKAGE / "records.py", PACKAGE / "settings.py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                for decorator in node.decorator_list:
                    text = ast.unparse(decorator)
                    if "dataclass" in text:
                        assert "frozen=True" in text, node.name
                        assert "kw_only=True" in text, node.name


def test_a_module_says_what_it_is() -> None:
    silent = [short(p) for p in modules() if p.name != "__main__.py" and not ast.get_docstring(tree(p))]
    assert silent == []


def test_inheritance_is_rare() -> None:
    """From Protocols, settings models, exceptions, enums and what torch asks for; hardly ever from each
    other."""
    allowed = {
        "Protocol", "Frozen", "BaseModel", "StageSettings", "ImitationSettings", "nn.Module", "nn.Linear", "UserDict[str, Tensor]",
            "Exception",
        "Generic[Item]",
        "ValueError", "RuntimeError", "ArithmeticError", "OSError", "UserError",
        "enum.Enum", "enum.IntEnum", "enum.StrEnum", "torch.autograd.Function", "PackedLayout", "TorchFunctionMode",
        "TorchDispatchMode",
        "torch.utils.data.Dataset", "importlib.machinery.SourceFileLoader", "io.RawIOBase", "types.ModuleType",
        "WeightTransferEngine", "WeightTransferInitInfo", "WeightTransferUpdateInfo",  # what vLLM asks for
        "urllib.request.AbstractHTTPHandler", "BadAnswer", "Console", "transformers.TrainerCallback",
    }  # fmt: skip
    found = {
        f"{short(p)}:{node.name}({ast.unparse(base)})"
        for p in modules()
        for node in ast.walk(tree(p))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        # An adapter inherits from what it audits.
        if ast.unparse(base) not in allowed and "subjects" not in p.parts
    }
    assert found == set()


def test_the_root_is_the_repository() -> None:
    assert (ROOT / "pyproject.toml").is_file()
