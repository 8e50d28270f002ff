"""Log-probs of the kinds of models and calls that people have: pictures, packed documents,
adapters, mixed precision, compiled models; and patched models that travel."""

import copy
import io
import pickle
import re
from itertools import pairwise

import pytest
import tiny_models
import torch
from test_asked import FOUND, odd
from test_integration_transformers import assert_close, build, gradients, naive, tokens
from test_models import gap, judged, stats_of
from torch import nn

from fused_rl import LMHead, TokenStats
from fused_rl.integrations.transformers import (
    backbone,
    logprobs,
    patch_model,
    patched,
    unpatch_model,
)


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


# A scale of the text that the outer model does not apply; softcaps of other names; tokens ruled
# out; a base_model that is the model itself; a muP divisor; a recurrent body; many axes.
RIGHT = (
    *("aya_vision", "cohere2_vision", "recurrent_gemma", "xlstm", "chameleon"),
    *("llama4_text", "mllama", "minicpm3", "mamba2", "qwen2_vl", "deepseek_v4"),
)


@pytest.mark.parametrize("kind", RIGHT)
def test_types_that_are_right(kind):
    verdict, why = judged(kind)
    assert verdict == "right", why


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("modernbert-decoder", r"also reads lm_head\.dense"),
        ("bert", r"also reads cls\.predictions\.transform"),
        ("roberta", r"also reads lm_head\.dense"),
        ("prophetnet", r"differ by up to"),
        ("kosmos-2.5", r"Kosmos2_5ForConditionalGeneration"),
        ("pix2struct", r"encoder-decoder"),
    ],
)
def test_types_that_are_refused(kind, why):
    verdict, message = judged(kind)
    assert verdict == "refused"
    assert re.search(why, message)


def picture(kind: str):
    """A model of several axes, its ids with a picture in them, and what belongs to it."""
    model = tiny_models.build(kind)
    vision, image = model.config.vision_config, model.config.image_token_id
    with torch.no_grad():
        # So that positions and the picture tell.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    count = 16 // vision.spatial_merge_size**2
    ids = torch.randint(20, 60, (2, 6 + count))
    ids[:, 2 : 2 + count] = image
    inputs = {
        "pixel_values": torch.randn(32, pixels),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (ids == image).int(),
    }
    return model, ids, inputs


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl", "glm4v"])
@torch.no_grad()
def test_models_that_form_their_own_positions(kind):
    """A mask does not override them, whether it pads or not, nor do those that generate forms."""
    model, ids, inputs = picture(kind)
    mask = torch.ones_like(ids)
    theirs = stats_of(model(input_ids=ids, attention_mask=mask, **inputs).logits, ids)
    without = model(input_ids=ids, position_ids=torch.arange(len(ids[0]))[None], **inputs).logits
    assert gap(stats_of(without, ids), theirs) > 0.01
    assert gap(logprobs(model, ids, **inputs), theirs) < 2e-5
    assert gap(logprobs(model, ids, attention_mask=mask, **inputs), theirs) < 2e-5
    positions = model._prepare_position_ids_for_generation(
        ids, {"attention_mask": mask, **copy.copy(inputs)}
    )
    assert gap(logprobs(model, ids, position_ids=positions, **inputs), theirs) < 2e-5
    padded = nn.functional.pad(ids, (3, 0))
    inputs["mm_token_type_ids"] = nn.functional.pad(inputs["mm_token_type_ids"], (3, 0))
    with patched(model):
        stats = model(
            input_ids=padded,
            attention_mask=nn.functional.pad(mask, (3, 0)),
            return_logprobs=True,
            **inputs,
        )
    assert gap(TokenStats(*(t[:, 3:] for t in stats)), theirs) < 2e-5


# Packed documents.


@pytest.mark.parametrize("by", ["position_ids", "axes", "cu_seq_lens_q", "seq_idx"])
@torch.no_grad()
def test_the_first_token_of_a_packed_document_is_scored_by_nothing(by):
    """Every other one as if its document were alone."""
    model, lengths = build("llama"), (4, 2, 3)
    ids = tokens(1, sum(lengths))
    starts = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    same = document[:, None, :, None] == document[:, None, None, :]
    mask = (same & torch.ones(9, 9, dtype=torch.bool).tril()).float().log()
    inputs = {"attention_mask": mask, "position_ids": positions}
    if by == "cu_seq_lens_q":
        # Positions that go on from document to document.
        inputs |= {"position_ids": torch.arange(9)[None], "cu_seq_lens_q": starts.int()}
    elif by == "seq_idx":
        inputs |= {"position_ids": torch.arange(9)[None], "seq_idx": document.int()}
    elif by == "axes":
        model, _, _ = picture("qwen2_vl")
        inputs["position_ids"] = positions.expand(3, 1, 9)
        ids = ids.clamp(max=60)
    stats = logprobs(model, ids, **inputs)
    for start, stop in pairwise(starts):
        row = slice(start, stop - 1)
        alone = logprobs(model, ids[:, start:stop])
        assert_close(TokenStats(*(t[:, row] for t in stats)), alone)
    for first in starts[1:-1]:
        assert not stats.logprobs[0, first - 1] and not stats.entropy[0, first - 1]


