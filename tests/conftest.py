"""Test session: 8 virtual CPU devices, a persistent compilation cache, strict promotion, warnings are errors."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the tests' time: the CPU backend's optimisations would double it.
for _flag in ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"):
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
os.environ.setdefault(
    "PJRT_NPROC", "32"
)  # with a thread per core only, 8 devices that run ahead can wait for each other
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# The same examples in every run: a failure in CI is one that everybody sees.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "redco-like-test-cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "standard")


@pytest.fixture(scope="session", autouse=True)
def _eight_devices():
    if jax.device_count() < 8:
        raise RuntimeError(f"tests need 8 virtual CPU devices, found {jax.device_count()}")
