"""bench/trl_step.py: the whole comparison at a small size, and what it makes of its figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trl_step

SCRIPT = Path(__file__).parents[1] / "bench" / "trl_step.py"


def result(seconds: list[float], norms: list[float], calls: int = 3) -> dict:
    return {
        "seconds": seconds,
        "generation_seconds": [2.0, 4.0],
        "peak_extra_bytes": int(10 * seconds[0]),
        "peak_bytes": 100,
        "completion_tokens": [5, 7],
        "grad_norms": norms,
        "calls_of_ours": calls,
    }


def test_processes_of_a_way_are_one_by_hand():
    record = trl_step.merged("TRL", [result([1.0, 5.0, 2.0], [0.5], 4), result([3.0, 4.0], [0.6])])
    assert record["seconds_median"] == 3.0 and record["seconds_best"] == 1.0
    assert record["peak_extra_bytes"] == 30 and record["generation_seconds_median"] == 3.0
    assert record["completion_tokens_median"] == 6 and record["grad_norms"] == [0.5]
    assert record["calls_of_ours"] == 3


@pytest.mark.parametrize(
    ("norms", "calls", "right"),
    [
        ((1.0, 1.01, 0.99), (0, 3, 3), True),
        ((1.0, 1.05, 1.0), (0, 3, 3), False),
        ((1.0, 1.0, float("nan")), (0, 3, 3), False),
        ((0.0, 0.0, 0.0), (0, 3, 3), False),
        ((1.0, 1.0, 1.0), (3, 3, 3), False),
        ((1.0, 1.0, 1.0), (0, 0, 3), False),
    ],
)
def test_ways_that_did_not_do_the_same_are_told_apart(norms, calls, right):
    records = [
        trl_step.merged(way, [result([1.0], [norm], count)])
        for way, norm, count in zip(trl_step.WAYS, norms, calls, strict=True)
    ]
    assert trl_step.agree(records, 0.03) is right


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_three_ways_of_the_same_step(tmp_path, dtype):
    pytest.importorskip("trl", minversion="1.16", reason="trl >= 1.16 is not installed")
    path = tmp_path / "trl.json"
    command = [sys.executable, str(SCRIPT), "--small", "--rounds", "1", "--steps", "2"]
    command += ["--dtype", dtype, *(["--untied"] if dtype == "float32" else [])]
    done = subprocess.run(
        [*command, "--out", str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(path.read_text())
    records = {r["way"]: r for r in content["records"]}
    assert tuple(records) == trl_step.WAYS
    assert content["environment"]["trl"]
    assert content["shape"]["dtype"] == dtype
    assert content["shape"]["tied"] == (dtype == "bfloat16")
    for way, record in records.items():
        assert way in done.stdout
        assert len(record["seconds"]) == 2 and record["seconds_best"] > 0
        assert record["completion_tokens_median"] > 8
        assert record["peak_bytes"] > 2**27 and len(record["grad_norms"]) == 3


def test_the_table_of_the_readme_by_hand():
    records = [
        trl_step.merged(way, [result([s], [1.0])]) for way, s in (("TRL", 4.0), ("ours", 1.0))
    ]
    environment = {"trl": "1.16.0", "threads": 2, "cpu": "CPU"}
    content = {"environment": environment, "shape": trl_step.SMALL._asdict(), "records": records}
    *_, theirs, ours = trl_step.table(content, Path("results/x.json"))
    assert theirs == "| TRL | 4.0 | 1.00 | 0 | 0 |" and ours == "| ours | 1.0 | 0.25 | 0 | 0 |"
