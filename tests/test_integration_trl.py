"""TRL on our head: the same losses, gradients and trajectory, and everything back in its place.

A trainer is a real one, around a model of a few thousand weights, in float32 on the cpu.
"""

import dataclasses
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny_models import qwen2, word_tokenizer
from torch import Tensor

import fused_rl
from fused_rl import KLPenalty, Level, LMHead, TokenStats, linear_logprobs, ops
from fused_rl.integrations import trl as integration
from fused_rl.integrations.trl import forming, logged, logprobs, options
from fused_rl.linear.mean_logits import mean_logits

V, H, T = 23, 16, 7
EXAMPLES = re.findall(r"```python\n(.*?)```", integration.__doc__, re.DOTALL)
OURS = fused_rl.dapo(clip_high=0.2)

# Importing trl takes as long as the rest of the suite.
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def trl() -> ModuleType:
    # Run with 1.16, and with 1.15 under TRITON_INTERPRET=1, which its own head needs on a CPU.
    return pytest.importorskip("trl", minversion="1.15", reason="trl >= 1.15 is not installed")


@pytest.fixture(autouse=True)
def unpatched(threads):
    """And on one thread: these models are too small for two."""
    torch.set_num_threads(1)
    yield
    integration.unpatch()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    """A directory, since TRL makes the reference model from the name of the model."""
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    sizes = {"hidden_size": H, "max_position_embeddings": 32}
    path = str(tmp_path_factory.mktemp("model"))
    qwen2(V, seed=3, initializer_range=0.3, **sizes, **tokens).save_pretrained(path)
    return path


def reward(completions: list[str], **_: object) -> list[float]:
    """The share of the first five words."""
    words = [c.split() for c in completions]
    return [sum(w in ("w0", "w1", "w2", "w3", "w4") for w in ws) / T for ws in words]


@pytest.fixture
def arguments(trl, model_path, tmp_path, monkeypatch) -> Callable:
    """What a GRPOTrainer is built from; options are GRPOConfig's."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def build(steps: int = 1, **options) -> dict:
        from datasets import Dataset

        defaults = {
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": T,
            "temperature": 0.7,
            "learning_rate": 1e-2,
            "beta": 0.0,
        }
        args = trl.GRPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to=[],
            logging_steps=1,
            max_steps=steps,
            save_strategy="no",
            disable_tqdm=True,
            **(defaults | options),
        )
        prompts = [f"w{i} w{i + 5} w{i + 9}"[: None if i % 2 else 5] for i in range(8)]
        return {
            "model": model_path,
            "reward_funcs": reward,
            "args": args,
            "processing_class": word_tokenizer(V),
            "train_dataset": Dataset.from_dict({"prompt": prompts}),
        }

    return build


def history(trainer) -> list[dict]:
    trainer.train()
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry]


def gradients(trainer, loss: Tensor) -> list[Tensor]:
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, trained))


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The norm of the difference over the norm."""
    a, b = (torch.cat([t.flatten() for t in ts]) for ts in (ours, theirs))
    return ((a - b).norm() / b.norm()).item()


def side_by_side(trainer, ours: Callable, theirs: Callable) -> list[tuple[float, float, float]]:
    """(distance of gradients, our loss, their loss) on every batch of a training, on theirs' way.

    ours, theirs: (model, inputs) -> loss.
    """
    seen = []

    def both(model, inputs):
        losses = [of(model, inputs) for of in (ours, theirs)]
        pair = [gradients(trainer, loss) for loss in losses]
        seen.append((distance(*pair), *(loss.item() for loss in losses)))
        return theirs(model, inputs)

    trainer._compute_loss = both
    trainer.train()
    return seen


def with_theirs(trainer, trl) -> Callable:
    """TRL's loss through TRL's head, of a trainer that is ours."""
    base, name = trl.GRPOTrainer, "_get_per_token_logps_and_entropies"

    def compute(model, inputs):
        setattr(trainer, name, getattr(base, name).__get__(trainer))
        try:
            return base._compute_loss(trainer, model, inputs)
        finally:
            delattr(trainer, name)

    return compute


