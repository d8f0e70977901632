"""Two CPU devices, so that a mesh has more than one; compiled programs shared between tests."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX comes in, and for the processes that tests start

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# Compiling is most of the work of small models: without LLVM's expensive passes it takes half.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    if not jax.config.jax_compilation_cache_dir:  # else JAX_COMPILATION_CACHE_DIR is set
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("jax_cache")))
