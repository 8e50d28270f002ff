"""TRL's distillation on our two heads: DistillationTrainer and the experimental GKDTrainer.

Trainers are real ones, around models of a few thousand weights whose widths differ. Every step's
loss and gradients are compared, in float32; and in bfloat16 both with float64.
"""

import contextlib
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from test_integration_trl import distance
from tiny_models import qwen2, word_tokenizer
from torch import Tensor

from fused_rl import linear_divergence, ops
from fused_rl.integrations import trl as integration
from fused_rl.integrations.trl import divergence as of_divergence
from fused_rl.integrations.trl import gkd

V, H, TEACHER_H, T = 23, 16, 32, 7
BETAS = (0.0, 0.3, 1.0)

# Importing trl takes as long as the rest of the suite.
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def unpatched(threads, monkeypatch):
    """And on one thread: these models are too small for two."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    torch.set_num_threads(1)
    yield
    integration.unpatch()


@pytest.fixture(scope="module")
def trl() -> ModuleType:
    return pytest.importorskip("trl", minversion="1.16", reason="trl >= 1.16 is not installed")


def inputs(dtype: torch.dtype = torch.float32, n: int = 9) -> list[Tensor]:
    """hidden, weight, bias of the student, of which all want a gradient, and of the teacher."""
    shapes = [(n, H), (V, H), (V,), (n, TEACHER_H), (V, TEACHER_H), (V,)]
    scales = (1.0, 0.4, 1.0, 1.0, 0.3, 1.0)
    pairs = zip(shapes, scales, strict=True)
    return [(torch.randn(*shape) * scale).to(dtype).requires_grad_() for shape, scale in pairs]


def in_float64(given: list[Tensor], beta: float, temperature: float, scales, caps) -> list[Tensor]:
    """Divergence, entropy and the student's three gradients of the sum of divergences."""
    leaves = [t.detach().double().requires_grad_() for t in given]
    logs = []
    for (hidden, weight, bias), scale, cap in zip(
        (leaves[:3], leaves[3:]), scales, caps, strict=True
    ):
        z = scale * (hidden @ weight.T + bias)
        logs.append(
            torch.log_softmax((z if cap is None else cap * torch.tanh(z / cap)) / temperature, -1)
        )
    s, t = logs
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731 - a formula
    if beta in (0.0, 1.0):
        found = kl(s, t) if beta else kl(t, s)
    else:
        m = ((1 - beta) * s.exp() + beta * t.exp()).log()
        found = beta * kl(t, m) + (1 - beta) * kl(s, m)
    gradients = torch.autograd.grad(found.sum(), leaves[:3])
    return [found.detach(), -(s.exp() * s).sum(-1).detach(), *gradients]


def results(apply: Callable, given: list[Tensor], *options) -> list[Tensor]:
    """The same of a function that is called as TRL's is."""
    divergence, entropy = apply(*given, *options)
    assert not entropy.requires_grad
    gradients = torch.autograd.grad(divergence.sum(), given, allow_unused=True)
    assert all(g is None for g in gradients[3:]), "the teacher has no gradient"
    return [divergence.detach(), entropy, *gradients[:3]]


# Without TRL.