def fused(arguments: dict, policy_loss=OURS):
    return integration.FusedGRPOTrainer(**arguments, policy_loss=policy_loss)


# Without TRL.


def test_where_the_completions_are():
    """Two completions of 3 and 1 tokens in 3 columns, after prompts of 2."""
    completion = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert forming.rows_of(completion).tolist() == [0, 1, 2, 3]
    assert forming.scored(4, completion).tolist() == [0, 1, 2, 3]
    assert forming.scored(8, completion).tolist() == [1, 2, 3, 5]
    with pytest.raises(RuntimeError, match="gave its head 7 tokens for 2 completions of 3"):
        forming.scored(7, completion)


def test_what_is_logged_of_a_clip():
    """TRL counts the upper bound where A > 0 alone: a dual-clipped token is none of it. A
    completion without tokens has no share of them.
    """
    old = torch.zeros(3, 4)
    new = torch.tensor([[1.5, 0.5, 1.0, 4.0], [1.0, 0.5, 0.5, 1.0], [9.0] * 4]).log()
    mask = torch.tensor([[1], [1], [0]]).expand(3, 4) == 1
    batch = fused_rl.TokenBatch.padded(
        torch.zeros(3, 4, dtype=torch.int64),
        mask,
        torch.tensor([[1.0, -1.0, 1.0, -1.0], [-1.0, -1.0, -1.0, 1.0], [1.0] * 4]),
        old_logprobs=old,
    )
    loss = forming.StepLoss(
        policy=fused_rl.ppo(dual=3.0),
        divisor=1,
        bonus=0.0,
        masks=options.Masks(SimpleNamespace(), {}, mask),
        rows=torch.arange(12),
        shape=(3, 4),
    )
    value = loss(TokenStats(new, old), batch).loss
    log = defaultdict(list, {"kl": [9.0], "clip_ratio/low_mean": [8.0, 9.0], "reward": [9.0]})
    log["policy_loss"] = [9.0]
    trainer = SimpleNamespace(
        _metrics={"train": log},
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            reduce=lambda t, reduction: t, gather=lambda t: t if t.dim() else t[None]
        ),
    )
    logged.in_place_of_theirs(trainer, loss, batch.num_tokens, {"clip_ratio/low_mean": 1})
    assert log["reward"] == [9.0] and "kl" not in log
    assert log["clip_ratio/low_mean"] == [8.0, 3 / 8]
    assert log["policy_loss"] == [value.item()]
    found = {name: values[-1] for name, values in log.items()}
    assert found["clip_ratio/high_mean"] == found["clip_fraction_dual"] == 1 / 8
    assert found["clip_ratio/region_mean"] == 4 / 8
    assert found["clip_ratio/low_min"] == found["clip_ratio/high_max"] == 1 / 4


def a_trl(monkeypatch, *names: str) -> tuple[type, ModuleType, ModuleType]:
    """Modules that look like a TRL whose function takes these arguments."""

    class Function:
        apply = staticmethod(lambda *args: ("theirs", *args))

    if names:
        scope: dict = {}
        exec(f"def forward(ctx, {', '.join(names)}): pass", scope)
        Function.forward = staticmethod(scope["forward"])
    root, utils, other = (ModuleType(n) for n in ("trl", "trl.trainer.utils", "trl.other"))
    root.__version__ = "9.9.9"
    utils._ChunkedLogProbFunction = other.under_another_name = Function
    utils.nothing = other.nothing = None
    # Whatever of the installed one other tests have imported.
    for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    for module in (root, ModuleType("trl.trainer"), utils, other):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return Function, utils, other


OPTIONS = ("targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale")
SIGNATURES = {
    "1.12": ("last_hidden", "weight", *OPTIONS),
    "1.14": ("last_hidden", "weight", "bias", *OPTIONS),
    "1.16": ("hidden", "weight", "bias", *OPTIONS, "outputs"),
}


def computes(self, model, inputs):
    pass


def asks(self, model):
    pass


