"""LoRA on a head whose model engines share out: the gradients of ranks are those of one process."""

import pytest

pytest.importorskip("peft", reason="peft is not installed")


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("ddp", {}),
        ("fsdp1", {}),
        ("fsdp2", {"unit": "own"}),
        ("fsdp2", {"unit": "pair", "reshard": True}),
        ("fsdp2", {"unit": "root", "reshard": True}),
    ],
)
def test_the_step_is_that_of_one_process(ranks, engine, options):
    for error in ranks(2).run("cases_lora", "trained", engine=engine, **options):
        assert error < 3e-6


def test_a_head_in_parts_is_refused_with_the_way_out(ranks):
    for said in ranks(2).run("cases_lora", "refused"):
        spread, from_model, layer = said
        assert "spread over ranks takes no adapters: merge them into the weight" in spread
        assert "model_policy_loss" in from_model and "model_policy_loss" in layer
