"""Two CPU devices, so that every test of a mesh has more than one."""

import jax

jax.config.update("jax_num_cpu_devices", 2)