@pytest.mark.parametrize(
    ("name", "parts", "said"),
    [
        ("GRPOTrainer", (asks,), "GRPOTrainer has no _compute_loss"),
        ("GRPOTrainer", (computes,), "GRPOTrainer has no _get_per_token_logps_and_entropies"),
        (
            "GRPOTrainer",
            (lambda self, model, inputs, scale: None, asks),
            "_compute_loss takes model, inputs, scale",
        ),
        ("NewTrainer", (computes, asks), "NewTrainer has no trl.GRPOTrainer or trl.RLOOTrainer"),
    ],
)
def test_a_trainer_with_another_seam_is_an_error_that_names_it(monkeypatch, name, parts, said):
    a_trl(monkeypatch, *SIGNATURES["1.14"])
    names = ["_get_per_token_logps_and_entropies" if p is asks else "_compute_loss" for p in parts]
    theirs = type(name, (), dict(zip(names, parts, strict=True)))
    mine = type("Mine", (integration.FusedLoss, theirs), {})
    with pytest.raises(RuntimeError, match=f"TRL 9.9.9 is not one .* its {re.escape(said)}"):
        mine(policy_loss=OURS)


@pytest.mark.parametrize("version", SIGNATURES)
def test_the_seam_of_every_known_version(monkeypatch, version):
    """Softcap, scale, temperature and bias arrive, and two or five values are returned."""
    names = SIGNATURES[version]
    _, utils, _ = a_trl(monkeypatch, *names)
    hidden, weight, bias = torch.randn(5, 4), torch.randn(9, 4), torch.randn(9)
    targets = torch.randint(0, 9, (5,))
    given = {"weight": weight, "bias": bias, "targets": targets, "temperature": 0.7}
    given |= {"chunk_size": 3, "final_logit_softcapping": 3.0, "logit_scale": 0.5}
    given["outputs"] = ("log_probs", "entropy")
    with integration.patched():
        found = utils._ChunkedLogProbFunction.apply(hidden, *(given[n] for n in names[1:]))
    head = LMHead(weight, bias if "bias" in names else None, 0.5, 3.0)
    logp = torch.log_softmax(head.logits(hidden) / 0.7, -1)
    torch.testing.assert_close(found[0], logp[torch.arange(5), targets])
    torch.testing.assert_close(found[1], -(logp.exp() * logp).sum(-1))
    assert found[2:] == ((None,) * 3 if version == "1.16" else ())


def test_log_probs_are_the_same_whatever_else_is_asked_for(monkeypatch):
    """Also of a head that ZeRO-3 has sharded and TRL has gathered."""
    original, utils, _ = a_trl(monkeypatch, *SIGNATURES["1.16"])
    hidden, weight, targets = torch.randn(5, 4), torch.randn(9, 4), torch.randint(0, 9, (5,))

    def call(*outputs: str, softcap: float | None = None, weight: Tensor = weight):
        args = (hidden, weight, None, targets, 1.0, 3, softcap, 1.0, ("log_probs", *outputs))
        return utils._ChunkedLogProbFunction.apply(*args)[0]

    sharded = torch.nn.Parameter(weight)
    sharded.ds_id = 0
    with integration.patched():
        alone = call()
        assert torch.equal(call(weight=sharded), alone)
        for outputs in (("entropy",), ("log_sum_sq_probs", "entropy"), ("mean_logits",)):
            assert torch.equal(call(*outputs), alone)
        capped = call(softcap=2.0)
        for outputs in (("is_top1", "mean_logits"), ("log_sum_sq_probs",)):
            assert torch.equal(call(*outputs, softcap=2.0), capped)
        default = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 3)
    assert torch.equal(default[0], alone) and all(t is not None for t in default)
    assert call()[0] == "t"
    assert utils._ChunkedLogProbFunction is original


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_what_needs_all_logits(monkeypatch, softcap):
    """log sum p^2 and the mean logit, of the same pass; no gradient."""
    _, utils, _ = a_trl(monkeypatch, *SIGNATURES["1.16"])
    hidden, weight, bias = torch.randn(5, 4), torch.randn(9, 4), torch.randn(9)
    hidden.requires_grad_()
    args = (weight, bias, torch.randint(0, 9, (5,)), 0.7, 3, softcap, 0.5)
    outputs = ("log_probs", "log_sum_sq_probs", "mean_logits")
    with integration.patched():
        apply = utils._ChunkedLogProbFunction.apply
        _, entropy, squares, mean, top = apply(hidden, *args, outputs)
        assert apply(hidden, *args, outputs[:2])[3] is None
        assert apply(hidden, *args, (outputs[0], outputs[2]))[2] is None
        assert apply(hidden[:0], weight, bias, args[2][:0], *args[3:], outputs)[2].shape == (0,)
    z = LMHead(weight, bias, 0.5, softcap).logits(hidden.detach()) / 0.7
    torch.testing.assert_close(squares, torch.log_softmax(z, -1).exp().square().sum(-1).log())
    torch.testing.assert_close(mean, z.mean(-1))
    assert entropy is None and top is None
    assert not squares.requires_grad and not mean.requires_grad


