"""The planner of a head over ranks: bytes by hand, those of real collectives, and the command."""

import json

import cases_plan
import pytest
import torch

from fused_rl import cli, ops
from fused_rl.plan import ranks as planner
from fused_rl.plan import steps, traffic
from fused_rl.plan.memory import plan
from fused_rl.plan.ranks import NAMES, Group, head_times

HEAD = {"hidden_size": 4096, "vocab_size": 151936}
N, H, V, R = 8192, 4096, 151936, 8


def spread(*names, micro_batches=1, reduce_dtype=torch.bfloat16, head=HEAD, tokens=N, **options):
    """The ranks of a group of 8, by name."""
    group = Group(R, micro_batches, reduce_dtype)
    found = planner.ranks(plan(head, tokens, **options), group, names or NAMES)
    return {rank.name: rank for rank in found}


def crossing(rank) -> int:
    return traffic.from_others(sum(rank.received.values()), R)


def test_bytes_by_hand():
    """Of 4 ranks: 50 tokens become 52, 97 rows 100, so that parts are equal."""
    assert traffic.statistics_bytes(50, 4) == 4 * 4 * 8 * 50
    assert traffic.summed_bytes(50, 16, 4) == 52 * 16 * 4
    assert traffic.dhidden_bytes(50, 16, 4, 2) == 52 * 16 * (4 + 2)
    assert traffic.dhidden_bytes(52, 16, 4, 8, 8) == 52 * 16 * 16
    assert traffic.hidden_bytes(50, 16, 2) == 50 * 16 * 2
    assert traffic.weight_bytes(97, 16, 4, 2) == 100 * 16 * 2
    assert traffic.travel_bytes(50, 16, 2) == 50 * (16 * 6 + 8 + 4 + 32 + 32)
    assert traffic.from_others(1000, 4) == 750


@pytest.mark.parametrize("hidden", ["REPLICATED", "SEQUENCE_SHARDED"])
@pytest.mark.parametrize("world", [2, 4])
def test_bytes_are_those_that_ranks_receive(ranks, world, hidden):
    """Per token, and per number of 48 x 32 hidden states in bfloat16."""
    statistics, dhidden, states = ranks(world).run("cases_spread_bits", "traffic", hidden=hidden)[0]
    planned = spread_tp(world)["tp" if hidden == "REPLICATED" else "tp, sequence-sharded"]
    assert planned.received == {
        "statistics": 48 * statistics,
        "dhidden": 48 * 32 * dhidden,
        **({"hidden": 48 * 32 * states} if states else {}),
    }


def spread_tp(world):
    head = plan({"hidden_size": 32, "vocab_size": 97}, 48)
    found = planner.ranks(head, Group(world, 1, torch.bfloat16), ("tp",))
    return {rank.name: rank for rank in found}


@pytest.mark.parametrize("chunk_bytes", [None, 2**23], ids=["one pass", "two passes"])
@pytest.mark.parametrize("hidden", ["REPLICATED", "SEQUENCE_SHARDED"])
def test_memory_is_what_a_rank_is_measured_to_need(ranks, hidden, chunk_bytes):
    """As for one device, within a quarter, and 2 MiB for what allocator and threads keep."""
    options = {"hidden": hidden, "chunk_bytes": chunk_bytes}
    (measured, _) = ranks(2).run("cases_plan", "peak", **options)
    if measured is None:
        pytest.skip("this system does not tell the peak of a process")
    head = {"hidden_size": cases_plan.H, "vocab_size": cases_plan.V}
    planned = plan(head, cases_plan.N, chunk_bytes=chunk_bytes)
    whole, cut = planner.ranks(planned, Group(2, 1, torch.bfloat16), ("tp",))
    rank = whole if hidden == "REPLICATED" else cut
    assert rank.local.ways[-1].nhv == (8 if chunk_bytes else 6)
    there = {"weight", "optimizer"}
    peak = max(
        sum(size for name, size in parts.items() if name not in there)
        for parts in rank.memory.phases.values()
    )
    assert abs(measured - peak) <= peak / 4 + 2 * 2**20, (measured, peak)


def test_weights_against_tokens_at_a_head_of_today():
    """Qwen3-8B on 8 ranks of 8192 tokens, in GB from other ranks."""
    assert crossing(spread()["fsdp"]) / 1e9 == pytest.approx(2.2, abs=0.03)
    in_float32 = spread(reduce_dtype=torch.float32)["fsdp"]
    assert crossing(in_float32) / 1e9 == pytest.approx(3.3, abs=0.04)
    of_halves = traffic.from_others(traffic.travel_bytes(R * N, H, 2, 2), R)
    assert of_halves / 1e9 == pytest.approx(0.94, abs=0.01)
    assert crossing(spread()["tokens"]) / 1e9 == pytest.approx(1.41, abs=0.01)