# Adapters.


def adapted(config):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "ia3" in name:
                parameter.normal_()
    return model.eval()


@pytest.mark.parametrize("kind", ["lora", "ia3", "dora"])
def test_adapters(kind):
    peft = pytest.importorskip("peft")
    lora = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
    config = {
        "lora": lambda: peft.LoraConfig(**lora),
        "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
        "ia3": lambda: peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    }[kind]()
    model, ids, weights = adapted(config), tokens(), torch.randn(3, 8)
    ours = gradients(model, logprobs(model, ids), weights)
    theirs = gradients(model, naive(model, ids), weights)
    assert ours.keys() == theirs.keys() != set()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        assert_close(logprobs(model, ids), naive(model, ids))
        with model.disable_adapter():
            assert_close(logprobs(model, ids), naive(model, ids))
        with patched(model):
            assert_close(model(input_ids=ids, return_logprobs=True), naive(model, ids))
        hidden = backbone(model)(ids).last_hidden_state
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(LMHead.from_model(model).logits(hidden), expected)


def test_patch_then_adapter():
    """peft passes return_dict and more."""
    peft = pytest.importorskip("peft")
    model, ids = patch_model(build("llama")), tokens()
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        assert_close(model(input_ids=ids, return_logprobs=True), naive(model, ids))


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompt_learning_is_refused(kind):
    peft = pytest.importorskip("peft")
    model = adapted(getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"PeftModelForCausalLM puts virtual tokens before"):
        logprobs(model, tokens())


def test_an_adapter_on_the_head_is_named_with_its_module():
    peft = pytest.importorskip("peft")
    model = adapted(peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"peft\.tuners\.ia3\.layer\.Linear .*merge the adapter"):
        LMHead.from_model(model)


# accelerate.


def prepared(model):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, PartialState

    for state in (AcceleratorState, PartialState):
        state._reset_state()
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    return accelerator, accelerator.prepare_model(model)


@torch.no_grad()
def test_mixed_precision_of_accelerate_is_followed():
    plain, ids = build("qwen2"), tokens()
    accelerator, model = prepared(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16):
        expected = logprobs(plain, ids)
    assert gap(expected, logprobs(plain, ids)) > 1e-3
    for stats in (logprobs(model, ids), logprobs(model, ids)):
        assert torch.equal(stats.logprobs, expected.logprobs)
    with patched(model):
        stats = model(input_ids=ids, return_logprobs=True)
        assert torch.equal(stats.logprobs, expected.logprobs)
    # Asked before it was prepared, and within an autocast.
    logprobs(plain, ids)
    _, model = prepared(plain)
    with accelerator.autocast():
        assert torch.equal(logprobs(model, ids).logprobs, expected.logprobs)
    assert torch.equal(logprobs(model, ids).logprobs, expected.logprobs)


def test_gradients_in_mixed_precision():
    """No weight that the question cast is found in autocast's cache, without its gradient."""
    ids, weights = tokens(), torch.randn(3, 8)
    _, model = prepared(build("qwen2"))
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(model, logprobs(model, ids), weights)
    assert ours.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("keep", [True, False])
@torch.no_grad()
def test_unwrapping_keeps_the_patch(keep):
    accelerator, model = prepared(patch_model(build("llama")))
    ids = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        expected = logprobs(model, ids).logprobs
    assert torch.equal(model(input_ids=ids, return_logprobs=True).logprobs, expected)
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=keep)
    stats = model(input_ids=ids, return_logprobs=True)
    assert type(stats) is TokenStats
    if not keep:
        assert_close(stats, naive(model, ids))
        assert "forward" not in vars(unpatch_model(model))


# Patched models.


def sent(model, how: str):
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@torch.no_grad()
def test_a_patched_model_travels(how):
    model, ids = patch_model(build("gemma2")), tokens()
    expected = model(input_ids=ids, return_logprobs=True)
    twin = sent(model, how)
    model.lm_head.weight.mul_(2)
    assert torch.equal(twin(input_ids=ids, return_logprobs=True).logprobs, expected.logprobs)
    assert not torch.equal(model(ids, return_logprobs=True).logprobs, expected.logprobs)
    assert torch.equal(twin(ids).logits, unpatch_model(twin)(ids).logits)