def test_trainers_with_a_reference_from_before_stay_with_theirs(monkeypatch):
    """All that they do, in `_compute_loss` and where references are made; others are ours."""
    original, utils, _ = a_trl(monkeypatch, *SIGNATURES["1.16"])
    args = (torch.randn(5, 4), torch.randn(9, 4), None, torch.randint(0, 9, (5,)), 1.0, 3)

    class Trainer:
        def __init__(self, precomputed: bool) -> None:
            self.precompute_ref_logps = precomputed

        def _compute_loss(self, name: str) -> object:
            """The first log-prob."""
            assert name == "given"
            return utils._ChunkedLogProbFunction.apply(*args)[0]

        def _precompute_ref_logps(self) -> object:
            return self._compute_loss("given")

    theirs = dict(vars(Trainer))
    sys.modules["trl"].DPOTrainer = Trainer
    with integration.patched():
        precomputed, other = Trainer(True), Trainer(False)
        assert precomputed._compute_loss("given") == "theirs"
        assert precomputed._precompute_ref_logps() == "theirs"
        assert other._compute_loss(name="given").shape == (5,)
        assert utils._ChunkedLogProbFunction.apply(*args)[0].shape == (5,)
        assert Trainer._compute_loss.__doc__ == "The first log-prob."
    assert dict(vars(Trainer)) == theirs
    assert utils._ChunkedLogProbFunction is original


def test_is_top1_is_whether_the_label_is_the_argmax(monkeypatch):
    _, utils, _ = a_trl(monkeypatch, *SIGNATURES["1.16"])
    hidden, weight = torch.randn(40, 4), torch.randn(3, 4)
    targets = torch.randint(0, 3, (40,))
    args = (weight, None, targets, 0.7, 3, 2.0, 0.5)
    with integration.patched():
        apply = utils._ChunkedLogProbFunction.apply
        is_top1 = apply(hidden, *args, ("log_probs", "is_top1"))[4]
        assert apply(hidden, *args, ("log_probs",))[4] is None
    expected = (hidden @ weight.T).argmax(-1) == targets
    assert is_top1.dtype == torch.bool and torch.equal(is_top1, expected)
    assert 5 < expected.sum() < 35


