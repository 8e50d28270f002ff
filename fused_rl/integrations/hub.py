"""A folder that Hugging Face's `kernels` loads: `kernels.get_local_kernel(Path(DIR))`.

    DIR/build/torch-cuda, torch-rocm      Triton, any torch
    DIR/build/torch-cpu                   plain torch, any torch
    DIR/build/torch213-cxx11-cpu-...      the C++ library of this installation, for its torch alone
    DIR/README.md, LICENSE

A variant is the package as it stands here, under a name that `kernels` gives it, beside other
versions and beside an installed fused_rl. Hence its modules import each other by relative names,
and its operators have a namespace of their own, formed from a hash of what is in it: operators are
global in a process, and a second registration of one aborts it.
"""

import ast
import base64
import hashlib
import json
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import distribution
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import fused_rl
from fused_rl.system import children
from fused_rl.system.signals import stops

NAME = "fused-rl"
# Of the interface, for `get_kernel(..., version=...)`: raised when a caller would have to change.
VERSION = 1
LIBRARY = "libfused_rl_cpu.so"
# The namespace in the C++ library is replaced in place: another one must be as long.
NAMESPACE = "fused_rl"
PREFIX = "frl"
# `kernels` looks for layers in an attribute of the package.
LAYERS = "\nfrom .integrations import layers  # noqa: E402, F401\n"

# Prints the kernels for CPUs that there are once a library is loaded.
PROBE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
print(*torch._C._dispatch_get_registrations_for_dispatch_key("CPU"))
"""


@dataclass(frozen=True)
class Variant:
    """name: that of its folder, by which `kernels` chooses. library: the C++ library, if any."""

    name: str
    backend: str
    library: bytes | None = None


def export(directory: Path) -> list[Path]:
    """Writes the folder and returns the folders of its variants.

    Args:
        directory: a new or an empty one; its parents are made.

    Raises:
        ValueError: the directory holds something, or is none; the C++ library is not one that a
            namespace can be given to.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"DIR must be new or empty, and {directory} is not")
    sources = package_sources()
    contents = {v.name: variant_files(v, sources) for v in variants()}
    content = {f"build/{v}/{name}": data for v, of in contents.items() for name, data in of.items()}
    content["README.md"] = card().encode()
    content["LICENSE"] = distribution(NAME).read_text("licenses/LICENSE").encode()
    write_all(directory, content)
    return [directory / "build" / name for name in contents]


def card() -> str:
    """The model card of this version: hub.md, beside this file."""
    text = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    return text.replace("{version}", fused_rl.__version__)


def write_all(directory: Path, content: dict[str, bytes]) -> None:
    """Writes files into a new or empty folder; nothing is left of them where one cannot be."""
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        for name, data in content.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(data)
    except BaseException:
        stops.held = True
        for name in {Path(name).parts[0] for name in content}:
            shutil.rmtree(directory / name, ignore_errors=True)
            with suppress(OSError):
                (directory / name).unlink()
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def variants() -> list[Variant]:
    """What this installation has to offer."""
    anywhere = [Variant(f"torch-{backend}", backend) for backend in ("cuda", "rocm", "cpu")]
    library = files("fused_rl") / LIBRARY
    if not library.is_file():
        return anywhere
    return [*anywhere, Variant(cpu_variant(), "cpu", library.read_bytes())]


def cpu_variant() -> str:
    """The name of a variant with C++ for the torch, the processor and the system at hand."""
    major, minor = torch.__version__.split(".")[:2]
    abi = "cxx11" if torch.compiled_with_cxx11_abi() else "cxx98"
    system = platform.system().lower()
    return f"torch{major}{minor}-{abi}-cpu-{platform.machine()}-{system}"


def package_sources() -> dict[str, str]:
    """The modules behind `fused_rl` and its layers, as relative path -> source."""
    root = Path(fused_rl.__file__).parent
    triton = Path(find_spec("fused_rl.kernels.kl").origin).parent
    sources = {f"kernels/{path.name}": path.read_text() for path in triton.glob("*.py")}
    wanted = {"__init__.py", "integrations/layers.py"}
    while wanted:
        name = wanted.pop()
        sources[name] = (root / name).read_text()
        found = {name for path in imported(ast.parse(sources[name])) for name in files_of(path)}
        wanted |= {name for name in found if (root / name).is_file()} - sources.keys()
        folders = Path(name).parents[:-1]
        wanted |= {f"{folder}/__init__.py" for folder in folders} - sources.keys()
    return dict(sorted(sources.items()))


