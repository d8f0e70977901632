"""Settings of all tests: two CPU devices, checks of types and shapes, shared compiled programs."""

import atexit
import os
import shutil
import tempfile

# Set before JAX is imported. Worker processes and the programs that tests start inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling dominates the run time of small models: LLVM's expensive passes double it, and XLA's
# fusion emitters, which build each fused kernel by way of MLIR, double it again.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
) + os.environ.get("XLA_FLAGS", "")
os.environ.setdefault("GLIBC_TUNABLES", "")  # programs do not start twice (allocator.py)
if "XCLIP_JAX_CACHE" not in os.environ:
    os.environ["XCLIP_JAX_CACHE"] = models = tempfile.mkdtemp(prefix="xclip_jax_cache")
    atexit.register(shutil.rmtree, models, ignore_errors=True)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder = tempfile.mkdtemp(prefix="jax_cache")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest
from jaxtyping import install_import_hook

# Before the package is imported: each call checks the annotations, array shapes among them.
install_import_hook("xclip_jax", "type_checker.check")
pytest.register_assert_rewrite("browsing", "checkpoints", "launcher", "pickles")
jax.config.update("jax_num_cpu_devices", 2)
