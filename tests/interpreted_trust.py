"""The first use of a kernel, in the interpreter; test_trust.py runs this file."""

import copy
import os
import warnings

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from interpreted_kernels import small_and_on_cpu  # noqa: F401 - a fixture

from fused_rl import ops, reference
from fused_rl.kernels import configs, linear_logprobs, logprobs
from fused_rl.ops import Head, Known, Limits, Rows, Sums, Upstream, first_use, trust
from fused_rl.ops import triton as on_cuda
from fused_rl.ops import triton_chunk as on_cuda_chunk
from fused_rl.ops import two_heads_triton as on_cuda_two
from fused_rl.ops.chunk import (
    linear_logprobs_chunk,
    linear_logprobs_chunk_backward,
    linear_logprobs_chunk_unit,
)
from fused_rl.ops.divergence import TwoNeeds, linear_divergence_backward
from fused_rl.ops.kl import Deviation
from fused_rl.ops.linear import linear_logprobs_backward
from fused_rl.ops.logits import logits_logprobs_backward
from fused_rl.ops.record import Given, Needs
from fused_rl.ops.stored import Stored, linear_logprobs_stored_backward
from fused_rl.ops.two_heads import TwoUpstream

CPU = torch.device("cpu")
LIMITS = Limits(-100, 2**20)
PROVEN = configs.Config(16, 32, 16, 4, 2, False, proof="a result")
NEW = PROVEN._replace(block_n=64, proof=None)
INTERPRETED = configs.Device(2, 0, interpreted=True)


@pytest.fixture(autouse=True)
def two_ways_on_cpu(small_and_on_cpu, monkeypatch):  # noqa: F811
    """A way that is proven, and before it one that is not."""
    monkeypatch.setitem(configs.CONFIGS, 0, [NEW, PROVEN])
    # The small cases are not so small: a block for each of their rows.
    monkeypatch.setattr(logprobs, "BLOCK_V", 1024)
    trust.trust_kernels()
    yield
    trust.trust_kernels()


@pytest.fixture
def place():
    """Of a device that trusts as a GPU does."""
    return INTERPRETED._replace(
        trusts=lambda config, call: on_cuda.trusts(CPU, INTERPRETED, config, call)
    )


@pytest.fixture
def taken(monkeypatch):
    """The configurations that ran, in order."""
    found, run = [], linear_logprobs.fused_statistics

    def noted(*args):
        found.append(args[-1])
        return run(*args)

    monkeypatch.setattr(linear_logprobs, "fused_statistics", noted)
    return found


def head(N=20, H=24, V=70, dtype=torch.bfloat16, bias=False):
    hidden, weight = torch.randn(N, H).to(dtype), torch.randn(V, H).to(dtype)
    labels = torch.randint(0, V, (N,))
    return Head(hidden, weight, torch.randn(V) if bias else None, labels, torch.ones(N), 1.0, 0.0)


def every_operator():
    """Each operator that has a kernel, and records of a call."""
    of = head()
    stats = ops.linear_logprobs.plain(of, LIMITS)
    known, up = Known(stats.lse, stats.entropy), Upstream(torch.ones(20), torch.ones(20))
    *_, z = on_cuda_chunk.linear_logprobs_chunk(of, Given(True), INTERPRETED)
    sums = Sums(torch.empty(70, 24), torch.empty(0), False)
    rows = Rows(torch.randn(20, 70), of.labels, torch.ones(20), -100)
    of_rows = ops.logits_logprobs.plain(rows)
    return {
        ops.linear_logprobs: (of, LIMITS),
        linear_logprobs_backward: (up, of, LIMITS, known, Needs(True, True, False)),
        linear_logprobs_chunk: (of, Given(True)),
        linear_logprobs_chunk_backward: (ops.ChunkLogits(z), up, of, known, sums),
        linear_logprobs_chunk_unit: (ops.ChunkLogits(z.clone()), of, known),
        ops.linear_logprobs_stored: (of, LIMITS),
        linear_logprobs_stored_backward: (
            *(up, of, LIMITS, known, Stored(torch.arange(20), z.clone()), Given(True)),
            Needs(True, True, False),
        ),
        ops.linear_statistics: (of, ops.Asked(True, True, 3), LIMITS),
        ops.logits_logprobs: (rows,),
        logits_logprobs_backward: (up, rows, Known(of_rows.lse, of_rows.entropy)),
        ops.kl: (Deviation(torch.randn(20), 3, 2),),
        **of_two_heads(),
    }