def asked_in_another_process(queue, model, ids):
    with torch.no_grad():
        queue.put(model(input_ids=ids, return_logprobs=True).logprobs.tolist())


@pytest.mark.slow
def test_a_patched_model_in_a_spawned_process():
    # By the name under which the other process finds it.
    from test_transformers_kinds import asked_in_another_process

    model, ids = patch_model(build("llama")), tokens()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=asked_in_another_process, args=(queue, model, ids))
    process.start()
    found = torch.tensor(queue.get(timeout=40))
    process.join()
    torch.testing.assert_close(found, logprobs(model, ids).logprobs.detach())


@torch.no_grad()
def test_what_trainers_pass_is_of_no_consequence():
    model, ids = build("llama"), tokens()
    expected = logprobs(model, ids).logprobs
    for further in ({"use_cache": True}, {"use_cache": False, "return_dict": False}):
        assert torch.equal(logprobs(model, ids, **further).logprobs, expected)
        with patched(model):
            stats = model(input_ids=ids, return_logprobs=True, **further)
        assert torch.equal(stats.logprobs, expected)


def test_tokens_must_be_named():
    model = patch_model(build("llama"))
    embeddings = model.get_input_embeddings()(tokens())
    with pytest.raises(ValueError, match="inputs_embeds alone do not name them"):
        model(inputs_embeds=embeddings, return_logprobs=True)


def test_wrappers_are_refused_with_the_way_out():
    wrapped = nn.DataParallel(build("llama"))
    for call in (patch_model, lambda m: logprobs(m, tokens())):
        with pytest.raises(ValueError, match=r"wraps a LlamaForCausalLM.*patch_model the model"):
            call(wrapped)


def test_a_hook_on_the_model_itself():
    """logprobs beside the model would not run it; the question does."""
    model = build("llama")
    logprobs(model, tokens())

    def doubled(module, args, output):
        output.logits = 2 * output.logits

    model.register_forward_hook(doubled)
    assert LMHead.from_model(model).scale == 2.0


# Compiled.


@pytest.mark.parametrize("first", [pytest.param(True, marks=pytest.mark.slow), False])
@torch.no_grad()
def test_compiled_models_are_asked_too(first):
    """While their graph is traced, or before."""
    model, ids = odd(**FOUND["a softcap of another name"]), tokens()
    model.double()
    expected = naive(model, ids).logprobs
    if first:
        logprobs(model, ids)
    compiled = torch.compile(
        lambda ids: logprobs(model, ids).logprobs, fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(ids), expected)


@pytest.mark.slow
@torch.no_grad()
def test_a_patched_model_that_is_compiled():
    model, ids = odd(**FOUND["a softcap of another name"]).double(), tokens()
    expected = naive(model, ids).logprobs
    wrapper = torch.compile(patch_model(model), fullgraph=True, backend="eager")
    torch.testing.assert_close(wrapper(input_ids=ids, return_logprobs=True).logprobs, expected)
    torch.testing.assert_close(logprobs(wrapper, ids).logprobs, expected)


@pytest.mark.slow
@torch.no_grad()
def test_two_models_in_one_compiled_function():
    ids = tokens()
    compiled = torch.compile(
        lambda model, ids: logprobs(model, ids).logprobs, fullgraph=True, backend="eager"
    )
    for scale in (8.0, 2.0):
        model = build("granite", logits_scaling=scale)
        torch.testing.assert_close(compiled(model, ids), logprobs(model, ids).logprobs)


# Sharded, offloaded.


@pytest.mark.parametrize("patch_first", [True, False])
def test_fully_sharded(patch_first):
    """Inside the model's own forward, in which its weights are whole; beside it, an error."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    model, ids, weights = build("llama"), tokens(), torch.randn(3, 8)
    expected = gradients(model, naive(model, ids), weights)
    model.zero_grad()
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        if patch_first:
            patch_model(model)
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
        patch_model(model)
        with pytest.raises(ValueError, match=r"DTensor, sharded over ranks"):
            logprobs(model, ids)
        found = gradients(model, model(input_ids=ids, return_logprobs=True), weights)
        found = {name: gradient.full_tensor() for name, gradient in found.items()}
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-3)
    finally:
        torch.distributed.destroy_process_group()


@torch.no_grad()
def test_offloaded():
    accelerate = pytest.importorskip("accelerate")
    model, ids = build("llama"), tokens()
    expected = naive(model, ids)
    for layer in model.model.layers:
        accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    assert_close(logprobs(model, ids), expected)
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    model = build("llama")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM's output embeddings is offloaded"):
        logprobs(model, ids)
