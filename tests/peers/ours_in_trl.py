"""A plugin for pytest: TRL's trainers on our head."""

from fused_rl.integrations import trl

trl.patch()
