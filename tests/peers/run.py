"""Peers' own tests with our functions in the place of theirs: `make test-peers`.

    python tests/peers/run.py [--only SUITE ...] [--write docs/peers.md]

The released sources are downloaded from the package index, in the versions of constraints.txt,
into build/peers; nothing of theirs is kept in this repository. Each suite runs twice, as it is and
with a plugin that puts ours in (ours_in_<peer>.py). The exit status is 1 where a test fails with
ours that is not among the expected ones, and where an expected one does not fail any more.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PLACE = ROOT / "build" / "peers"


@dataclass(frozen=True)
class Suite:
    """Tests of a peer.

    Args:
        package: its name in the package index.
        plugin: the module that puts ours in.
        files: within the sdist.
        select: pytest's -k.
        edits: (old, new): in copies of the files, so that they run on a CPU in minutes.
        expected: pattern of a test's name -> why it fails with ours.
    """

    package: str
    plugin: str
    files: tuple[str, ...]
    select: str = ""
    edits: tuple[tuple[str, str], ...] = ()
    expected: dict[str, str] = field(default_factory=dict)


ON_CPU = (('"cuda"', '"cpu"'), ("not torch.cuda.is_available()", "False"))
SMALL = (("151936", "1000"), ("64000", "1000"))
LUSPO = "luspo: the mean of token sums; theirs averages over padding"
COUNTED = "whether torch's nll_loss is called, which is not called here"
FAR = "k3 of models more than 20 nats apart, held there"

SUITES = {
    "Liger: GRPO from hidden states": Suite(
        "liger-kernel",
        "ours_in_liger",
        ("test/chunked_loss/test_grpo_loss.py",),
        select="not 8-128-1024-4096",
        expected={
            r"test_correctness\[.*sequence-luspo.*-0.1-.*": LUSPO,
            r"test_functional_correctness": FAR,
        },
    ),
    "Liger: GRPO from logits, V 1000": Suite(
        "liger-kernel",
        "ours_in_liger",
        ("test/transformers/test_grpo_loss.py",),
        edits=SMALL,
    ),
    "Liger: strides": Suite(
        "liger-kernel",
        "ours_in_liger",
        ("test/transformers/test_selective_log_softmax_strides.py",),
        edits=() if torch.cuda.is_available() else ON_CPU,
    ),
    "Liger: scaled cross-entropy": Suite(
        "liger-kernel",
        "ours_in_liger",
        ("test/transformers/test_fused_linear_scaled_cross_entropy.py",),
        select="test_frontend_fallback",
    ),
    "Liger: log-probs of selected ids": Suite(
        "liger-kernel",
        "ours_in_liger",
        ("test/transformers/test_fused_linear_selected_log_probs.py",),
        select="not frontend_forwards",
        expected={
            r"test_invalid_selection\[.*-TypeError-.*": "ids of another type: a ValueError here",
            r"test_selection_device_mismatch": "the text of an error",
        },
    ),
    "Liger: JSD, hard and soft": Suite(
        "liger-kernel",
        "ours_in_liger",
        ("test/chunked_loss/test_jsd_loss.py",),
        select="not 8-128-1024-4096",
        expected={r"hard_loss_computed_only_when_used\[.*-True\]$": COUNTED},
    ),
    "Liger: JSD of two heads, its op": Suite(
        "liger-kernel",
        "ours_in_liger",
        ("test/transformers/test_fused_linear_jsd.py",),
        select="not 8-128-1024-4096",
    ),
    "Liger: KL to given probabilities": Suite(
        "liger-kernel",
        "ours_in_liger",
        ("test/transformers/test_fused_linear_kl_div.py",),
        select="not 8-128-1024-4096",
    ),
    "Liger: preference losses": Suite(
        "liger-kernel",
        "ours_in_liger",
        tuple(
            f"test/chunked_loss/test_{name}_loss.py"
            for name in ("dpo", "cpo", "simpo", "orpo", "kto")
        ),
        select="not 8-128-1024-4096",
    ),
    "verl: losses, means, rollout correction": Suite(
        "verl",
        "ours_in_verl",
        tuple(
            f"tests/trainer/ppo/test_{name}.py"
            for name in (
                "core_algos_on_cpu",
                "dynamic_policy_losses_on_cpu",
                "loss_aggregation_on_cpu",
                "rollout_corr",
                "rollout_corr_integration",
                "value_loss_normalization_on_cpu",
            )
        ),
    ),
    "verl: heads": Suite("verl", "ours_in_verl", ("tests/utils/test_linear_cross_entropy.py",)),
    "TRL": Suite(
        "trl",
        "ours_in_trl",
        tuple(f"tests/test_{name}_trainer.py" for name in ("grpo", "rloo", "dpo", "kto", "sft")),
    ),
}


def version(package: str) -> str:
    pins = (ROOT / "constraints.txt").read_text()
    return re.search(rf"^{package}==(.*)$", pins, re.MULTILINE).group(1)


def sources(package: str) -> Path:
    """The folder of the unpacked sdist, downloaded where it is not there."""
    wanted = f"{package}=={version(package)}"
    stem = f"{package.replace('-', '_')}-{version(package)}"
    if not (PLACE / stem).exists():
        PLACE.mkdir(parents=True, exist_ok=True)
        options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(PLACE)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, wanted], check=True)
        with tarfile.open(PLACE / f"{stem}.tar.gz") as archive:
            archive.extractall(PLACE, filter="data")
    return PLACE / stem


def prepared(suite: Suite, root: Path) -> list[str]:
    """The files of the suite that were released, edited where they are to be."""
    found = []
    for name in suite.files:
        path = root / name
        if not path.exists():
            continue
        if suite.edits:
            text = path.read_text()
            for old, new in suite.edits:
                text = text.replace(old, new)
            path = path.with_name(f"{path.stem}_small.py")
            path.write_text(text)
        found.append(str(path.relative_to(root)))
    return found


def outcomes(suite: Suite, root: Path, files: list[str], ours: bool) -> dict[str, str]:
    """Name of the test -> "passed", "failed" or "skipped"."""
    report = PLACE / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", *files, f"--junitxml={report}"]
    command += ["-p", "no:cacheprovider", "-o", "log_cli=false", "--no-header", "--tb=line"]
    command += ["-k", suite.select] if suite.select else []
    command += ["-p", suite.plugin] if ours else []
    paths = [str(root), str(HERE), *(p for p in sys.path if p and p != str(HERE))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    # Liger compiles every loss anew: 20 s for each of hundreds of tests, and the same numbers.
    environment["TORCHDYNAMO_DISABLE"] = "1"
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if not report.exists():
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return read(report.read_text())


def read(report: str) -> dict[str, str]:
    """pytest's JUnit report."""
    kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    found = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = next((kinds[c.tag] for c in case if c.tag in kinds), "passed")
    return found