@pytest.mark.parametrize("more", [(), ("log_sum_sq_probs",)])
def test_of_tokens_that_tie_the_first_is_the_most_likely(monkeypatch, more):
    """As for TRL's argmax."""
    _, utils, _ = a_trl(monkeypatch, *SIGNATURES["1.16"])
    weight = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.5, 0.0]])
    args = (torch.tensor([[2.0, 1.0]] * 4), weight, None, torch.arange(4), 1.0, 3, None, 1.0)
    with integration.patched():
        found = utils._ChunkedLogProbFunction.apply(*args, ("log_probs", "is_top1", *more))
    assert found[4].tolist() == [False, True, False, False]
    assert found[0][1] == found[0][2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_what_is_asked_for_besides_changes_no_log_prob(monkeypatch, softcap, dtype):
    """So that a policy with weights and its reference without them are of one head."""
    _, utils, _ = a_trl(monkeypatch, *SIGNATURES["1.16"])
    weight, targets = torch.randn(3000, 64, dtype=dtype), torch.randint(0, 3000, (40,))
    args = (weight, None, targets, 0.7, 3, softcap, 0.5)
    with integration.patched():
        apply = utils._ChunkedLogProbFunction.apply
        hidden = torch.randn(40, 64, dtype=dtype)
        alone = apply(hidden, *args, ("log_probs",))[0]
        for more in (("log_sum_sq_probs",), ("mean_logits", "is_top1"), ("is_top1",)):
            assert torch.equal(apply(hidden, *args, ("log_probs", *more))[0], alone)
            states = hidden.clone().requires_grad_()
            assert torch.equal(apply(states, *args, ("log_probs", *more))[0].detach(), alone)


@pytest.mark.parametrize("autocast", [False, True])
def test_mean_logits_without_the_logits(autocast):
    hidden = torch.randn(5, 4)
    for bias in (None, torch.randn(9)):
        head = LMHead(torch.randn(9, 4), bias, 0.5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mean = mean_logits(hidden, head)
        torch.testing.assert_close(mean, head.logits(hidden).mean(-1))


def test_every_name_is_put_back(monkeypatch):
    original, utils, other = a_trl(monkeypatch, *SIGNATURES["1.16"])
    integration.patch()
    ours = utils._ChunkedLogProbFunction
    assert ours is not original and other.under_another_name is ours
    # A module that is imported while ours is in place.
    late = ModuleType("trl.late")
    late._ChunkedLogProbFunction = ours
    monkeypatch.setitem(sys.modules, "trl.late", late)
    integration.patch()
    with integration.patched():
        assert utils._ChunkedLogProbFunction is ours
    assert utils._ChunkedLogProbFunction is ours
    integration.unpatch()
    integration.unpatch()
    names = (utils._ChunkedLogProbFunction, other.under_another_name, late._ChunkedLogProbFunction)
    assert all(name is original for name in names)
    assert utils.nothing is other.nothing is None
    with pytest.raises(KeyError), integration.patched():
        raise KeyError
    assert utils._ChunkedLogProbFunction is original


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("hidden", "weight", "targets"), "takes weight, targets"),
        ((), "is not there"),
    ],
)
def test_a_seam_that_moved_is_an_error_that_names_the_version(monkeypatch, names, said):
    original, utils, _ = a_trl(monkeypatch, *names)
    with pytest.raises(RuntimeError, match=f"TRL 9.9.9 .* {said}"):
        integration.patch()
    assert utils._ChunkedLogProbFunction is original


# With TRL.


@slow
def test_the_real_seam_is_put_back(trl):
    import trl.kernels
    import trl.trainer.utils as utils

    before = (utils._ChunkedLogProbFunction, trl.kernels.ChunkedLogProbFunction)
    with integration.patched():
        assert utils._ChunkedLogProbFunction is not before[0]
    assert before[0] is utils._ChunkedLogProbFunction
    assert before[1] is trl.kernels.ChunkedLogProbFunction


