"""Imported, or as a plugin of pytest (-p without_gluon): nothing takes the forward in Gluon.

For a GPU on which gpu_probe.py says that the kernel does not end, or fails.
"""

from fused_rl.kernels import configs

for table in configs.CONFIGS.values():
    table[:] = [config for config in table if not config.gluon]