def test_what_one_way_moves_by_hand():
    """In multiples of the weight's bytes, gathered or reduced, 4 micro-batches a step."""
    whole, found = V * H * 2, spread(micro_batches=4, device="h200")
    moved = {
        name: (r.received["weight"] / whole, r.received["dweight"] / whole)
        for name, r in found.items()
        if "weight" in r.received
    }
    assert moved == {
        "ddp": (0, 2),
        "zero-1": (1, 1),
        "zero-2": (1, 4),
        "zero-3": (8, 4),
        "fsdp, once a step": (1, 1),
        "fsdp, each micro-batch": (4, 4),
    }
    of_tp = found["tp"].received
    assert of_tp == {"statistics": 4 * 32 * R * N, "dhidden": 4 * 6 * N * H}
    of_cut = found["tp, sequence-sharded"].received
    assert of_cut == of_tp | {"hidden": 4 * 2 * N * H, "dhidden": 4 * 4 * N * H}
    assert found["tokens"].received == {
        "hidden": 4 * 2 * R * N * H,
        "dhidden": 4 * 4 * R * N * H,
        "statistics": 4 * R * N * 76,
    }
    assert {r.tokens for name, r in found.items() if "tp" not in name} == {4 * R * N}
    assert {found["tp"].tokens, found["tp, sequence-sharded"].tokens} == {4 * N}


def test_two_passes_gather_a_sequence_twice(monkeypatch):
    """The second forms the logits again, in three chunks of too few tokens for one pass."""
    monkeypatch.setitem(ops.ONE_PASS_TOKENS, "cpu", 2**20)
    (cut,) = (r for n, r in spread("tp").items() if "sequence" in n)
    assert cut.local.ways[-1].nhv == 8 and len(cut.local.chunks) == 3
    assert cut.received["hidden"] == 2 * 2 * N * H