def imported(tree: ast.AST) -> set[str]:
    """What a module imports of fused_rl, as paths: "ops/kl". Not all of them are modules."""
    paths = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fused_rl":
            folder = node.module.split(".")[1:]
            paths |= {"/".join(folder)} | {"/".join([*folder, a.name]) for a in node.names}
    return paths - {""}


def files_of(path: str) -> tuple[str, str]:
    """Where a module of that path may lie."""
    return f"{path}.py", f"{path}/__init__.py"


def variant_files(variant: Variant, sources: dict[str, str]) -> dict[str, bytes]:
    """What is in the folder of a variant: relative path -> contents."""
    namespace = namespace_of(variant, sources)
    modules = {
        name: rewritten(source, namespace, name.count("/")) for name, source in sources.items()
    }
    modules["__init__.py"] += LAYERS
    contents = {name: source.encode() for name, source in modules.items()}
    if variant.library is not None:
        contents[LIBRARY] = renamed(variant.library, namespace)
    metadata = {
        "name": NAME,
        "id": f"_fused_rl_{variant.backend}_{namespace}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": variant.backend},
    }
    contents["metadata.json"] = (json.dumps(metadata, indent=2) + "\n").encode()
    return contents


def namespace_of(variant: Variant, sources: dict[str, str]) -> str:
    """The namespace of a variant's operators: the same contents have the same one."""
    contents = json.dumps([variant.name, sources]).encode() + (variant.library or b"")
    digest = base64.b32encode(hashlib.sha256(contents).digest()).decode().lower()
    return PREFIX + digest[: len(NAMESPACE) - len(PREFIX)]


def rewritten(source: str, namespace: str, depth: int = 0) -> str:
    """A module of fused_rl, `depth` folders down, with relative imports, and its operators in
    another namespace.
    """
    lines = source.encode().splitlines(keepends=True)
    for line, column, old, new in sorted(edits(ast.parse(source), namespace, depth), reverse=True):
        before, after = lines[line - 1][:column], lines[line - 1][column:]
        assert after.startswith(old.encode()), after
        lines[line - 1] = before + new.encode() + after[len(old) :]
    return b"".join(lines).decode()


def edits(tree: ast.AST, namespace: str, depth: int) -> Iterator[tuple[int, int, str, str]]:
    """Where a module names its package or its operators: line, column in bytes, old, new."""
    package = f'__package__.rsplit(".", {depth})[0]' if depth else "__package__"
    dots = "." * (depth + 1)
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module="fused_rl"):
                yield node.lineno, node.col_offset, "from fused_rl", f"from {dots}"
            case ast.ImportFrom(module=str(name)) if name.startswith("fused_rl."):
                yield node.lineno, node.col_offset, "from fused_rl.", f"from {dots}"
            case ast.Import(names=names):
                assert all(alias.name.split(".")[0] != "fused_rl" for alias in names)
            case ast.Constant(value="fused_rl"):
                yield node.lineno, node.col_offset, '"fused_rl"', package
            case ast.Constant(value=str(text)) if text.startswith(f"{NAMESPACE}::"):
                yield node.lineno, node.col_offset, f'"{NAMESPACE}::', f'"{namespace}::'
            case ast.Attribute(attr="fused_rl"):
                column = node.end_col_offset - len(NAMESPACE)
                yield node.end_lineno, column, NAMESPACE, namespace


def renamed(library: bytes, namespace: str) -> bytes:
    """The C++ library with its operators in another namespace, of the same length.

    Its symbols are hidden: the namespace of the operators is all that has this name in it. A
    compiler may have spread the name over instructions, where it is not found; hence the proof, in
    a process of its own, that the result registers what this one does, and there alone.

    Raises:
        ValueError: it does not.
    """
    assert len(namespace) == len(NAMESPACE)
    changed = library.replace(NAMESPACE.encode(), namespace.encode())
    theirs, before = (
        {n for n in registered_by(which) if n.startswith((NAMESPACE, namespace))}
        for which in (changed, library)
    )
    ours = {n.replace(NAMESPACE, namespace) for n in before}
    if not ours or theirs != ours:
        raise ValueError(
            f"the namespace of the C++ library did not change from {NAMESPACE} to {namespace}: "
            f"it registers {sorted(theirs)}"
        )
    return changed


def registered_by(library: bytes) -> list[str]:
    """The operators with a kernel for CPUs, once a library is loaded."""
    with TemporaryDirectory() as folder:
        path = Path(folder, LIBRARY)
        path.write_bytes(library)
        here = children.python("-c", PROBE, str(path))
        done = subprocess.run(**here, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"the C++ library does not load: {done.stderr.strip()}")
    return done.stdout.split()