def of_two_heads():
    """Those of a divergence."""
    heads, measure = ops.TwoHeads.of(head(), head()), ops.Measure(reference.REVERSE, 0.0, 1.0)
    stats = ops.linear_divergence.plain(heads, measure, LIMITS)
    known, up = ops.known_of(stats), TwoUpstream(*torch.ones(5, 20))
    needs = TwoNeeds(True, True, False, True, True, False)
    *_, z = on_cuda_two.linear_divergence_chunk(heads, measure, INTERPRETED)
    sums = Sums(torch.empty(70, 24), torch.empty(0), False)
    of_student = ops.StudentUpstream(*up[:3])
    backward = (ops.ChunkLogits(z), of_student, heads, measure, known, sums)
    return {
        ops.linear_divergence: (heads, measure, LIMITS),
        linear_divergence_backward: (up, heads, measure, LIMITS, known, needs),
        ops.linear_divergence_chunk: (heads, measure),
        ops.linear_divergence_chunk_backward: backward,
    }


NAMES = [operator.__name__ for operator in on_cuda.OPERATORS]


def call_of(name):
    return next((o, r) for o, r in every_operator().items() if o.__name__ == name)


def test_every_kernel_has_a_case():
    assert {o.__name__ for o in every_operator()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_that_is_right_is_checked_once_and_runs(name, place, monkeypatch):
    operator, _ = call_of(name)
    runs, kernel = [], on_cuda.OPERATORS[operator]

    def counted(*args):
        runs.append(len(args))
        return kernel(*args)

    monkeypatch.setitem(on_cuda.OPERATORS, operator, counted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            on_cuda.served(operator, call_of(name)[1], CPU, place)
    # A kernel that may leave what it was given as it is is asked twice.
    assert len(runs) == (5 if operator is linear_logprobs_stored_backward else 4)
    assert {v.error for v in trust.verdicts()} == {None}


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["wrong", "nan", "fails"])
def test_a_kernel_made_wrong_on_purpose_gives_way_to_plain_torch(name, fault, place, monkeypatch):
    operator, records = call_of(name)
    kernel, copies = on_cuda.OPERATORS[operator], copy.deepcopy(records)

    def faulty(*args):
        if fault == "fails":
            raise RuntimeError("an illegal instruction\nwas encountered")
        out = kernel(*args)
        # One number in twenty.
        tensors(out)[0].view(-1)[::20] = torch.nan if fault == "nan" else 7.0
        return out

    monkeypatch.setitem(on_cuda.OPERATORS, operator, faulty)
    # The halves of a chunk are judged together, and give way together.
    judged = on_cuda.CONTINUES.get(operator, operator).__name__
    with pytest.warns(RuntimeWarning, match=f"kernel {judged} is not used on cpu") as found:
        ours = on_cuda.served(operator, records, CPU, place)
    said = str(found[0].message)
    assert {"fails": "RuntimeError: an illegal instruction."}.get(fault, " from plain") in said
    assert ("is nan from" in said) == (fault == "nan") and "report" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on_cuda.served(operator, call_of(name)[1], CPU, place)
    # What goes on from a chunk's logits spends them. Plain torch reads them in its own layout, and
    # so what lies between a kernel's rows, which may be anything.
    exact = operator.plain(*copies)
    for a, b in zip(tensors(ours), tensors(exact), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert [v.kernel for v in trust.verdicts() if v.error] == [judged]


@pytest.mark.parametrize("half", ["linear_logprobs_chunk", "linear_logprobs_chunk_backward"])
def test_the_halves_of_a_chunk_run_in_plain_torch_if_one_is_wrong(half, place, monkeypatch):
    def faulty(*args):
        raise RuntimeError("no")

    monkeypatch.setitem(on_cuda.OPERATORS, call_of(half)[0], faulty)
    _, (_, up, of, known, sums) = call_of("linear_logprobs_chunk_backward")
    with pytest.warns(RuntimeWarning, match="linear_logprobs_chunk is not used"):
        *_, z = on_cuda.served(linear_logprobs_chunk, (of, Given(True)), CPU, place)
    records = (ops.ChunkLogits(z), up, of, known, sums)
    dhidden = on_cuda.served(linear_logprobs_chunk_backward, records, CPU, place)
    exact = linear_logprobs_backward.plain(up, of, LIMITS, known, Needs(True, True, False))
    torch.testing.assert_close(dhidden, exact.dhidden, atol=1e-6, rtol=1e-2)


def test_what_is_unproven_runs_where_it_is_asked_for(place, taken):
    args = (ops.linear_logprobs, (head(), LIMITS), CPU, place)
    on_cuda.served(*args)
    assert set(taken) == {PROVEN}
    taken.clear()
    trust.trust_kernels(unproven=True)
    on_cuda.served(*args)
    assert set(taken) == {NEW}
    assert [v.kernel for v in trust.verdicts()] == [
        f"linear_logprobs, {NEW.title}",
        "linear_logprobs",
    ]


def test_a_configuration_that_is_wrong_gives_way_to_the_next(place, taken, monkeypatch):
    trust.trust_kernels(unproven=True)
    right = linear_logprobs.fused_statistics

    def wrong(*args):
        return right(*args) * (1.1 if args[-1] == NEW else 1.0)

    monkeypatch.setattr(linear_logprobs, "fused_statistics", wrong)
    with pytest.warns(RuntimeWarning, match="linear_logprobs, pointers 16x64x16.* is not used"):
        found = on_cuda.served(ops.linear_logprobs, (head(), LIMITS), CPU, place)
    assert taken[-1] == PROVEN
    torch.manual_seed(0)
    exact = ops.linear_logprobs.plain(head(), LIMITS)
    torch.testing.assert_close(found.logprobs, exact.logprobs, atol=1e-4, rtol=1e-4)


def test_dtypes_and_options_are_checked_each(place):
    for of in (head(), head(dtype=torch.float16), head(bias=True), head()):
        on_cuda.served(ops.linear_logprobs, (of, LIMITS), CPU, place)
    assert [v.kernel for v in trust.verdicts()].count("linear_logprobs") == 3


def test_each_divergence_is_checked(place):
    heads = ops.TwoHeads.of(head(), head())
    for kind in (reference.REVERSE, reference.FORWARD, reference.REVERSE):
        records = (heads, ops.Measure(kind, 0.0, 1.0), LIMITS)
        on_cuda.served(ops.linear_divergence, records, CPU, place)
    assert [v.kernel for v in trust.verdicts()].count("linear_divergence") == 2


def test_the_check_can_be_turned_off(place, taken):
    trust.trust_kernels(first_use_check=False)
    on_cuda.served(ops.linear_logprobs, (head(), LIMITS), CPU, place)
    assert taken == [PROVEN] and trust.verdicts() == []


def test_every_kernel_can_be_checked_at_once(place):
    trust.trust_kernels(unproven=True)
    found = {v.kernel: v.error for v in on_cuda.check_every_kernel(CPU, place)}
    assert set(found.values()) == {None}
    of_operators = {o.__name__ for o in on_cuda.OPERATORS if o not in on_cuda.CONTINUES}
    assert found.keys() == of_operators | {f"linear_logprobs, {NEW.title}"}


def test_what_is_wrong_is_named_by_that_check(place, monkeypatch):
    def faulty(*args):
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(on_cuda.OPERATORS, logits_logprobs_backward, faulty)
    with pytest.warns(RuntimeWarning, match="logits_logprobs_backward"):
        found = {v.kernel: v.error for v in on_cuda.check_every_kernel(CPU, place)}
    wrong = {name for name, error in found.items() if error}
    assert wrong == {"logits_logprobs_backward"}


@pytest.mark.parametrize("stores", [False, True])
def test_each_configuration_forms_the_statistics(stores):
    of = head(bias=True)
    found = first_use.formed(of, NEW._replace(stores=stores), INTERPRETED)
    exact = ops.linear_logprobs.plain(of, LIMITS)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-6)


def test_exponentials_are_kept_where_they_fit_and_were_right(place, monkeypatch):
    """Else logits are formed again, and none of them are kept in plain torch."""
    monkeypatch.setitem(configs.CONFIGS, 0, [NEW._replace(stores=True), PROVEN])
    keeps = on_cuda_chunk.keeps_exponentials
    assert not keeps(head(), LIMITS, CPU, place)
    trust.trust_kernels(unproven=True)
    assert keeps(head(), LIMITS, CPU, place)
    # 20 rows that are 128 apart, of two bytes each.
    assert keeps(head(), Limits(-100, 20 * 128 * 2), CPU, place)
    assert not keeps(head(), Limits(-100, 20 * 128 * 2 - 1), CPU, place)
    assert not keeps(head(dtype=torch.float16), LIMITS, CPU, place)

    def faulty(*args):
        raise RuntimeError("no")

    monkeypatch.setitem(on_cuda.OPERATORS, linear_logprobs_stored_backward, faulty)
    trust.trust_kernels(unproven=True)
    with pytest.warns(RuntimeWarning, match="linear_logprobs_stored is not used"):
        assert not keeps(head(), LIMITS, CPU, place)


@pytest.mark.parametrize("name", NAMES)
def test_results_share_no_memory(name, place):
    """torch refuses an operator whose results are views of one tensor, or of what it was given."""
    operator, records = call_of(name)
    found = on_cuda.served(operator, records, CPU, place)
    given = [t for record in records for t in record if isinstance(t, torch.Tensor)]
    places = [t.untyped_storage().data_ptr() for t in tensors(found) if t.numel()]
    assert len(set(places)) == len(places)
    assert not set(places) & {t.untyped_storage().data_ptr() for t in given}