def test_the_break_even_is_where_both_receive_as_much():
    for dtype, reduced in (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32",) * 2):
        types = {"dtype": getattr(torch, dtype), "reduce_dtype": getattr(torch, reduced)}
        for rank in spread(**types).values():
            if rank.break_even is None:
                assert not rank.received.keys() & {"weight", "dweight"}
                continue
            width, moved = types["dtype"].itemsize, sum(rank.received.values())
            most = rank.break_even
            assert traffic.travel_bytes(most, H, width) <= moved
            assert traffic.travel_bytes(most + 1, H, width) > moved


def test_the_break_even_is_about_the_vocabulary():
    """2 V / 3 where the gradient is reduced in bfloat16, V in float32, V where all is float32."""
    bound = spread()["fsdp"].break_even
    assert 0.995 * 2 * V / 3 < bound < 2 * V / 3
    wide = spread(reduce_dtype=torch.float32)["fsdp"].break_even
    assert 0.995 * V < wide < V
    both = spread(reduce_dtype=torch.float32, dtype=torch.float32)["fsdp"].break_even
    assert 0.995 * V < both < V


def test_memory_by_hand():
    """Of one chunk: nothing but the weight's own tensors, which all are [V or V / R, H]."""
    head = {"hidden_size": 256, "vocab_size": 65536}
    found, rows = spread(head=head, tokens=512), 65536 * 256
    held = {
        name: tuple(
            rank.memory.phases["chunk"][of] * 8 // rows for of in ("weight", "dweight", "optimizer")
        )
        for name, rank in found.items()
    }
    assert held == {
        "ddp": (16, 16, 96),
        "zero-1": (16, 16, 12),
        "zero-2": (16, 16, 12),
        "zero-3": (18, 16, 12),
        "fsdp": (18, 16, 12),
        **dict.fromkeys(("tp", "tp, sequence-sharded", "tokens"), (2, 2, 12)),
    }
    # All tokens of a rank at V entries, or all ranks' at V / R, and as many at V / R. Exponentials
    # where the rank has the whole vocabulary: with the largest logit of each block.
    in_half = "bfloat16" in ops.native.cpu_features()
    per_token = 2 * 65536 + 4 * 256 if in_half else 4 * 65536
    assert found["ddp"].memory.phases["chunk"]["logits"] == 512 * per_token
    assert found["tokens"].memory.phases["chunk"]["logits"] == 512 * 65536 * 4
    assert found["tp"].memory.phases["chunk"]["logits"] == 512 * 65536 // R * 4


@pytest.mark.parametrize(("chunk_bytes", "saved"), [(2**34, 2.2), (2**30, 3.3)])
def test_tokens_that_travel_save_the_whole_weight_and_its_gradient(chunk_bytes, saved):
    """GB of 7/8 of both, in one chunk, and where several chunks add dweight up in float32; FSDP has
    its own rows beside the gathered weight on top.
    """
    found = spread("fsdp", "tokens", device="h200", chunk_bytes=chunk_bytes)
    whole, part = (rank.memory.phases["chunk"] for rank in found.values())
    less = sum(whole[of] - part[of] for of in ("weight", "dweight"))
    assert (less - V // R * H * 2) / 1e9 == pytest.approx(saved, abs=0.04)


def test_the_gradient_is_whole_until_it_is_reduced():
    """Where it is kept over micro-batches, beside that of a micro-batch; a copy is reduced."""
    once, several = spread(device="h200"), spread(device="h200", micro_batches=3)
    chunk = {n: r.memory.phases["chunk"]["dweight"] for n, r in once.items()}
    more = {
        name: (rank.memory.phases["chunk"]["dweight"] - chunk[name.split(",")[0]]) / (V * H * 2)
        for name, rank in several.items()
        if "sequence" not in name
    }
    assert more == {
        **dict.fromkeys(("ddp", "zero-1", "fsdp, once a step"), 1),
        **dict.fromkeys(("zero-2", "zero-3", "fsdp, each micro-batch", "tp", "tokens"), 1 / 8),
    }
    assert several["fsdp, once a step"].memory.phases["reduce"]["dweight"] == 2 * V * H * 2


def test_a_frozen_head_has_no_gradient_and_no_optimizer():
    found = spread(frozen=True)
    for rank in found.values():
        assert not any(p["dweight"] or p["optimizer"] for p in rank.memory.phases.values())
        assert not rank.received.get("dweight")
    moved = {n: r.received.get("weight", 0) // (V * H * 2) for n, r in found.items()}
    assert {n for n, count in moved.items() if count} == {"fsdp", "zero-3"}
    assert found["tp"].received["dhidden"] == 6 * N * H


def test_the_work_of_a_rank():
    """A part of the vocabulary is 1 / R of the products; everybody's tokens are R times as many."""
    flop = {name: rank.memory.flop for name, rank in spread(device="h200").items()}
    assert flop["tokens"] == flop["fsdp"] == 8 * flop["tp"] == 6 * N * H * V


def test_times_are_those_of_the_part():
    pytest.importorskip("triton", reason="triton is not installed")
    group = Group(R, 3, torch.bfloat16)
    found = spread("fsdp", "tp", "tokens", micro_batches=3, device="h200")
    times = {name: head_times(rank, group).middle for name, rank in found.items()}
    # Of the same products nothing is saved but the sum of dweight, R times as small.
    assert 0.9 < times["tokens"] / times["fsdp, once a step"] < 1
    # The synchronisation of a chunk, of which each has one, is as long for a part of the head.
    waited = 3 * 1e3 * steps.CHUNK_GAP
    assert 7 < (times["fsdp, once a step"] - waited) / (times["tp"] - waited) < 9
    once = head_times(spread("tp", device="h200")["tp"], group._replace(micro_batches=1))
    assert times["tp"] == pytest.approx(3 * once.middle)
    assert head_times(spread("tp")["tp"], group) is None


@pytest.mark.parametrize(
    ("group", "said"),
    [((1, 1), "world must be at least 2, got 1"), ((8, 0), "micro-batches must be positive")],
)
def test_groups_that_are_none(group, said):
    with pytest.raises(ValueError, match=said):
        planner.ranks(plan(HEAD, N), Group(*group, torch.bfloat16))


def printed(capsys, tmp_path, *options: str, status: int = 0) -> str:
    pytest.importorskip("rich")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(HEAD))
    options = ("plan", "--model-config", str(config), "--tokens", str(N), *options)
    assert cli.main(options) == status
    out, error = capsys.readouterr()
    return " ".join((error if status else out).split())


def test_the_command_prints_every_way(capsys, tmp_path):
    out = printed(capsys, tmp_path, "--world", "8")
    for name in spread():
        assert out.count(f"│ {name} │") == 2, name
    assert "│ fsdp │ 65,536 │ 1.0 GiB │ 1.0 GiB │ │ │ │ 2.0 GiB │ 100,978 │" in out
    assert "not measured" in out and "H (2 + 4) + 76 bytes" in out
    assert "65,536 are fewer than the break-even of ddp; zero-1; zero-2; zero-3; fsdp." in out
    assert "predicted, ms" not in out


def test_the_command_prints_those_that_are_asked_for(capsys, tmp_path):
    options = ("--world", "8", "--parallel", "tokens", "fsdp", "--bandwidth", "400")
    options += ("--micro-batches", "4", "--reduce-dtype", "float32")
    out = printed(capsys, tmp_path, *options)
    assert "│ ddp │" not in out and "│ tp │" not in out
    (fsdp,) = (r for n, r in spread(reduce_dtype=torch.float32).items() if n == "fsdp")
    assert f"│ fsdp, once a step │ 163 │ │ {crossing(fsdp) / 400e6:.1f} │" in out
    assert "dweight is reduced in float32" in out and "at 400 GB/s" in out


def test_the_command_needs_ranks(capsys, tmp_path):
    for options in (("--parallel", "tp"), ("--bandwidth", "9"), ("--micro-batches", "2")):
        said = printed(capsys, tmp_path, *options, status=2)
        assert said == f"fused-rl plan: {options[0]} needs --world, the number of ranks, at least 2"
    with pytest.raises(SystemExit):
        printed(capsys, tmp_path, "--world", "2", "--bandwidth", "0")
    assert "must be above 0, got 0" in capsys.readouterr().err
