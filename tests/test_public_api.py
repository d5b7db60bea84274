"""What the package promises by name, and how its modules may depend on each other."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import graph_kd

SOURCE = Path(graph_kd.__file__).parent
ALLOWED = {
    "_autograd": set(),
    "_checks": set(),
    "_distributed": set(),  # what travels between processes serves the loss and the optimizer
    "_gradient_sums": set(),
    "_gate": {"_gradient_sums"},
    "_align": {"_checks"},
    "_precision": set(),
    "_svd_exact": set(),
    "_leading": {"_svd_exact"},
    "_features": {"_checks"},
    "_svd": {"_checks", "_leading", "_precision", "_svd_exact"},
    "_svd_feature": {"_checks", "_features", "_svd"},
    "_estimator": {"_checks"},
    "_graphs": {"_estimator"},
    "_optimizer_shell": {"_distributed", "_gate", "_gradient_sums"},
    "_grad_clip": {
        "_autograd",
        "_checks",
        "_distributed",
        "_gate",
        "_gradient_sums",
        "_optimizer_shell",
    },
    "_forward_pass": set(),
    "_select": set(),
    "_hooks": {"_forward_pass", "_select"},
    "_transfer": {
        "_align",
        "_checks",
        "_distributed",
        "_estimator",
        "_features",
        "_forward_pass",
        "_graphs",
        "_svd",
    },
    "_axes": set(),
    "testing": {"_axes", "_checks", "_features", "_forward_pass", "_hooks", "_select"},
}


def test_all_names_resolve_and_are_sorted():
    assert graph_kd.__all__ == sorted(graph_kd.__all__)
    assert all(hasattr(graph_kd, name) for name in graph_kd.__all__)


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_modules_import_only_what_stands_before_them(module):
    tree = ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8"))
    imported = {
        node.module.removeprefix("graph_kd.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("graph_kd")
    }
    assert imported <= ALLOWED[module]
    assert set(importlib.import_module(f"graph_kd.{module}").__all__)


def test_every_module_is_listed_here():
    assert {path.stem for path in SOURCE.glob("*.py")} - {"__init__"} == set(ALLOWED)


def test_package_is_typed():
    assert (SOURCE / "py.typed").exists()


def test_import_needs_no_more_than_torch_and_einops():
    code = (
        "import sys, torch, einops; before = set(sys.modules); import graph_kd, graph_kd.testing\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'numpy', 'sklearn', 'matplotlib', 'tqdm', 'hypothesis'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
