"""What `grad_filter` leaves out, and what that saves: on the distribution of a trained model.

    python bench/grad_filter.py --checkpoint out/filter.pt --out bench/results/grad-filter.json
    python bench/grad_filter.py --readme bench/results/grad-filter.json     measures nothing

Random logits say nothing here: a filter lives off the peaks that training makes. So a small
transformer is trained first, on the sources of Python's standard library, in tokens of a byte-pair
encoding of its own; `--checkpoint` keeps it for the next time. Then tokens are sampled from it, and
one step under log-probs with advantages is timed in turns with the bare products (6 NHV), with and
without a filter, and its gradients compared with those in float64. Higher temperatures stand for
flatter policies.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sysconfig
from pathlib import Path

import torch
from run import replace_block
from torch import Tensor

import fused_rl
from fused_rl.bench.clock import Clock, interleaved
from fused_rl.bench.peers import eager
from fused_rl.bench.tasks import environment
from fused_rl.system.outputs import try_folder, write_json

VOCABULARY, WIDTH, LENGTH, BATCH = 32768, 512, 256, 4
FILTERS = (1e-3, 2.0**-12, 1e-4, 1e-5)
PAGE = Path("docs/filtered-gradients.md")
GROUP = fused_rl.ops.FILTER_ROWS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500, help="of training")
    parser.add_argument("--text", type=int, default=100_000, help="tokens of training text")
    parser.add_argument("--tokens", type=int, default=1024, help="of the measured step")
    parser.add_argument("--temperatures", default="0.7,1.0,1.5,2.0")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--checkpoint", type=Path, default=Path("out/grad-filter.pt"))
    parser.add_argument("--out", type=Path, default=Path("out/grad-filter.json"))
    parser.add_argument("--readme", type=Path, metavar="RESULT.json", help="measure nothing")
    args = parser.parse_args()
    if args.readme:
        link = os.path.relpath(args.readme.resolve(), PAGE.resolve().parent)
        replace_block(PAGE, "filter", page(json.loads(args.readme.read_text()), link))
        return
    try_folder(args.out.parent, args.out.name)
    corpus_ids = corpus(args.text)
    model = small_model()
    if args.checkpoint.exists():
        model.load_state_dict(torch.load(args.checkpoint))
    else:
        train(model, corpus_ids, args.steps)
        args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), args.checkpoint)
    records, tried = [], []
    for temperature in map(float, args.temperatures.split(",")):
        hidden, weight = states(model, corpus_ids, args.tokens, temperature)
        records += measure(hidden, weight, temperature, args.rounds)
        tried += [{"temperature": temperature, **r} for r in alternatives(hidden, weight)]
    content = {"environment": environment(), "steps": args.steps, "text": args.text}
    content["alternatives"] = tried
    write_json(args.out, {**content, "records": records})
    print("\n".join(table(records)))


def corpus(count: int) -> Tensor:
    """[count] tokens of Python's standard library, encoded by byte pairs learnt on all of it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    texts = [f.read_text(errors="ignore") for f in files if "site-packages" not in f.parts]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=alphabet,
        show_progress=False,
        special_tokens=["<end>"],
    )
    tokenizer.train_from_iterator(texts, trainer)
    found: list[int] = []
    for text in texts[:: max(1, len(texts) // 200)]:
        found += [*tokenizer.encode(text).ids, 0]
    return torch.tensor(found[:count])


def small_model() -> torch.nn.Module:
    """A transformer of three layers, as initialised."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).float()


def train(model: torch.nn.Module, corpus_ids: Tensor, steps: int) -> None:
    """Next-token prediction, through linear_logprobs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    warm_up = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: min(1.0, (n + 1) / warm_up) * (0.525 + 0.475 * math.cos(math.pi * n / steps)),
    )
    for step in range(steps):
        text = windows(corpus_ids, BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(text[:, :-1]).last_hidden_state
            stats = fused_rl.linear_logprobs(hidden, model.lm_head.weight, text[:, 1:])
        loss = -stats.logprobs.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            entropy = stats.entropy.mean().item()
            print(f"step {step + 1}: loss {loss.item():.2f}, entropy {entropy:.2f}", flush=True)


def windows(corpus_ids: Tensor, count: int) -> Tensor:
    """[count, LENGTH + 1], each from anywhere in the text."""
    starts = torch.randint(0, len(corpus_ids) - LENGTH - 1, (count,))
    return torch.stack([corpus_ids[s : s + LENGTH + 1] for s in starts])


@torch.no_grad()
def states(
    model: torch.nn.Module, corpus_ids: Tensor, tokens: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """hidden [tokens, H], its logits divided by the temperature, and the head, in bfloat16."""
    torch.manual_seed(1)
    text = windows(corpus_ids, -(-tokens // LENGTH))
    hidden = model.model(text[:, :-1]).last_hidden_state.reshape(-1, WIDTH)[:tokens]
    return (hidden / temperature).bfloat16(), model.lm_head.weight.bfloat16()


def measure(hidden: Tensor, weight: Tensor, temperature: float, rounds: int) -> list[dict]:
    """One record for eager torch, one for the exact gradient, one for each filter."""
    p = torch.softmax(hidden.double() @ weight.double().T, -1)
    labels = torch.multinomial(p, 1)[:, 0]
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1).mean().item()
    upstream = torch.randn(len(labels)) / len(labels)
    leaves = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
    draw = -p * upstream[:, None].double()
    draw[torch.arange(len(labels)), labels] += upstream
    exact = (draw @ weight.double(), draw.T @ hidden.double())
    half = draw.bfloat16()

    def step(grad_filter: float | None) -> tuple[Tensor, ...]:
        stats = fused_rl.linear_logprobs(*leaves, labels, grad_filter=grad_filter)
        return torch.autograd.grad((stats.logprobs * upstream).sum(), leaves)

    def products() -> None:
        _ = hidden @ weight.T, half @ weight, half.T @ hidden

    def one_pass() -> tuple[Tensor, ...]:
        output = fused_rl.linear_policy_loss(leaves[0][None], leaves[1], batch, fused_rl.dapo())
        return torch.autograd.grad(output.loss, leaves)

    ones = torch.ones(1, len(labels), dtype=torch.bool)
    batch = fused_rl.TokenBatch.padded(labels[None], ones, upstream[None] * len(labels))

    def eager_step() -> tuple[Tensor, ...]:
        return torch.autograd.grad((eager(*leaves, labels)[0] * upstream).sum(), leaves)

    ways = {"eager torch": eager_step, "exact": lambda: step(None)}
    ways |= {f"{f:.1e}": lambda f=f: step(f) for f in FILTERS}
    runs = {"products": products, "one pass": one_pass, **ways}
    seconds = interleaved(runs, rounds, Clock(hidden.device))
    records = []
    for name, run in ways.items():
        errors = [relative(a, b) for a, b in zip(run(), exact, strict=True)]
        kept = torch.ones_like(p, dtype=torch.bool)
        if name not in ("eager torch", "exact"):
            kept = pairs_that_take_part(p, labels, float(name))
        records.append(
            {
                "temperature": temperature,
                "entropy": entropy,
                "way": name,
                "share_of_pairs": kept.double().mean().item(),
                "probability_left_out": (p * ~kept).sum(-1).mean().item(),
                "dhidden_error": errors[0],
                "dweight_error": errors[1],
                "milliseconds": median(seconds[name]) * 1e3,
                "ratio_to_products": ratio(seconds[name], seconds["products"]),
                "ratio_to_one_pass": ratio(seconds[name], seconds["one pass"]),
            }
        )
    return records


def alternatives(hidden: Tensor, weight: Tensor) -> list[dict]:
    """Errors of dhidden and dweight, in float64, by what happens to the probability left out.

    dropped: what grad_filter does. group mean: it is spread evenly over its group of entries.
    kept entries: it goes to those that are kept, in proportion. labels' mean: dhidden as if it
    were at the mean of the rows of the batch's labels.
    """
    h, w = hidden.double(), weight.double()
    p = torch.softmax(h @ w.T, -1)
    rows, labels = torch.arange(len(p)), torch.multinomial(p, 1)[:, 0]
    upstream = torch.randn(len(p), dtype=torch.float64)[:, None] / len(p)
    picked = torch.zeros_like(p).index_put((rows, labels), p.new_ones(()))
    draw = upstream * (picked - p)
    exact = (draw @ w, draw.T @ h)
    found = []
    for f in FILTERS:
        kept = pairs_that_take_part(p, labels, f)
        lost = p * ~kept
        spread = torch.cat([g.mean(1, True).expand_as(g) for g in lost.split(GROUP, 1)], 1)
        proportional = p * kept / (1 - lost.sum(1, True))
        ways = {
            "dropped": draw * kept,
            "group mean": draw * kept - upstream * spread,
            "kept entries": upstream * (picked - proportional),
        }
        errors = {
            way: (relative(d @ w, exact[0]), relative(d.T @ h, exact[1])) for way, d in ways.items()
        }
        shifted = ways["dropped"] @ w - upstream * lost.sum(1, True) * w[labels].mean(0)
        errors["labels' mean"] = (relative(shifted, exact[0]), errors["dropped"][1])
        found += [
            {"grad_filter": f, "way": way, "dhidden_error": a, "dweight_error": b}
            for way, (a, b) in errors.items()
        ]
    return found


def pairs_that_take_part(p: Tensor, labels: Tensor, grad_filter: float) -> Tensor:
    """[N, V]: whether an entry's group holds the token's label, or one of that probability."""
    likely = torch.stack([group.amax(1) >= grad_filter for group in p.split(GROUP, 1)], 1)
    likely[torch.arange(len(labels)), labels // GROUP] = True
    return likely.repeat_interleave(GROUP, 1)[:, : p.shape[1]]


def ratio(seconds: list[float], base: list[float]) -> float:
    """The median over the rounds."""
    return median([a / b for a, b in zip(seconds, base, strict=True)])


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def median(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).median().item()


def table(records: list[dict]) -> list[str]:
    """Markdown, as on the page."""
    lines = [
        "| entropy, nats | grad_filter | pairs kept | probability left out | dhidden error "
        "| dweight error | x products (6 NHV) | x exact in one pass |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        lines.append(
            f"| {r['entropy']:.2f} | {r['way']} | {r['share_of_pairs']:.0%} "
            f"| {r['probability_left_out']:.1e} | {r['dhidden_error']:.0e} "
            f"| {r['dweight_error']:.0e} | {r['ratio_to_products']:.2f} "
            f"| {r['ratio_to_one_pass']:.2f} |"
        )
    return lines


def page(content: dict, link: str) -> list[str]:
    """The lines between the page's marks."""
    where = content["environment"]
    return [
        f"A transformer of three layers (H = {WIDTH}, V = {VOCABULARY}) trained for "
        f"{content['steps']} steps on {content['text']} tokens of Python's standard library; "
        "tokens sampled from it at temperatures that give these entropies; bfloat16, on "
        f"{where['threads']} cores of an {where['cpu']} ([{Path(link).name}]({link}), "
        "`python bench/grad_filter.py`). Errors are those of the gradients against float64.",
        "",
        *table(content["records"]),
    ]


if __name__ == "__main__":
    main()
