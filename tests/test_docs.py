"""The pages: their blocks run, their tables are what code and results say, their links lead on."""

import copy
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace

import parity
import pytest
import torch
from tiny_models import qwen2

import fused_rl
from fused_rl.integrations import liger, transformers, trl, verl
from fused_rl.study import command
from fused_rl.study.exact_enumeration import DIVERGENCES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.glob("*.md")]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
SECTIONS = dict(
    re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXTS["docs/trainers.md"], re.DOTALL | re.M)
)


def script(path: str) -> ModuleType:
    """A script of the repository, as a module."""
    folder, name = (ROOT / path).parent, Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


def block(page: str, name: str) -> list[str]:
    """The lines between a page's marks."""
    return (
        TEXTS[page]
        .split(f"<!-- {name}:begin -->\n")[1]
        .split(f"\n<!-- {name}:end -->")[0]
        .splitlines()
    )


def python(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files_and_to_headings_that_are_there(page):
    outside = re.sub(r"```.*?```|`[^`\n]*`", "", TEXTS[page], flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", outside)
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in map(slug, headings), link


def test_every_picture_is_in_the_gallery_and_says_what_is_seen():
    """Those of docs/ and of the results. The words stand in for the picture."""
    shown = re.findall(r"!\[(.*?)\]\((.*?)\)", TEXTS["docs/gallery.md"])
    places = ("docs/**/*.svg", "docs/images/*.png", "bench/results/*.svg")
    pictures = [path for place in places for path in ROOT.glob(place)]
    assert sorted((DOCS / link).resolve() for _, link in shown) == sorted(pictures)
    for words, link in shown:
        assert 100 < len(words) < 500, link


@pytest.fixture(scope="module")
def generated() -> ModuleType:
    pytest.importorskip("pdoc")
    return script("docs/generate.py")


GENERATED = {
    "losses.md": ["losses", "levels", "ratios", "surrogates", "means"],
    "kl.md": ["kl", "exact", "optimum", "claims", "values", "gradients", "training", "peaks"],
    "study.md": list(command.NAMES),
    "distillation.md": ["distillation"],
    "preference.md": ["preference", "scores", "links"],
    "predictions.md": ["ranks"],
    "reference.md": ["names"],
}


@pytest.mark.parametrize(
    ("page", "name"), [(page, name) for page, names in GENERATED.items() for name in names]
)
def test_a_generated_table_is_what_the_code_says(generated, page, name):
    """`make docs` writes it."""
    assert {p: set(blocks) for p, blocks in generated.BLOCKS.items()} == {
        page: set(names) for page, names in GENERATED.items()
    }
    assert block(f"docs/{page}", name) == generated.BLOCKS[page][name]()


def test_every_named_loss_mean_and_ratio_has_a_row():
    rows = {
        row.split("`")[1]
        for name in ("losses", "means", "ratios")
        for row in block("docs/losses.md", name)[2:]
    }
    expected = {*fused_rl.losses.named.NAMES, *fused_rl.means.__all__, *fused_rl.ratios.__all__}
    assert rows == expected - {"Count"}


def test_the_names_elsewhere_are_those_of_the_peers():
    """Those that the parity tests run: loss_type of TRL and Liger, loss_mode of verl."""
    rows = [row.split(" | ") for row in block("docs/losses.md", "losses")[2:]]
    in_trl, in_verl = (
        {name for row in rows for name in re.findall(r'"(\w+)"', row[i])} for i in (-2, -1)
    )
    assert in_trl - {"sequence"} == set(parity.LOSS_TYPES)
    assert in_verl == set(verl.policy_losses) - {"bypass_mode"}


def result(name: str) -> dict:
    return json.loads((ROOT / "bench" / "results" / name).read_text())


def test_measured_tables_are_those_of_the_results_they_name(monkeypatch):
    """What the scripts write with --readme."""
    run, gpu = script("bench/run.py"), script("bench/gpu_readme.py")
    cpu = "epyc-turin-2c-bfloat16"
    content, where = result(f"{cpu}.json"), "../bench/results/"
    pictures = [f"{where}{cpu}-{kind}.svg" for kind in ("linear_logprobs", "grpo_step", "padding")]
    page = "docs/benchmarks.md"
    assert block(page, "bench") == run.table(content, f"{where}{cpu}.json")
    assert block(page, "curves") == run.curves(pictures)
    assert block("README.md", "summary") == run.summary(content, f"bench/results/{cpu}.json")
    card = "h100-bfloat16"
    of = gpu.as_now(result(f"{card}.json"), card)
    assert block(page, "gpu") == gpu.lines(of, f"{where}{card}.json")
    front = gpu.front_page(of, f"bench/results/{card}.json")
    assert block("README.md", "gpu") == front
    assert (ROOT / "bench" / "results" / f"{card}.svg").exists()
    of = f"{card}-divergence.json"
    assert block(page, "gpu-divergence") == gpu.divergences(result(of), where + of)
    step, of = script("bench/trl_step.py"), "trl-epyc-turin-2c.json"
    assert block(page, "trl") == step.table(result(of), where + of)
    asked, of = script("bench/asked.py"), "asked-epyc-turin-2c.json"
    assert block(page, "asked") == asked.page(result(of), where + of)
    for marks, end in (("divergence-32768", ""), ("divergence-151936", "-interrupted")):
        of = f"xeon-2c-bfloat16-{marks}{end}.json"
        assert block(page, marks) == run.table(result(of), where + of)
    rightness, of = script("bench/divergence_errors.py"), "divergence-errors.json"
    assert block(page, "divergence-errors") == rightness.table(result(of), where + of)
    filters, of = script("bench/grad_filter.py"), "grad-filter-epyc-turin-2c.json"
    page = "docs/filtered-gradients.md"
    assert block(page, "filter") == filters.page(result(of), where + of)


def test_the_status_has_the_ratios_of_the_result():
    """README and docs/benchmarks.md, "Status on GPUs": what was on, what is, and the best peer."""
    gpu, name = script("bench/gpu_readme.py"), "h100-bfloat16"
    of = gpu.as_now(result(f"{name}.json"), name)
    cases = {}
    for r in gpu.of_first_shape(of["records"]):
        if r["verdict"] == "right":
            cases.setdefault(r["name"], {})[r["provider"]] = f"{r['ratio_to_products']:.2f}"
    steps = ("grpo_step", "grpo_step_frozen", "grpo_step_half")
    ours = {"linear_logprobs": "fused_rl"} | dict.fromkeys(steps, "fused_rl linear_policy_loss")
    found = [(cases[case][f"{way}, before"], cases[case][way]) for case, way in ours.items()]
    peers = [
        min(x for way, x in cases[case].items() if not way.startswith(("fused_rl", "bare")))
        for case in ours
    ]
    page = " ".join((ROOT / "docs" / "benchmarks.md").read_text().split())
    (a, b), (c, d), (e, f), (g, h) = found
    assert (
        f"{a} to {b} without gradient, {c} to {d} for a GRPO step in one pass, {e} to {f} with a "
        f"frozen head, {g} to {h} with half the tokens masked."
    ) in page
    assert f"The best peers take {', '.join(peers[:3])} and {peers[3]} in these four cases" in page
    any_loss = cases["grpo_step"]["fused_rl linear_logprobs, before"]
    assert f"by default: {any_loss} to {cases['grpo_step']['fused_rl linear_logprobs']}." in page
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"the H100 {b} x the bare products without gradient and {d} x for a training" in readme
    assert f"take {peers[0]} x and {peers[1]} x." in readme


def test_scripts_write_where_their_marks_are(monkeypatch):
    for name, marks in {
        "run": ("bench", "curves"),
        "gpu_readme": ("gpu", "gpu-divergence"),
        "trl_step": ("trl",),
        "asked": ("asked",),
        "divergence_errors": ("divergence-errors",),
        "grad_filter": ("filter",),
    }.items():
        page = script(f"bench/{name}.py").PAGE.as_posix()
        for mark in marks:
            assert block(page, mark)
    for mark in ("summary", "gpu"):
        assert block(script("bench/gpu_readme.py").FRONT_PAGE.as_posix(), mark)


def test_a_setting_has_the_gradient_that_the_enumeration_finds():
    """Rows of "What a setting really does" beside the tables of every option."""
    options = {}
    for table in ("kl", "exact"):
        header, _, *rows = (row[2:-2].split(" | ") for row in block("docs/kl.md", table))
        options |= {tuple(row[:2]): dict(zip(header[2:], row[2:], strict=True)) for row in rows}
    settings = [row[2:-2].split(" | ") for row in block("docs/kl.md", "settings")[2:]]
    assert {row[0].split(",")[0] for row in settings} == {
        "fused_rl",
        "TRL 1.16",
        "verl 0.9.1",
        "OpenRLHF 0.11.2",
        "NeMo-RL 005a098",
        "NeMo-RL 006907a",
        "slime 00c2d6d",
    }
    for _, setting, where, ratio, kind, on_policy, off_policy in settings:
        found = options[where, ratio]
        assert (found[kind], found[f"{kind} off-policy"]) == (on_policy, off_policy), setting


def test_the_settings_of_ours_are_what_their_rows_say():
    for row in block("docs/kl.md", "settings")[2:]:
        who, setting, where, ratio, kind, *_ = row[2:-2].split(" | ")
        if who != "fused_rl":
            continue
        made = eval(setting.strip("`"), {**vars(fused_rl)})
        penalty = getattr(made, "kl", made)
        attached = " attached" if penalty.attached else " detached"
        of = f"{penalty.importance.value}{attached}" if penalty.importance else "none"
        if penalty.exact:
            assert (where, ratio) == ("loss, exact", of)
            assert DIVERGENCES[kind] == penalty.exact
            continue
        assert (where, ratio) == (f"loss, {penalty.level.value}", of)
        assert kind == (penalty.grad or penalty.value).name.lower()


def test_the_defaults_that_the_settings_name_are_the_peers():
    trl_config = pytest.importorskip("trl").GRPOConfig
    defaults = {f.name: f.default for f in trl_config.__dataclass_fields__.values()}
    assert defaults["use_bias_correction_kl"] is True and defaults["beta"] == 0
    assert defaults["importance_sampling_level"] == "token"
    configs = Path(pytest.importorskip("verl").__file__).parent / "trainer" / "config"
    assert "\nkl_loss_type: low_var_kl\n" in (configs / "actor" / "actor.yaml").read_text()
    trainer = (configs / "ppo_trainer.yaml").read_text()
    for line in ("gamma: 1.0", "lam: 1.0", "use_kl_in_reward: False", "kl_penalty: kl"):
        assert f"\n  {line}\n" in trainer


# Blocks of Python: all pages, and who runs each.
RUN_HERE = {"docs/kl.md", "docs/losses.md", "docs/filtered-gradients.md", "docs/distillation.md"}
RUN_HERE |= {"docs/preference.md", "docs/kept-sets.md"}


def test_every_block_of_python_is_run_by_a_test():
    with_python = {page for page in TEXTS if python(page)}
    # tests/test_distributed_docs.py runs those of docs/distributed.md, on two ranks.
    assert with_python == {*RUN_HERE, "README.md", "docs/trainers.md", "docs/distributed.md"}


@pytest.mark.parametrize("page", sorted(RUN_HERE))
def test_blocks_run(page):
    hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2000, 8)
    names = {"fused_rl": fused_rl, "hidden": hidden, "weight": weight.requires_grad_()}
    names |= {"labels": torch.randint(2000, (2, 5)), "ref_logprobs": torch.randn(2, 5)}
    names["logprobs"] = torch.randn(2, 5, requires_grad=True)
    names |= {"loss_mask": torch.ones(2, 5, dtype=torch.bool), "advantages": torch.randn(2)}
    names |= {"ref_hidden": torch.randn(2, 5, 4), "ref_weight": torch.randn(2000, 4)}
    names |= {"old_logprobs": torch.randn(2, 5), "rollout_logprobs": torch.randn(2, 5)}
    names |= {"input_ids": torch.randint(199, (2, 6)), "teacher_logprobs": torch.randn(2, 5)}
    names |= {"student": qwen2(199, seed=0), "teacher": qwen2(199, seed=1, hidden_size=32)}
    names |= {"model": qwen2(199, seed=0), "reference": qwen2(199, seed=1, hidden_size=32)}
    names |= {"head": names["model"].lm_head, "ref_head": names["reference"].lm_head}
    names |= {"desirable": torch.tensor([1, 0]), "mismatched": torch.tensor([0, 1])}
    for code in python(page):
        exec(code, names)
    if page == "docs/losses.md":
        assert names["named"] == names["same"]
        assert names["report"].tokens == len(names["errors"]) == 10
    elif page == "docs/filtered-gradients.md":
        assert weight.grad.isfinite().all() and weight.grad.any()
    elif page == "docs/kept-sets.md":
        assert names["kept"].tolist() == [*range(11, 17), 21, 22, -1, 24, 25, 26]
        assert names["cu_kept"].tolist() == [0, 0, 2, 3, 6, 6, 6, 8, 9, 10, 12]
        assert weight.grad[[11, 99, 5]].any(1).tolist() == [True, True, True]
        logprob = {5: SimpleNamespace(logprob=-0.5), 6: SimpleNamespace(logprob=-1.0)}
        done = SimpleNamespace(token_ids=[6], logprobs=[logprob], sampling_mask="mask")
        request = SimpleNamespace(prompt_token_ids=[1, 2], outputs=[done, done])
        names |= {"engine": SimpleNamespace(generate=lambda *_: [request]), "sampling": None}
        assert names["rollout"](["w1 w2"], None) == {
            "prompt_ids": [[1, 2], [1, 2]],
            "completion_ids": [[6], [6]],
            "logprobs": [[-1.0], [-1.0]],
            "sampling_mask": ["mask", "mask"],
        }
    elif page == "docs/preference.md":
        assert names["model"].lm_head.weight.grad.any()
        logits = names["model"](names["input_ids"]).logits[:, :-1]
        own = fused_rl.logprobs_from_logits(logits, names["labels"])
        score = 0.1 * (own.logprobs - names["ref_logprobs"]).sum(-1) - 0.01 * 5
        loss = -torch.nn.functional.logsigmoid(score[0] - score[1])
        torch.testing.assert_close(names["output"].loss, loss)
    elif page == "docs/distillation.md":
        assert names["student"].lm_head.weight.grad.any()
        assert not any(p.grad is not None for p in names["teacher"].parameters())
        s, t = (m(names["input_ids"]).logits[:, :-1] for m in (names["student"], names["teacher"]))
        s, t = torch.log_softmax(s / 2, -1), torch.log_softmax(t / 2, -1)
        soft = 4 * (t.exp() * (t - s)).sum(-1).mean()
        torch.testing.assert_close(names["soft"].loss, soft)
        assert names["stats"].logprobs.shape == (2, 9, 8) and float(names["loss"].detach()) > 0
    else:
        penalty, d = names["penalty"], names["logprobs"] - names["ref_logprobs"]
        torch.testing.assert_close(penalty, torch.expm1(-d) + d)
        (slope,) = torch.autograd.grad(penalty.sum(), names["logprobs"])
        torch.testing.assert_close(slope, d)
        assert names["output"].metrics["divergence"] > 0 and names["loss"].divergence.kind == 1


def test_the_report_on_the_page_is_that_of_its_picture():
    """But for its digits, which another machine may round otherwise."""
    example = re.search(r"```text\n(tokens .*?)\n```", TEXTS["docs/losses.md"], re.DOTALL)[1]
    found = str(script("docs/mismatch.py").report())
    shapes = [re.sub(r"[\d.+-]+(e-\d+)?", "#", text).split() for text in (example, found)]
    assert shapes[0] == shapes[1]


# The reference.


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    pytest.importorskip("pdoc")
    return script("docs/reference.py")


def test_every_public_name_is_in_the_reference_and_says_what_it_is(reference):
    found = reference.pages()
    public = {"fused_rl": fused_rl}
    public |= {f"fused_rl.{m.__name__.rpartition('.')[2]}": m for m in fused_rl.MODULES}
    folder = ROOT / "fused_rl" / "integrations"
    public |= {
        f"fused_rl.integrations.{path.stem}": None
        for path in folder.iterdir()
        if path.stem[0] != "_"
    }
    assert set(found) == {*public, "fused_rl.integrations"}
    for path, module in public.items():
        page = found[path]
        assert page.docstring
        names = page.members if module is None else dict.fromkeys(module.__all__)
        for name in names:
            doc = page.get(name)
            assert doc is not None, f"{path}.{name}"
            if doc.kind in ("function", "class") and name[0] != "_":
                assert doc.docstring, f"{path}.{name}"


class Anchors(HTMLParser):
    """The ids and the links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.ids, self.links = set(), set()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        given = dict(attrs)
        self.ids.add(given.get("id"))
        if tag == "a" and "href" in given:
            self.links.add(given["href"])


@pytest.mark.slow
def test_the_links_of_the_reference_lead_on(reference, tmp_path):
    pages = {
        path.resolve(): Anchors() for path in reference.build(tmp_path) if path.suffix == ".html"
    }
    for path, page in pages.items():
        page.feed(path.read_text())
    assert "linear_logprobs" in pages[(tmp_path / "fused_rl.html").resolve()].ids
    broken = []
    for path, page in pages.items():
        for link in page.links:
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            there = target in pages and (not anchor or anchor in pages[target].ids)
            if not there and not link.startswith("http"):
                broken.append((path.name, link))
    # pdoc links a method that is inherited, and shows it where it is defined.
    assert broken == [("trust_regions.html", "#TrustRegion.clipped")]


def blocks(section: str) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL)
    assert found
    return found


def dedented(text: str) -> str:
    """Without the indentation that an example has in a docstring."""
    return "\n".join(line.strip() for line in textwrap.dedent(text).splitlines())


@pytest.mark.parametrize(
    ("section", "module"),
    [
        ("I use TRL", trl),
        ("I use verl", verl),
        ("I use Liger", liger),
        ("I call transformers models", transformers),
    ],
)
def test_blocks_are_those_that_the_tests_of_the_module_run(section, module):
    for block in blocks(section):
        assert dedented(block).strip() in dedented(inspect.getdoc(module))


def test_every_section_is_tested():
    assert set(SECTIONS) == {
        "I have my own loop",
        "I use TRL",
        "I use verl",
        "I use Liger",
        "I call transformers models",
        "I take kernels from the Hub",
    }


@pytest.fixture
def rollouts():
    torch.manual_seed(0)
    input_ids = torch.randint(0, 61, (8, 12))
    completion_mask = torch.ones(8, 12, dtype=torch.bool)
    completion_mask[:, :5] = False
    completion_mask[::3, 9:] = False
    return input_ids, completion_mask, torch.rand(8)


@pytest.fixture
def model():
    return qwen2(61, seed=1).double()


def test_the_loop_takes_the_same_step_in_micro_batches_of_any_size(model, rollouts):
    (block,) = blocks("I have my own loop")
    names = {}
    exec(block, names)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.lm_head.weight += 0.1 * torch.randn_like(reference.lm_head.weight)
    before = model.lm_head.weight.detach().clone()
    found = []
    for micro_batch in (8, 2, 3):
        mine = copy.deepcopy(model)
        optimizer = torch.optim.SGD(mine.parameters(), lr=1.0)
        loss = names["grpo_step"](mine, reference, optimizer, *rollouts, micro_batch)
        found.append((loss, mine.lm_head.weight.detach()))
    assert not torch.equal(found[0][1], before)
    for loss, weight in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-9)
        torch.testing.assert_close(weight, found[0][1], rtol=1e-9, atol=1e-12)


def test_the_kernel_repository_loads(exported, tmp_path):
    (block,) = blocks("I take kernels from the Hub")
    (tmp_path / "DIR").symlink_to(exported, target_is_directory=True)
    code = (
        "import torch\n"
        "hidden, weight = torch.randn(3, 8), torch.randn(11, 8)\n"
        f"labels = torch.tensor([1, 2, 3])\n{block}\n"
        "assert stats.logprobs.shape == (3,)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
