"""The table of what the compilers make of every kernel configuration: no GPU is needed.

    python bench/compiled.py             compiles all of it, minutes on one core: results, page
    python bench/compiled.py --readme    compiles nothing: the page, from the results

It runs tests/aot.py for every target, under the installed triton and under those that `make
test-all` puts beside it, and writes bench/results/compiled.json. The page is docs/benchmarks.md,
between aot:begin and aot:end: the fused forwards on every target, the row kernels on one, and by
name what uses the stack. A compiler is deterministic: a slow test compiles again and compares.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from run import PAGE, replace_block

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "aot.py"
TABLE = ROOT / "bench" / "results" / "compiled.json"
HOW = "python bench/compiled.py"
TARGETS = (("cuda", "80"), ("cuda", "90"), ("cuda", "100"), ("hip", "gfx942"))
# Where the page shows the row kernels.
ROWS_ON = "90"
VARIANTS = ("vector", "padded", "scalar")
PRODUCTS = ("HGMMA", "UTCHMMA", "HMMA", "v_mfma")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--readme", action="store_true", help="compile nothing")
    parser.add_argument("--page", type=Path, default=PAGE, help="what to write into")
    arguments = parser.parse_args(argv)
    if not arguments.readme:
        write_table()
    link = os.path.relpath(TABLE, arguments.page.resolve().parent)
    replace_block(arguments.page, "aot", page(json.loads(TABLE.read_text()), link))
    return 0


def write_table() -> None:
    """Every target under every triton, each in a process of its own, one after another."""
    versions = tritons()
    if len(versions) < 2:
        raise SystemExit("an older triton is needed as well: `make test-all` installs it")
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for name, folder in versions.items():
            for target in TARGETS:
                rows += lines(*target, folder=folder, cache=cache)
                print(f"triton {name}, {target[1]}: {len(rows)} rows so far", flush=True)
    TABLE.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def tritons() -> dict[str, str]:
    """By version, what goes in front of PYTHONPATH: nothing for the installed one, and the folders
    of others in the environment, triton-VERSION."""
    others = sorted(Path(sys.prefix).glob("triton-*"))
    named = {path.name.removeprefix("triton-"): str(path) for path in others}
    return {version("triton"): "", **named}


def lines(*arguments: str, folder: str, cache: str) -> list:
    """What tests/aot.py prints with the triton of that folder.

    Raises:
        RuntimeError: it fails, with the end of what it said.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    settings = {"PYTHONPATH": folder, "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**inherited, **settings},
    )
    if done.returncode:
        raise RuntimeError(f"{SCRIPT.name} {' '.join(arguments)}: {done.stderr[-4000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def page(rows: list[dict], link: str) -> list[str]:
    """The block: how to read it, a table, what of it uses the stack."""
    versions = list(dict.fromkeys(row["triton"] for row in rows))
    found: dict[tuple[str, str], Cells] = {}
    for row in rows:
        cells = found.setdefault((row["kernel"], row["arch"]), {})
        cells[row["triton"], row["variant"]] = row
    fused = [key for key, cells in found.items() if multiplies(cells)]
    others = [key for key in found if key not in fused and key[1] == ROWS_ON]
    columns = [f"{what}, {v}" for v in versions for what in ("registers / stack", "per logit")]
    return [
        f"Compiled ahead of time, not run: [{Path(link).name}]({link}), {len(rows)} rows, by "
        f"`{HOW}` under triton {' and '.join(versions)}. Registers per thread and bytes of stack "
        "where all that can be is divisible by 16. Instructions per logit where all is divisible / "
        "sizes are not / nothing is: of the epilogue, outside the loop over H, or of a row "
        "kernel's loop; for merge and sums per part of a row, for again per row, for split per "
        "number, for kl per token, for a divergence, by its kind, per pair of logits. Shared "
        "memory in KiB. LDG.128 counts loads of 16 bytes or more, LDGSTS among them. Softcap and "
        "bias are off here; the file has them on, too.",
        "",
        "| " + " | ".join(["kernel", "target", *columns, "shared", "counted"]) + " |",
        "|" + "---|" * (4 + len(columns)),
        *(line(key, found[key], versions) for key in [*fused, *others] if not with_flags(key[0])),
        "",
        *spilling(found),
    ]


# A row by triton and variant.
Cells = dict[tuple[str, str], dict]


def with_flags(kernel: str) -> bool:
    """Whether a flag is on: such rows are in the file alone."""
    return kernel.endswith("softcap")


def multiplies(cells: Cells) -> bool:
    """Whether the kernel uses tensor cores."""
    return any(name in row["counts"] for row in cells.values() for name in PRODUCTS)


def line(key: tuple[str, str], cells: Cells, versions: list[str]) -> str:
    """One kernel on one target, beside itself under each triton."""
    shown = [key[0], target_name(key[1])]
    for name in versions:
        each = [cells[name, variant] for variant in VARIANTS if (name, variant) in cells]
        shown.append(f"{each[0]['registers']} / {each[0]['stack']}")
        shown.append(" / ".join(f"{row['per_logit']:.1f}" for row in each))
    vector = cells[versions[0], VARIANTS[0]]
    shown.append(f"{vector['shared'] / 1024:.0f}")
    shown.append(", ".join(f"{count} {name}" for name, count in vector["counts"].items()))
    return "| " + " | ".join(shown) + " |"


def target_name(arch: str) -> str:
    return f"sm_{arch}" if arch.isdigit() else arch


def spilling(found: dict[tuple[str, str], Cells]) -> list[str]:
    """A line for each kernel that uses the stack, with what it uses at most in each variant."""
    lines = []
    for (kernel, arch), cells in found.items():
        most = {
            variant: max(row["stack"] for (_, v), row in cells.items() if v == variant)
            for variant in dict.fromkeys(v for _, v in cells)
        }
        used = [f"{stack} ({variant})" for variant, stack in most.items() if stack]
        if used:
            lines.append(f"- {kernel}, {target_name(arch)}: {', '.join(used)}")
    said = "Bytes of stack, at most, of those that use it; vector, padded and scalar as above:"
    return [said, "", *lines] if lines else ["None uses the stack."]


if __name__ == "__main__":
    sys.exit(main())