@slow
@pytest.mark.parametrize("outputs", [("entropy",), ("mean_logits",), ("is_top1", "entropy")])
def test_a_model_with_their_head_says_the_same(trl, model_path, outputs):
    """log-probs, entropies, mean logits, and the gradients of every weight, at temperature 0.7."""
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", *outputs))
    ids = torch.randint(3, V, (3, 9))
    labels = ids.masked_fill(torch.rand(3, 9) < 0.3, -100)
    coefficients = torch.randn(2, 3, 8)

    def of() -> tuple[list[Tensor], list[Tensor]]:
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        values = [v for k in ("log_probs", *outputs) if (v := getattr(out, k)) is not None]
        sums = zip(coefficients, (out.log_probs, out.entropy), strict=True)
        loss = sum((c * v).sum() for c, v in sums if v is not None)
        return values, torch.autograd.grad(loss, list(model.parameters()))

    theirs = of()
    with integration.patched():
        ours = of()
    assert len(ours[0]) == 1 + len(outputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@slow
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_every_step_of_grpo_has_the_same_gradients_patched(trl, arguments, beta):
    trainer = trl.GRPOTrainer(**arguments(10, beta=beta, gradient_accumulation_steps=2))
    compute = trainer._compute_loss

    def ours(model, inputs):
        with integration.patched():
            return compute(model, inputs)

    seen = side_by_side(trainer, ours, compute)
    assert len(seen) == 20
    assert max(error for error, *_ in seen) < 1e-5
    for _, mine, theirs in seen:
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@slow
def test_grpo_patched_takes_the_same_way(trl, arguments):
    """30 steps: what is sampled, and so rewards, are the same; losses but for rounding."""
    plain = history(trl.GRPOTrainer(**arguments(30)))
    with integration.patched():
        ours = history(trl.GRPOTrainer(**arguments(30)))
    assert len(plain) == len(ours) == 30
    assert plain[-1]["reward"] > plain[0]["reward"] + 0.2
    for name, tolerance in {"reward": 1e-9, "entropy": 1e-4, "grad_norm": 1e-3}.items():
        a, b = ([entry[name] for entry in entries] for entries in (plain, ours))
        assert b == pytest.approx(a, rel=tolerance, abs=1e-6), name


@slow
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_every_step_of_the_fused_trainer_has_trls_gradients(trl, arguments, loss_type, accumulated):
    """Two optimizer steps per generation, so that ratios leave 1, and a KL."""
    options = {"loss_type": loss_type, "beta": 0.04, "num_iterations": 2}
    options |= {"gradient_accumulation_steps": accumulated, "steps_per_generation": 2}
    loss = {
        "dapo": fused_rl.dapo(clip_high=0.2),
        "grpo": fused_rl.grpo(),
        "dr_grpo": fused_rl.dr_grpo(T),
    }[loss_type]
    loss = dataclasses.replace(loss, kl=KLPenalty(0.04, importance=Level.TOKEN))
    trainer = fused(arguments(10, **options), loss)
    seen = side_by_side(trainer, trainer._compute_loss, with_theirs(trainer, trl))
    assert len(seen) == 10 * accumulated
    assert max(error for error, *_ in seen) < 1e-5
    for _, mine, theirs in seen:
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@slow
def test_the_fused_trainer_takes_the_same_way_and_logs_the_same(trl, arguments):
    """30 steps of DAPO; every second one on tokens of a policy that is one step old."""
    options = {"num_iterations": 2, "epsilon": 0.05, "epsilon_high": 0.05}
    plain = history(trl.GRPOTrainer(**arguments(30, **options)))
    ours = history(fused(arguments(30, **options), fused_rl.dapo(clip_low=0.05, clip_high=0.05)))
    clip = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
    assert sum(entry[clip[2]] for entry in plain) > 0
    for name in ("reward", "loss", "entropy", "grad_norm", *clip):
        # Rewards are of steps that generate.
        a, b = ([e[name] for e in entries if name in e] for entries in (plain, ours))
        assert len(a) == (15 if name == "reward" else 30)
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5), name
    assert all(0 <= entry["zero_gradient_fraction"] <= 1 for entry in ours)
    assert max(entry["ratio_max"] for entry in ours) > 1.05
    import trl.trainer.utils as utils

    assert isinstance(utils._ChunkedLogProbFunction, type)