def explained(suite: Suite, failed: Iterable[str]) -> tuple[dict[str, int], list[str], list[str]]:
    """(reason -> tests, failures that nothing explains, patterns that explain nothing)."""
    reasons, unexpected, used = Counter(), [], set()
    for name in failed:
        pattern = next((p for p in suite.expected if re.search(p, name)), None)
        if pattern is None:
            unexpected.append(name)
        else:
            used.add(pattern)
            reasons[suite.expected[pattern]] += 1
    return dict(reasons), unexpected, [p for p in suite.expected if p not in used]


def counts(found: dict[str, str]) -> str:
    number = Counter(found.values())
    kinds = [kind for kind in ("passed", "failed", "skipped") if number[kind]]
    return ", ".join(f"{number[kind]} {kind}" for kind in kinds)


HEAD = "| suite | version | as released | with ours | what differs |\n|---|---|---|---|---|\n"


def row(name: str, suite: Suite, plain: dict, ours: dict, reasons: dict[str, int]) -> str:
    """A line of the table."""
    what = "; ".join(f"{number} {reason}" for reason, number in reasons.items())
    cells = [name, f"{suite.package} {version(suite.package)}"]
    if not ours:
        return f"| {' | '.join(cells)} | - | - | its tests are not in the released sources |"
    return f"| {' | '.join(cells)} | {counts(plain)} | {counts(ours)} | {what or 'nothing'} |"


def written(page: str, table: str) -> str:
    """The page with this table between its marks."""
    marks = r"(<!-- table:begin -->\n).*?(<!-- table:end -->)"
    return re.sub(marks, lambda m: m[1] + table + m[2], page, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=SUITES, default=list(SUITES))
    parser.add_argument("--write", type=Path, help="the page whose table is to be this one")
    options = parser.parse_args()
    table, wrong = HEAD, []
    print(HEAD, end="", flush=True)
    for name in options.only:
        suite = SUITES[name]
        root = sources(suite.package)
        files = prepared(suite, root)
        plain, ours = (
            ({}, {})
            if not files
            else (
                outcomes(suite, root, files, False),
                outcomes(suite, root, files, True),
            )
        )
        failed = [test for test, outcome in ours.items() if outcome == "failed"]
        reasons, unexpected, unused = explained(suite, failed)
        line = row(name, suite, plain, ours, reasons)
        print(line, flush=True)
        table += line + "\n"
        wrong += [f"{name}: {test} fails with ours" for test in unexpected]
        wrong += [f"{name}: {p} does not fail any more" for p in unused if files]
    if options.write:
        options.write.write_text(written(options.write.read_text(), table))
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
