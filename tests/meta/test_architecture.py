"""Imports point one way; other frameworks stay out; only backend touches what is private to MindSpore.

Read with `ast`, so that an import inside a function or under TYPE_CHECKING counts too: a lazy import that breaks a
cycle only hides that the layers are wrong.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "msft_peft"

# From the top down. A layer may import the layers on the lines below its own.
STACK = (
    {"model", "optimizers", "distributed"},
    {"tuners", "prompts"},
    {"io"},
    {"core"},
    {"hosts"},
    {"registry"},
    {"config"},
    {"backend", "errors"},
)
# These stand beside the stack, and know nothing of it but its lowest line.
ASIDE = {"delta", "graph", "models"}
# The package's own __init__, HF's `functional`, the Auto classes and the command line are the roof: they may import
# anything, and nobody below imports them.
ROOF = {"", "__main__", "auto", "cli", "functional"}
# A method may be built from a delta Cell, so that its math stands once; any layer may raise our errors.
EXTRA = {("tuners", "delta"), ("prompts", "delta"), ("backend", "errors")}

OTHER_FRAMEWORKS = {"torch", "peft", "transformers", "mindnlp", "mindformers", "mindone"}
HOST_FRAMEWORKS = {"transformers", "mindnlp", "mindformers", "mindone"}

# MindSpore documents these two although they lie in a package that is otherwise private.
PRIVATE_PACKAGES = ("mindspore.common", "mindspore.graph")
PUBLIC_IN_PRIVATE = ("mindspore.common.initializer", "mindspore.common.np_dtype")

# (module, what it may do all the same): the text as the finding has it. An entry that no longer occurs is an error.
ALLOWED: set[tuple[str, str]] = set()

VAGUE_NAMES = {"utils", "util", "helpers", "helper", "other", "others", "misc", "common"}


def allowed_layers(layer: str) -> set[str]:
    """The layers that `layer` may import, besides itself."""
    lowest = STACK[-1]
    below: set[str] = set(lowest) if layer in ASIDE else set()
    for height, names in enumerate(STACK):
        if layer in names:
            below = set().union(*STACK[height + 1 :])
    return below | {target for source, target in EXTRA if source == layer}


def layer_of(module: str) -> str:
    """The layer of a module of the library: the name after `msft_peft`, "" for the package itself."""
    return [*module.split("."), ""][1]


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """The dotted names that `module` imports: `from a import b` gives a.b, whether b is a module or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def wrong_layers(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Imports of a layer above, or beside, or of the roof."""
    layer = layer_of(module)
    if layer in ROOF:
        return
    allowed = allowed_layers(layer) | {layer}
    for name in imports(tree, module, is_package):
        if name.split(".")[0] == "msft_peft" and layer_of(name) not in allowed:
            yield f"imports {name}"


def foreign_imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Imports of other frameworks; hosts may import the model libraries, and nothing may import torch or peft."""
    banned = OTHER_FRAMEWORKS - (HOST_FRAMEWORKS if layer_of(module) == "hosts" else set())
    yield from (f"imports {name}" for name in imports(tree, module, is_package) if name.split(".")[0] in banned)


def is_private(name: str) -> bool:
    """Whether a dotted name below mindspore is one that MindSpore does not document."""
    if any(name == public or name.startswith(public + ".") for public in PUBLIC_IN_PRIVATE):
        return False
    inside = any(name == package or name.startswith(package + ".") for package in PRIVATE_PACKAGES)
    return inside or any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def mindspore_names(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Every dotted name below mindspore that the module imports, or reaches from a name that it imported."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            bound.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    names = set(imports(tree, module, is_package))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, *rest = ast.unparse(node).split(".")
            names.add(".".join([bound.get(root, ""), *rest]))
    yield from (name for name in names if name.split(".")[0] == "mindspore")


def private_names(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Uses of private MindSpore names outside backend."""
    if layer_of(module) != "backend":
        private = {name for name in mindspore_names(tree, module, is_package) if is_private(name)}
        # The import of a private module says it all; the names reached through it would only repeat it.
        yield from (f"uses {name}" for name in private if not any(name.startswith(other + ".") for other in private))


Rule = Callable[[ast.AST, str, bool], Iterator[str]]
RULES: list[Rule] = [wrong_layers, foreign_imports, private_names]


def findings(rule: Rule, source: str, module: str, is_package: bool = False) -> set[tuple[str, str]]:
    """What `rule` has against a module, as (module, text)."""
    return {(module, text) for text in rule(ast.parse(source), module, is_package)}


def modules() -> list[tuple[str, Path]]:
    """The modules of the library: dotted name and file."""
    found = []
    for path in sorted(LIBRARY.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def all_findings(rule: Rule) -> set[tuple[str, str]]:
    """What `rule` has against the library."""
    return set().union(
        *(findings(rule, path.read_text("utf-8"), m, path.name == "__init__.py") for m, path in modules())
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_library_follows_the_rule(rule: Rule):
    assert sorted(all_findings(rule) - ALLOWED) == []


def test_every_exception_is_still_needed():
    assert ALLOWED - set().union(*(all_findings(rule) for rule in RULES)) == set()


def test_every_module_has_a_place():
    known = set().union(*STACK) | ASIDE | ROOF
    assert len(modules()) > 10
    assert {layer_of(module) for module, _ in modules()} - known == set()


def test_no_module_has_a_vague_name():
    assert [str(path) for path in LIBRARY.rglob("*") if path.stem.lstrip("_") in VAGUE_NAMES] == []


# Each rule must be able to fail: (rule, module, source, what is found).
BAD = [
    (
        wrong_layers,
        "msft_peft.core.layer",
        "from msft_peft.model import PeftModel",
        "msft_peft.model.PeftModel",
    ),
    (wrong_layers, "msft_peft.core.layer", "def f():\n    import msft_peft.io.ckpt", "msft_peft.io.ckpt"),
    (wrong_layers, "msft_peft.core.layer", "from ..tuners import lora", "msft_peft.tuners.lora"),
    (wrong_layers, "msft_peft.core.layer", "from .. import PeftModel", "msft_peft.PeftModel"),
    (wrong_layers, "msft_peft.core.layer", "import msft_peft", "imports msft_peft"),
    (
        wrong_layers,
        "msft_peft.core.layer",
        "import importlib\nimportlib.import_module('msft_peft.model')",
        "msft_peft.model",
    ),
    (wrong_layers, "msft_peft.core", "from ..cli import main", "msft_peft.cli.main"),
    (wrong_layers, "msft_peft.config", "from .registry import Method", "msft_peft.registry.Method"),
    (wrong_layers, "msft_peft.tuners.lora", "from msft_peft.prompts import x", "msft_peft.prompts.x"),
    (wrong_layers, "msft_peft.backend.ops", "from msft_peft.config import x", "msft_peft.config.x"),
    (wrong_layers, "msft_peft.errors", "from msft_peft.backend import x", "msft_peft.backend.x"),
    (wrong_layers, "msft_peft.models.llama", "from msft_peft.core.layer import x", "msft_peft.core.layer.x"),
    (wrong_layers, "msft_peft.delta.dense", "from msft_peft.graph import x", "msft_peft.graph.x"),
    (wrong_layers, "msft_peft.model.peft_model", "from msft_peft.models import llama", "msft_peft.models.llama"),
    (foreign_imports, "msft_peft.core.layer", "import torch.nn as nn", "torch.nn"),
    (
        foreign_imports,
        "msft_peft.core.layer",
        "def f():\n    from transformers import AutoModel",
        "transformers.AutoModel",
    ),
    (foreign_imports, "msft_peft.cli", "__import__('peft')", "peft"),
    (foreign_imports, "msft_peft.hosts.mindnlp", "import torch", "torch"),
    (
        private_names,
        "msft_peft.core.layer",
        "from mindspore._c_expression import Tensor",
        "mindspore._c_expression.Tensor",
    ),
    (private_names, "msft_peft.core.layer", "from mindspore.graph import api", "mindspore.graph.api"),
    (
        private_names,
        "msft_peft.core.layer",
        "from mindspore.common.parameter import f",
        "mindspore.common.parameter.f",
    ),
    (private_names, "msft_peft.core.layer", "import mindspore as ms\nms.common.api.f()", "mindspore.common"),
    (private_names, "msft_peft.cli", "from mindspore import nn\nnn.Cell._get(1)", "mindspore.nn.Cell._get"),
    (private_names, "msft_peft.core.layer", "import mindspore.graph.api\n", "mindspore.graph.api"),
]
GOOD = [
    (wrong_layers, "msft_peft.core.layer", "from .targets import x\nfrom msft_peft.hosts import Site\nimport os.path"),
    (wrong_layers, "msft_peft.core", "from .layer import x\nfrom ..backend import y"),
    (wrong_layers, "msft_peft.tuners.lora.patch", "from msft_peft.delta.lora_dense import LoRADense"),
    (
        wrong_layers,
        "msft_peft.delta.dense",
        "from msft_peft.backend.ops import x\nfrom msft_peft.errors import PeftError",
    ),
    (wrong_layers, "msft_peft.cli", "from msft_peft import PeftModel\nfrom msft_peft.model import x"),
    (foreign_imports, "msft_peft.hosts.mindnlp", "from transformers import AutoModel"),
    (foreign_imports, "msft_peft.io.torch_bin", "from msft_peft.io.torch import x\nimport peftlike"),
    (private_names, "msft_peft.core.layer", "from mindspore.common.initializer import Normal"),
    (private_names, "msft_peft.core.layer", "from mindspore import nn\nnn.Cell.__init__(x)\nself._cells = 1"),
    (private_names, "msft_peft.backend.graphs", "from mindspore.graph.api import _cell_graph_executor"),
]


@pytest.mark.parametrize(("rule", "module", "source", "name"), BAD)
def test_rule_bites(rule: Rule, module: str, source: str, name: str):
    texts = [text for _, text in findings(rule, source, module, is_package=module == "msft_peft.core")]
    assert [text for text in texts if text.endswith(name)], texts


@pytest.mark.parametrize(("rule", "module", "source"), GOOD)
def test_rule_lets_pass(rule: Rule, module: str, source: str):
    assert findings(rule, source, module, is_package=module == "msft_peft.core") == set()
