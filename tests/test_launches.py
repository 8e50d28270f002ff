"""What a launch costs the host, by bench/launches.py in a process of its own."""

import json

import pytest
from interpreter import HERE, child

pytest.importorskip("triton", reason="triton is not installed")

# A view each of hidden, weight, its transpose, the part, and two of the workspace; and a share of
# what a call takes once.
OPERATORS_OF_A_TILE = 7
# Launches that a tile may take the time of. Ten more views are 0.7 of one.
LAUNCHES_OF_A_TILE = 2.0


@pytest.mark.slow
def test_a_tile_costs_the_host_less_than_two_launches(tmp_path):
    path = tmp_path / "launches.json"
    script = str(HERE.parent / "bench" / "launches.py")
    done = child(script, "--json", str(path), TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    found = json.loads(path.read_text())["launches"]
    assert all(name in done.stdout and cost["us"] > 0 for name, cost in found.items())
    tile, launch = found["a tile of the tiled forward"], found["statistics of rows"]
    assert tile["operators"] <= OPERATORS_OF_A_TILE
    assert tile["us"] <= LAUNCHES_OF_A_TILE * launch["us"]