def a_trl(monkeypatch, names: tuple[str, ...] | None) -> tuple[type, ModuleType, ModuleType]:
    """Modules that look like a TRL whose function of divergences takes these arguments."""
    from test_integration_trl import SIGNATURES
    from test_integration_trl import a_trl as with_logprobs

    logprobs, utils, _ = with_logprobs(monkeypatch, *SIGNATURES["1.16"])

    class Function:
        apply = staticmethod(lambda *args: ("theirs", *args))

    if names is not None:
        scope: dict = {}
        exec(f"def forward(ctx, {', '.join(names)}): pass", scope)
        Function.forward = staticmethod(scope["forward"])
    kernels = ModuleType("trl.kernels.chunked_divergence")
    trainer = ModuleType("trl.trainer.distillation_trainer")
    kernels.ChunkedDivergenceFunction = trainer.under_another_name = Function
    for module in (ModuleType("trl.kernels"), kernels, trainer):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(utils, "original", logprobs, raising=False)
    return Function, kernels, trainer


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_entropy_and_gradients(monkeypatch, beta):
    """At a temperature, with scale and softcap on either side; by position, as TRL calls it."""
    _, kernels, _ = a_trl(monkeypatch, of_divergence.NAMES)
    given = inputs(torch.float64)
    with integration.patched():
        found = results(
            kernels.ChunkedDivergenceFunction.apply, given, beta, 0.7, 0.5, 3.0, 2.0, None
        )
    expected = in_float64(given, beta, 0.7, (0.5, 2.0), (3.0, None))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_arguments_that_have_defaults(monkeypatch):
    _, kernels, _ = a_trl(monkeypatch, of_divergence.NAMES)
    given = inputs(torch.float64)
    given[2] = given[5] = None
    with integration.patched():
        divergence, _ = kernels.ChunkedDivergenceFunction.apply(*given, 1.0)
    expected = linear_divergence(given[0], given[1], given[3], given[4]).divergence
    assert torch.equal(divergence, expected)


def test_every_name_of_the_function_is_put_back(monkeypatch):
    original, kernels, trainer = a_trl(monkeypatch, of_divergence.NAMES)
    with integration.patched():
        ours = kernels.ChunkedDivergenceFunction
        assert ours is not original and trainer.under_another_name is ours
        late = ModuleType("trl.late")
        late.function = ours
        monkeypatch.setitem(sys.modules, "trl.late", late)
    assert kernels.ChunkedDivergenceFunction is original
    assert trainer.under_another_name is original and late.function is original


def test_a_sharded_head_of_either_side_is_theirs(monkeypatch):
    _, kernels, _ = a_trl(monkeypatch, of_divergence.NAMES)
    for side in (1, 4):
        given = [torch.nn.Parameter(t) for t in inputs()]
        given[side].ds_id = 0
        with integration.patched():
            assert kernels.ChunkedDivergenceFunction.apply(*given, 1.0)[0] == "theirs"


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_vocabularies_of_different_sizes_are_an_error(monkeypatch, larger):
    """TRL's function cuts a larger teacher in silence, and fails within a product at a smaller."""
    _, kernels, _ = a_trl(monkeypatch, of_divergence.NAMES)
    given = inputs()
    at = slice(0, 3) if larger == "teacher" else slice(3, 6)
    given[at] = [given[at][0], *(t[: V - 2] for t in given[at][1:])]
    sizes = f"{len(given[1])} vocabulary entries and the teacher's {len(given[4])}"
    with integration.patched(), pytest.raises(ValueError, match=sizes):
        kernels.ChunkedDivergenceFunction.apply(*given, 1.0)


def test_an_entry_that_neither_can_sample_adds_nothing(monkeypatch):
    _, kernels, _ = a_trl(monkeypatch, of_divergence.NAMES)
    given = inputs(torch.float64)
    with integration.patched():
        apply = kernels.ChunkedDivergenceFunction.apply
        fewer = [t[:-1] if len(t) == V else t for t in given]
        expected = results(apply, [t.detach().requires_grad_() for t in fewer], 0.3)
        with torch.no_grad():
            given[2][-1] = given[5][-1] = float("-inf")
        found = results(apply, given, 0.3)
    torch.testing.assert_close(found[:3], expected[:3])
    assert not found[3][-1].any() and not found[4][-1].any()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (of_divergence.NAMES[:-1], "takes student_hidden, .*, teacher_logit_scale$"),
        (None, "is not"),
    ],
)
def test_a_function_that_moved_is_an_error_and_changes_nothing(monkeypatch, names, said):
    original, kernels, _ = a_trl(monkeypatch, names)
    with pytest.raises(RuntimeError, match=r"ChunkedDivergenceFunction " + said.rstrip("$")):
        integration.patch()
    assert kernels.ChunkedDivergenceFunction is original
    utils = sys.modules["trl.trainer.utils"]
    assert utils._ChunkedLogProbFunction is utils.original