@slow
def test_an_adapter_and_a_frozen_head_take_the_cheap_way(trl, arguments, monkeypatch):
    """LoRA: 4 NHV instead of 8, or 6, and the same gradients."""
    if not ops.walks_once(torch.device("cpu")):
        pytest.skip("without the C++ kernels one pass forms logits")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    calls = []
    for name in ("linear_logprobs_frozen", "linear_logprobs_chunk_backward"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, n=name, op=op: calls.append((n, a)) or op(*a))
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = trl.GRPOTrainer(**arguments(3), peft_config=lora)
    compute = trainer._compute_loss

    def ours(model, inputs):
        with integration.patched():
            return compute(model, inputs)

    seen = side_by_side(trainer, ours, compute)
    assert [name for name, _ in calls].count("linear_logprobs_frozen") == 3
    assert len(seen) == 3 and max(error for error, *_ in seen) < 1e-5
    calls.clear()
    arguments = arguments(3) | {"peft_config": lora}
    trainer = fused(arguments)
    seen = side_by_side(trainer, trainer._compute_loss, with_theirs(trainer, trl))
    assert len(seen) == 3 and max(error for error, *_ in seen) < 1e-5
    # Nothing of the vocabulary's size is formed, neither logits nor the gradient of the head.
    assert [name for name, _ in calls] == ["linear_logprobs_frozen"] * 3


@slow
def test_a_loss_that_is_not_separable_and_one_that_is_a_function(arguments):
    """GSPO takes two passes; a function of (stats, batch) is a loss too. Both learn."""

    def reinforce(stats: TokenStats, batch: fused_rl.TokenBatch) -> fused_rl.LossOutput:
        return fused_rl.LossOutput(-(batch.advantages * stats.logprobs).mean(), {})

    for loss in (fused_rl.gspo(clip_low=0.2, clip_high=0.2), reinforce):
        entries = history(fused(arguments(20), loss))
        assert entries[-1]["reward"] > entries[0]["reward"] + 0.1


def batch_of(trainer) -> dict[str, Tensor]:
    """Two prompts and completions, the second one cut and with a tool's token in it."""
    trainer.model.eval()
    completion = torch.ones(2, T, dtype=torch.int64)
    completion[1, 4:] = 0
    tool = torch.ones_like(completion)
    tool[1, 2] = 0
    return {
        "prompt_ids": torch.randint(3, V, (2, 3)),
        "prompt_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]),
        "completion_ids": torch.randint(3, V, (2, T)),
        "completion_mask": completion,
        "tool_mask": tool,
        "advantages": torch.tensor([1.0, -2.0]),
        "num_items_in_batch": torch.tensor(10),
    }


@slow
def test_tool_tokens_weights_and_counts(trl, arguments):
    """As TRL where it has them; weights of 2 double the loss; given counts are of the step."""
    trainer = fused(arguments(), fused_rl.dapo(clip_high=0.2))
    inputs = batch_of(trainer)
    ours = trainer.compute_loss(trainer.model, inputs)
    theirs = with_theirs(trainer, trl)(trainer.model, inputs)
    assert distance(gradients(trainer, ours), gradients(trainer, theirs)) < 1e-4
    weighted = inputs | {"importance_sampling_ratio": torch.full((2, 1), 2.0)}
    twice = trainer.compute_loss(trainer.model, weighted)
    assert twice.item() == pytest.approx(2 * ours.item(), rel=1e-5)
    trainer.policy_loss = fused_rl.dapo(num_tokens=20, clip_high=0.2)
    given = trainer.compute_loss(trainer.model, inputs)
    assert given.item() == pytest.approx(ours.item() / 2, rel=1e-5)


@slow
@pytest.mark.parametrize("nothing", [False, True])
def test_the_head_is_given_all_columns_or_the_scored_tokens_alone(
    trl, arguments, monkeypatch, nothing
):
    """As on CUDA. Nothing to score is a loss of 0, with a gradient of zeros, either way."""
    import trl.trainer.utils as utils

    trainer = fused(arguments(), fused_rl.grpo())
    inputs = batch_of(trainer)
    if nothing:
        inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    losses = []
    for compact in (False, True):
        monkeypatch.setattr(utils, "_use_triton", lambda device, c=compact: c, raising=False)
        losses.append(trainer.compute_loss(trainer.model, inputs))
    torch.testing.assert_close(*losses)
    pair = [gradients(trainer, loss) for loss in losses]
    torch.testing.assert_close(*pair)
    assert (losses[0].item() == 0) is nothing
    assert all((g == 0).all() for g in pair[0]) is nothing


