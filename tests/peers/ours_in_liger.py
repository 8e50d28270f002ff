"""A plugin for pytest: our functions in the place of Liger's, before its tests are imported."""

import importlib

import liger_kernel.chunked_loss as chunked
import liger_kernel.chunked_loss.functional as functional
import liger_kernel.ops as ops
import liger_kernel.transformers as modules
import liger_kernel.transformers.functional as by_name
import liger_kernel.transformers.grpo_loss as logits
from liger_kernel.chunked_loss import jsd_loss
from swap import swap

from fused_rl.integrations import liger
from fused_rl.integrations.liger.jsd import ChunkedJSDFunction

PAIRS = (
    (chunked.LigerFusedLinearGRPOLoss, liger.LigerFusedLinearGRPOLoss),
    (functional.liger_fused_linear_grpo, liger.liger_fused_linear_grpo),
    (logits.triton_grpo_loss, liger.triton_grpo_loss),
    (logits.fused_selective_log_softmax, liger.fused_selective_log_softmax),
    (chunked.LigerFusedLinearJSDLoss, liger.LigerFusedLinearJSDLoss),
    (jsd_loss.LigerFusedLinearJSDFunction, ChunkedJSDFunction),
    (functional.liger_fused_linear_jsd, ChunkedJSDFunction.apply),
    (modules.LigerFusedLinearJSD, liger.LigerFusedLinearJSD),
    (ops.LigerFusedLinearJSDFunction, liger.LigerFusedLinearJSDFunction),
    (modules.LigerFusedLinearKLDivLoss, liger.LigerFusedLinearKLDivLoss),
    (ops.LigerFusedLinearKLDivFunction, liger.LigerFusedLinearKLDivFunction),
    (by_name.liger_fused_linear_kl_div, liger.liger_fused_linear_kl_div),
)
for theirs, ours in PAIRS:
    swap("liger_kernel", theirs, ours)
for name in ("DPO", "CPO", "SimPO", "ORPO", "KTO"):
    module = importlib.import_module(f"liger_kernel.chunked_loss.{name.lower()}_loss")
    by_its_name = f"liger_fused_linear_{name.lower()}"
    swap("liger_kernel", getattr(functional, by_its_name), getattr(liger, by_its_name))
    for kind in ("Loss", "Function"):
        theirs = f"LigerFusedLinear{name}{kind}"
        swap("liger_kernel", getattr(module, theirs), getattr(liger, theirs))


class OnAnyDevice:
    """Liger's function for devices without a kernel: the same, without m_tiles_per_cluster."""

    @staticmethod
    def apply(_input, weight, target, temperature, ignore_index, return_entropy, ids=None):
        given = (_input, weight, target, temperature, ignore_index, 1, return_entropy, ids)
        return liger.LigerFusedLinearScaledCrossEntropyFunction.apply(*given)


def pytest_collection_finish(session) -> None:
    """Two test files use a module of Liger's loaded by its path, under a name of its own."""
    name = "LigerFusedLinearScaledCrossEntropyFunction"
    for item in session.items:
        frontend = getattr(item.module, "_FRONTEND", None)
        if frontend is not None:
            setattr(frontend, name, getattr(liger, name))
            frontend._FusedLinearPPOFallbackFunction = OnAnyDevice