def a_gkd(monkeypatch, signature: str) -> type:
    scope: dict = {}
    exec(f"def compute_loss({signature}): return 'theirs'", scope)
    module = ModuleType("trl.experimental.gkd.gkd_trainer")
    methods = {"compute_loss": scope["compute_loss"], "generalized_jsd_loss": lambda: None}
    module.GKDTrainer = type("GKDTrainer", (), methods)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.GKDTrainer


def test_a_gkd_trainer_that_moved_is_an_error_and_changes_nothing(monkeypatch):
    original, kernels, _ = a_trl(monkeypatch, of_divergence.NAMES)
    trainer = a_gkd(monkeypatch, "self, model, inputs")
    theirs = trainer.compute_loss
    with pytest.raises(RuntimeError, match=r"GKDTrainer\.compute_loss takes self, model, inputs\."):
        integration.patch()
    assert trainer.compute_loss is theirs and kernels.ChunkedDivergenceFunction is original


def test_what_of_gkd_stays_theirs(monkeypatch):
    """Logits that are asked for, heads that are sharded, a divergence of a subclass."""
    from types import SimpleNamespace as Some

    a_trl(monkeypatch, of_divergence.NAMES)
    owner = a_gkd(monkeypatch, ", ".join(gkd.NAMES))
    theirs = owner.compute_loss

    def trainer(cls: type, sharded: bool) -> object:
        weight = Some(ds_id=0) if sharded else Some()
        made = cls()
        made.accelerator = Some(unwrap_model=lambda m: m)
        made.teacher_model = Some(get_output_embeddings=lambda: Some(weight=weight))
        return made

    plain = Some(get_output_embeddings=lambda: Some(weight=Some()))
    other = type("Other", (owner,), {"generalized_jsd_loss": lambda: None})
    with integration.patched():
        assert trainer(owner, False).compute_loss(plain, {}, return_outputs=True) == "theirs"
        assert trainer(owner, True).compute_loss(plain, {}) == "theirs"
        assert trainer(other, False).compute_loss(plain, {}) == "theirs"
        made = trainer(owner, False)
        made.beta = 0.5
        with pytest.raises(KeyError, match="input_ids"):
            made.compute_loss(plain, {})
    assert owner.compute_loss is theirs


# With TRL.


@slow
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", [(1.0,), (0.7, 0.5, 3.0, 2.0, None)])
def test_the_real_function_says_the_same_in_float32(trl, beta, options):
    from trl.kernels import chunked_divergence

    theirs = chunked_divergence.ChunkedDivergenceFunction
    given = inputs()
    expected = results(theirs.apply, given, beta, *options)
    with integration.patched():
        assert chunked_divergence.ChunkedDivergenceFunction is not theirs
        found = results(chunked_divergence.ChunkedDivergenceFunction.apply, given, beta, *options)
    assert chunked_divergence.ChunkedDivergenceFunction is theirs
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@slow
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-3])
def test_our_values_are_nearer_to_float64_from_bfloat16(trl, beta, apart):
    """A teacher that is the student but for noise: KL of about 0.2, 2e-5 and 2e-7 nats.

    Theirs is a difference of sums of the size of the entropy. The gradient of the logits is rounded
    to bfloat16 before the products in either, which is all of the error of the gradients.
    """
    from trl.kernels import chunked_divergence

    hidden, weight = torch.randn(64, H), torch.randn(257, H) * 0.5
    given = [hidden.bfloat16(), weight.bfloat16(), torch.randn(257).bfloat16()]
    # The bias of the teacher is float32: a noise of 1e-3 is less than bfloat16 has.
    noisy = given[2].float() + apart * torch.randn(257)
    given = [t.detach().requires_grad_() for t in (*given, *given[:2], noisy)]
    theirs = results(chunked_divergence.ChunkedDivergenceFunction.apply, given, beta)
    with integration.patched():
        ours = results(chunked_divergence.ChunkedDivergenceFunction.apply, given, beta)
    exact = in_float64(given, beta, 1.0, (1.0, 1.0), (None, None))

    def errors(found: list[Tensor]) -> list[float]:
        return [distance([a.double()], [b]) for a, b in zip(found, exact, strict=True)]

    mine, other = errors(ours), errors(theirs)
    # divergence, entropy; dhidden, dweight, dbias.
    assert all(a < b for a, b in zip(mine[:2], other[:2], strict=True))
    assert all(a <= 1.1 * b for a, b in zip(mine[2:], other[2:], strict=True))
    assert mine[0] < 1e-3 and (other[0] > 0.1 or apart > 1e-3)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    """Directories of the student and of a teacher that is twice as wide."""
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    options = {"max_position_embeddings": 64, "initializer_range": 0.3, **tokens}
    paths = []
    for seed, width in ((3, H), (4, TEACHER_H)):
        paths.append(str(tmp_path_factory.mktemp(f"model{seed}")))
        qwen2(V, seed=seed, hidden_size=width, **options).save_pretrained(paths[-1])
    return tuple(paths)