@slow
def test_a_penalty_without_a_reference_model_is_an_error(arguments):
    with pytest.raises(ValueError, match=r"GRPOConfig\.beta is 0"):
        fused(arguments(), fused_rl.dapo(beta=0.1))


# What a trainer logs, and how often in a step its head is ours.
OTHERS = {
    "RLOO": (("loss", "entropy"), 2),
    "KTO": (("loss", "logps/chosen", "kl"), 4),
    "DPO": (("loss", "entropy", "mean_token_accuracy", "logits/chosen", "rewards/margins"), 2),
    "SFT": (("loss", "entropy", "mean_token_accuracy"), 1),
}


@slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_trainers_take_the_same_way(trl, model_path, tmp_path, monkeypatch, name):
    """24 steps on our head alone, and what is logged is what TRL's logs; policies learn."""
    from datasets import Dataset

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    steps = 24
    prompts = [f"w{i} w{i + 5}" for i in range(8)]
    good, bad = ([f" w{(i + k) % 20} w3 w{k}" for i in range(8)] for k in (1, 7))
    columns = {
        "RLOO": {"prompt": prompts},
        "KTO": {"prompt": prompts, "completion": good, "label": [True, False] * 4},
        "DPO": {"prompt": prompts, "chosen": good, "rejected": bad},
        "SFT": {"text": [a + b for a, b in zip(prompts, good, strict=True)]},
    }[name]
    sampled = {"num_generations": 4, "max_completion_length": T, "beta": 0.0}
    extra = {"reward_funcs": reward} if name == "RLOO" else {}

    def entries() -> list[dict]:
        args = getattr(trl, f"{name}Config")(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to=[],
            logging_steps=1,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            save_strategy="no",
            disable_tqdm=True,
            **(sampled if name == "RLOO" else {}),
        )
        trainer = getattr(trl, f"{name}Trainer")(
            model=model_path,
            args=args,
            train_dataset=Dataset.from_dict(columns),
            processing_class=word_tokenizer(V),
            **extra,
        )
        return history(trainer)

    count = []
    ours = logprobs.statistics
    monkeypatch.setattr(logprobs, "statistics", lambda *a: count.append(1) or ours(*a))
    plain = entries()
    assert not count
    with integration.patched():
        patched = entries()
    logged, calls = OTHERS[name]
    assert len(plain) == steps and len(count) == calls * steps
    for key in ("grad_norm", *logged):
        a, b = ([entry[key] for entry in of] for of in (plain, patched))
        exactly = key == "mean_token_accuracy"
        assert b == pytest.approx(a, rel=1e-9 if exactly else 1e-3, abs=1e-5), key
    if "mean_token_accuracy" in logged:
        assert plain[-1]["mean_token_accuracy"] > plain[0]["mean_token_accuracy"] + 0.2


@slow
def test_the_examples_run(trl, arguments):
    names = {"trainer": trl.GRPOTrainer(**arguments(2))}
    exec(EXAMPLES[0], names)
    assert names["trainer"].state.global_step == 2
    given = arguments(2)
    names = {"model": given["model"], "reward": reward}
    names |= {"config": given["args"], "dataset": given["train_dataset"]}
    names |= {"tokenizer": given["processing_class"]}
    exec(EXAMPLES[1], names)
    assert names["trainer"].state.global_step == 2
    assert len(EXAMPLES) == 2


@slow
def test_logprobs_of_a_patched_head_are_those_of_linear_logprobs(trl, model_path):
    """Not merely near: it is the same call."""
    import trl.trainer.utils as utils

    hidden, weight = torch.randn(6, H), torch.randn(V, H)
    targets = torch.randint(0, V, (6,))
    with integration.patched():
        apply = utils._ChunkedLogProbFunction.apply
        found = apply(hidden, weight, None, targets, 0.7, 8, None, 1.0, ("log_probs", "entropy"))
    expected = linear_logprobs(hidden, weight, targets, temperature=0.7)
    assert torch.equal(found[0], expected.logprobs) and torch.equal(found[1], expected.entropy)
