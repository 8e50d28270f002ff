"""The command line."""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_rl
from fused_rl import cli, ops
from fused_rl.ops import trust
from fused_rl.system import commands


def test_doctor_names_every_backend_and_version(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for backend in fused_rl.backends():
        assert backend.device in printed and backend.kernel in printed and backend.note in printed
    assert fused_rl.__version__ in printed and torch.__version__ in printed
    assert f"threads       {torch.get_num_threads()}\n" in printed


def test_doctor_says_what_first_uses_have_shown(capsys, monkeypatch):
    shown = [
        trust.Verdict("NVIDIA H200", "kl", None),
        trust.Verdict("NVIDIA H200", "linear_logprobs", "result 0 is nan from plain torch"),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops.triton, "check_every_kernel", lambda: shown)
    monkeypatch.setattr(trust, "verdicts", lambda: shown)
    assert cli.main(["doctor"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "NVIDIA H200, kl: right NVIDIA H200, linear_logprobs: result 0 is nan" in said
    assert "linear_logprobs is not used on NVIDIA H200: result 0 is nan" in said


def test_doctor_says_what_is_not_installed(capsys, monkeypatch):
    def version(name):
        raise cli.PackageNotFoundError(name)

    monkeypatch.setattr(cli, "version", version)
    assert cli.main(["doctor"]) == 0
    assert "transformers  not installed\n" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"fused-rl {fused_rl.__version__}\n"


def test_without_a_command_it_prints_its_help(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: fused-rl") and len(printed.splitlines()) < 25
    for command in ("doctor", "demo", "study", "mismatch", "bench", "plan", "export-hub"):
        assert f"\n    {command}" in printed


@pytest.mark.parametrize("command", ["demo", "study", "mismatch", "bench", "plan", "export-hub"])
def test_the_help_of_a_command_says_what_it_does(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    usage, description, *_ = capsys.readouterr().out.split("\n\n")
    assert f"fused-rl {command}" in usage
    assert description[0].isupper() and len(description.split()) > 10


def test_the_example_in_the_help_of_plan_runs(capsys, tmp_path):
    pytest.importorskip("rich")
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    (example,) = capsys.readouterr().out.split("example: fused-rl ")[1:]
    config = tmp_path / "config.json"
    config.write_text('{"hidden_size": 4096, "vocab_size": 151936}')
    assert cli.main(shlex.split(example.replace("config.json", str(config)))) == 0
    assert "linear_policy_loss" in capsys.readouterr().out


def test_demo_without_its_extra(capsys, monkeypatch):
    def find_spec(name, original=importlib.util.find_spec):
        return None if name in ("rich", "matplotlib") else original(name)

    monkeypatch.setattr(commands, "find_spec", find_spec)
    assert cli.main(["demo"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "rich, matplotlib" in error and 'pip install "fused-rl[demo]"' in error


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--steps", "0"], "must be positive, got 0"),
        (["--beta", "-1"], "not negative, got -1"),
        (["--beta", "nan"], "not negative, got nan"),
        (["--kl", "k4"], "k4"),
        (["--kl-grad", "k4"], "k4"),
        (["--seed", "1" + 20 * "0"], "must be from -2**63 to 2**64 - 1"),
    ],
)
def test_wrong_options(options, complaint, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo", *options])
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err


def test_demo_on_a_model_that_is_not_there(capsys, tmp_path):
    pytest.importorskip("fused_rl.demo.train", exc_type=ImportError)
    assert cli.main(["demo", "--model", str(tmp_path / "nowhere")]) == 2
    assert "must be a directory" in capsys.readouterr().err


def test_options_reach_the_demo_and_defaults_are_its_own(monkeypatch):
    demo = pytest.importorskip("fused_rl.demo.train", exc_type=ImportError)
    configs = []
    monkeypatch.setattr(demo, "run", lambda config: configs.append(config) or 0)
    assert cli.main(["demo"]) == 0
    options = "--steps 7 --seed 3 --beta 0.5 --kl k1 --kl-grad k2 --out there --model here"
    assert cli.main(["demo", *options.split()]) == 0
    assert configs == [
        demo.DemoConfig(),
        demo.DemoConfig(7, 3, 0.5, "k1", "k2", "there", "here"),
    ]


def test_plan_prints_every_way(capsys, tmp_path):
    pytest.importorskip("rich")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"text_config": {"hidden_size": 4096, "vocab_size": 151936}}))
    options = ["plan", "--model-config", str(config), "--tokens", "65536"]
    assert cli.main(options) == 0
    printed = capsys.readouterr().out
    assert "111.3 GiB" in printed and "linear_policy_loss" in printed
    in_half = "bfloat16" in ops.native.cpu_features()
    chunks = "79 chunks of 832" if in_half else "171 chunks of 384"
    assert f"chunk_bytes 256 MiB: {chunks} tokens" in printed
    assert cli.main([*options, "--chunk-bytes", str(2**24), "--dtype", "float32"]) == 0
    assert "takes two passes" in capsys.readouterr().out


def test_plan_of_what_is_no_config(capsys, tmp_path):
    pytest.importorskip("rich")
    config = tmp_path / "config.json"
    for text, complaint in (("{}", "must have vocab_size"), ("no", "Expecting value")):
        config.write_text(text)
        assert cli.main(["plan", "--model-config", str(config), "--tokens", "8"]) == 2
        assert complaint in capsys.readouterr().err
    assert cli.main(["plan", "--model-config", str(tmp_path / "none"), "--tokens", "8"]) == 2
    assert "none" in capsys.readouterr().err


def test_export_hub_names_what_it_wrote(capsys, monkeypatch, tmp_path):
    from fused_rl.integrations import hub

    monkeypatch.setattr(hub, "export", lambda directory: [directory / "build" / "torch-cpu"])
    assert cli.main(["export-hub", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'build' / 'torch-cpu'}\n"


def test_export_hub_says_why_not(capsys, tmp_path):
    (tmp_path / "mine").touch()
    assert cli.main(["export-hub", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == f"fused-rl export-hub: DIR must be new or empty, and {tmp_path} is not\n"
    assert cli.main(["export-hub", str(tmp_path / "mine" / "below")]) == 2
    assert "Not a directory" in capsys.readouterr().err


def shell(line: str) -> subprocess.CompletedProcess:
    """A line of bash, in which $F is this command; its status is that of the command."""
    code = "import sys, fused_rl.cli as c; sys.exit(c.main())"
    line = line.replace("$F", f"{shlex.quote(sys.executable)} -c '{code}'")
    return subprocess.run(
        ["bash", "-c", line + "; exit ${PIPESTATUS[0]}"],
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("command", ["doctor", "plan --model-config CONFIG --tokens 9"])
def test_a_reader_that_has_seen_enough_is_not_complained_of(command, tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"hidden_size": 8, "vocab_size": 99}')
    done = shell(f"$F {command.replace('CONFIG', str(config))} | true")
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_for_which_there_is_no_room():
    done = shell("$F doctor > /dev/full")
    assert done.returncode == 1
    assert done.stderr == "fused-rl: cannot write to stdout: No space left on device\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_stopped_says_so_by_its_status_alone(
    number, status, capsys, monkeypatch, tmp_path
):
    from fused_rl.integrations import hub

    monkeypatch.setattr(hub, "package_sources", lambda: os.kill(os.getpid(), number))
    assert cli.main(["export-hub", str(tmp_path / "export")]) == status
    assert capsys.readouterr() == ("", "")


def test_a_result_that_cannot_be_written_after_all(capsys, monkeypatch, tmp_path):
    pytest.importorskip("rich")
    from fused_rl.bench import run
    from fused_rl.system import outputs

    def unwritable(config):
        raise outputs.Unwritable("cannot write a.json: No space left on device")

    monkeypatch.setattr(run, "run", unwritable)
    assert cli.main(["bench"]) == 1
    assert capsys.readouterr().err == "fused-rl: cannot write a.json: No space left on device\n"


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_results_that_have_nowhere_to_go_are_a_mistake(command, capsys, tmp_path):
    pytest.importorskip("fused_rl.demo.train", exc_type=ImportError)
    (tmp_path / "file").touch()
    assert cli.main([command, "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert error == f"fused-rl {command}: results need a folder, and {tmp_path}/file is none\n"


def test_mistakes_are_one_printable_line(capsys):
    assert commands.usage_error("plan", "a\nb \x1b[31m" + "x" * 10**6) == 2
    error = capsys.readouterr().err
    assert error.startswith(r"fused-rl plan: a b \x1b[31mxxx") and len(error) < 500
    assert error.count("\n") == 1 and error[:-1].isprintable()