@pytest.fixture
def trainer(trl, models, tmp_path) -> Callable:
    """trainer("Distillation" or "GKD", steps, peft_config, **options of its config)."""

    def build(kind: str, steps: int = 6, peft_config=None, dtype: str = "float32", **options):
        from datasets import Dataset
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": []}
        common |= {"max_steps": steps, "logging_steps": 1, "save_strategy": "no"}
        common |= {"disable_tqdm": True, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
        common |= {"temperature": 0.7, "model_init_kwargs": {"dtype": dtype}}
        common |= {"teacher_model_init_kwargs": {"dtype": dtype}}
        tokenizer = word_tokenizer(V)
        prompts = [f"w{i} w{i + 5} w{i + 9}"[: None if i % 2 else 5] for i in range(8)]
        if kind == "GKD":
            tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
            answers = [f"w{i + 2} w3 w{i}"[: None if i % 3 else 5] for i in range(8)]
            said = [
                [{"role": "user", "content": p}, {"role": "assistant", "content": a}]
                for p, a in zip(prompts, answers, strict=True)
            ]
            data = Dataset.from_dict({"messages": said})
            config = GKDConfig(
                max_length=20, max_new_tokens=T, **(common | {"lmbda": 0.5} | options)
            )
            made = GKDTrainer
        else:
            data = Dataset.from_dict({"prompt": prompts})
            config = trl.DistillationConfig(max_completion_length=T, **(common | options))
            made = trl.DistillationTrainer
        return made(
            model=models[0],
            teacher_model=models[1],
            args=config,
            processing_class=tokenizer,
            train_dataset=data,
            peft_config=peft_config,
        )

    return build


def side_by_side(trainer) -> list[tuple[float, float, float]]:
    """(distance of gradients, our loss, their loss) at every micro-batch, on theirs' way."""
    seen = []

    def both(model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = []
        for context in (integration.patched, contextlib.nullcontext):
            with context():
                compute = type(trainer).compute_loss.__get__(trainer)
                losses.append(compute(model, inputs, num_items_in_batch=num_items_in_batch))
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        pair = [list(torch.autograd.grad(loss, trained, retain_graph=True)) for loss in losses]
        seen.append((distance(*pair), *(loss.item() for loss in losses)))
        return losses[1]

    trainer.compute_loss = both
    trainer.train()
    return seen


def counted(monkeypatch, *modules: ModuleType) -> list[str]:
    """Grows with every call of linear_divergence by these modules."""
    calls = []
    for module in modules:
        monkeypatch.setattr(
            module,
            "linear_divergence",
            lambda *a, **k: calls.append("linear_divergence") or linear_divergence(*a, **k),
        )
    return calls


@slow
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", ["Distillation", "GKD"])
def test_every_step_has_the_same_loss_and_gradients(trainer, monkeypatch, kind, beta):
    """In float32; two micro-batches make a step."""
    calls = counted(monkeypatch, of_divergence, gkd)
    seen = side_by_side(trainer(kind, beta=beta, gradient_accumulation_steps=2))
    assert len(seen) == len(calls) == 12
    assert max(error for error, *_ in seen) < 1e-5
    for _, mine, theirs in seen:
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert min(theirs for *_, theirs in seen) > 1e-2


@slow
@pytest.mark.parametrize("kind", ["Distillation", "GKD"])
def test_a_training_takes_the_same_way(trainer, monkeypatch, kind):
    """20 steps: what is logged, and what is sampled; the student comes nearer to the teacher."""
    logged = ("loss", "grad_norm", "entropy", "num_tokens")[: 4 if kind == "Distillation" else 2]
    entries = []
    calls = counted(monkeypatch, of_divergence, gkd)
    for context in (contextlib.nullcontext, integration.patched):
        # GKD on the answers of the data: its loss of sampled ones is divided by these' tokens.
        made = trainer(kind, 20, beta=0.5, **({"lmbda": 0.0} if kind == "GKD" else {}))
        with context():
            made.train()
        entries.append([e for e in made.state.log_history if "grad_norm" in e])
        assert len(calls) == (20 if context is integration.patched else 0)
    plain, ours = entries
    assert len(plain) == len(ours) == 20
    for name in logged:
        a, b = ([entry[name] for entry in of] for of in entries)
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5), name
    first, last = (sum(entry["loss"] for entry in part) for part in (ours[:4], ours[-4:]))
    assert last < 0.9 * first


@slow
@pytest.mark.parametrize("kind", ["Distillation", "GKD"])
def test_an_adapter_takes_the_cheap_way(trainer, monkeypatch, kind):
    """LoRA, whose head is frozen: 6 NHV, and the same gradients."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    calls = []
    for name in ("linear_divergence", "linear_divergence_frozen"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, n=name, op=op: calls.append(n) or op(*a))
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    seen = side_by_side(trainer(kind, 3, lora, beta=0.5))
    assert calls == ["linear_divergence_frozen"] * 3
    assert max(error for error, *_ in seen) < 1e-5


@slow
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("kind", ["Distillation", "GKD"])
def test_heads_are_given_all_columns_or_those_that_count(trainer, monkeypatch, kind, compact):
    """As on CUDA, where TRL leaves out what is masked: the same losses, in two steps."""
    import trl.trainer.distillation_trainer as distillation
    import trl.trainer.utils as utils

    for module in (distillation, utils):
        monkeypatch.setattr(module, "_use_triton", lambda device: compact)
    lengths, losses = [], []
    for module in (of_divergence, gkd):
        monkeypatch.setattr(
            module,
            "linear_divergence",
            lambda hidden, *a, **k: (
                lengths.append(len(hidden)) or linear_divergence(hidden, *a, **k)
            ),
        )
    for context in (contextlib.nullcontext, integration.patched):
        made = trainer(kind, 2, beta=0.5, **({"lmbda": 0.0} if kind == "GKD" else {}))
        with context():
            made.train()
        losses.append([entry["loss"] for entry in made.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    # Four sequences of up to seven tokens; four of prompt and answer, shifted.
    every = {"Distillation": 28, "GKD": 20}[kind]
    assert len(lengths) == 2 and (min(lengths) < every) is compact
    assert compact or lengths == [every, every]


@slow
def test_evaluation_of_gkd(trainer, monkeypatch):
    calls = counted(monkeypatch, gkd)
    made = trainer("GKD", 1, beta=0.5)
    made.eval_dataset = made.train_dataset
    plain = made.evaluate()["eval_loss"]
    assert not calls
    with integration.patched():
        assert made.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-5)
    assert calls
