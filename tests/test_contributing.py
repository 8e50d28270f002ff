"""CONTRIBUTING.md: its diffs apply to what is there, and what they add works."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
DIFFS = "".join(re.findall(r"```diff\n(.*?)```", TEXT, re.DOTALL))
# (path before, path after, hunks)
CHANGES = re.findall(
    r"^--- (\S+)\n\+\+\+ b/(\S+)\n@@\n((?:[ +\-@].*\n)+?)(?=^--- |\Z)", DIFFS, re.M
)


def applied(text: str, hunk: str) -> str:
    """The text after a hunk, whose old lines must stand in it once."""
    lines = hunk.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] != "+")
    new = "".join(line[1:] for line in lines if line[0] != "-")
    assert ("\n" + text).count("\n" + old) == 1, old
    return ("\n" + text).replace("\n" + old, "\n" + new)[1:]


def apply_all(root: Path) -> None:
    """Every diff, in order, to a checkout's files."""
    for before, path, hunks in CHANGES:
        text = "" if before == "/dev/null" else (root / path).read_text()
        for hunk in hunks.split("@@\n"):
            text = applied(text, hunk)
        (root / path).write_text(text)


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> Path:
    """A checkout with all of the diffs, without the C++ library, which does not know of them."""
    root = tmp_path_factory.mktemp("checkout")
    for folder in ("fused_rl", "kernels", "csrc", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", root)
    apply_all(root)
    return root


def test_every_change_is_read_and_there_is_one_of_each_kind():
    assert len(CHANGES) == DIFFS.count("\n+++ ")
    written = {path for _, path, _ in CHANGES}
    assert {"fused_rl/losses/named.py", "tests/naive.py"} <= written
    assert {"fused_rl/reference.py", "csrc/loops.cpp", "kernels/kl.py"} <= written
    assert {"fused_rl/ops/softcap.py", "csrc/softcap.cpp", "fused_rl/ops/xpu.py"} <= written


CHILD = """
import sys
sys.meta_path = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
import torch
import fused_rl
from fused_rl import KL, ops
print(fused_rl.__file__)

# The loss: by hand, r = 2 and 1 / 2 of sequences of one token.
y, mask = torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1, dtype=torch.bool)
logprobs = torch.full((4, 1), -1.0).requires_grad_()
old = logprobs.detach() - torch.tensor([2.0, 2.0, 0.5, 0.5]).log()[:, None]
advantages = torch.tensor([3.0, -3.0, 3.0, -3.0])
batch = fused_rl.TokenBatch.padded(y, mask, advantages, old_logprobs=old)
stats = fused_rl.TokenStats(logprobs, torch.zeros(4, 1))
fused_rl.topr()(stats, batch).loss.backward()
expected = torch.tensor([-3.0, 3.0, -3.0, 1.5])[:, None] / 4
torch.testing.assert_close(logprobs.grad, expected)

# The estimator: inside, at the bound, beyond.
d = torch.tensor([0.5, 1.0, 3.0, -3.0], dtype=torch.float64).requires_grad_()
value = fused_rl.kl_penalty(d, torch.zeros_like(d), value=KL.HUBER)
value.sum().backward()
assert value.tolist() == [0.125, 0.5, 2.5, 2.5] and d.grad.tolist() == [0.5, 1.0, 1.0, -1.0]

# The operator.
x = torch.linspace(-3, 3, 7, dtype=torch.float64).requires_grad_()
softcap = lambda x: ops.softcap(ops.softcap.records[0](x, 2.0)).value
torch.testing.assert_close(softcap(x), 2 * torch.tanh(x / 2))
assert torch.autograd.gradcheck(softcap, x)
torch.library.opcheck(ops.softcap.op, (x, 2.0))

# The loss again, by the formula in naive.py, in the test of named losses.
import pytest
options = ["-q", "-p", "no:cacheprovider", "-k", "topr and against"]
sys.exit(pytest.main([*options, "tests/test_named_losses.py"]))
"""


def test_what_they_add_works(changed):
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(changed)!r})\n{CHILD}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=changed,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(str(changed)) and "1 passed" in done.stdout
