"""What every test runs under: eight virtual CPU devices and a compilation cache that outlives the run; a browser."""

import ctypes
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from quick import QUICK_TO_COMPILE

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "jaxcost-test-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

_MANY_MAPPINGS = 20_000
_FOR_TPUS = {"test_context", "test_distillation", "test_planner", "test_planner_collectives", "test_planning"}
_FOR_TPUS |= {"test_planning_choices", "test_quantize_served", "test_shrink", "test_study"}
"""Files of which some tests compile for TPUs, with libtpu, which one process holds at a time."""


def pytest_configure(config):
    """Starts the CPU backend with flags of its own, since compiling is most of the tests' time.

    They are taken back at once: compilers for other chips read the same variable and know not all of them.
    """
    gc.set_threshold(100_000, 50, 100)  # tracing makes many objects that live on
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        import jax

        flags = os.environ["XLA_FLAGS"]
        os.environ["XLA_FLAGS"] = f"{QUICK_TO_COMPILE} {flags}"
        jax.devices()
        os.environ["XLA_FLAGS"] = flags


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Of several workers, one runs all tests of a file, and of slow or long ones one all that compile for TPUs."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::", 1)[0]
            late = config.option.markexpr in ("slow and not long", "long")
            return "tpu" if late and Path(file).stem in _FOR_TPUS else file

    return ByFile(config, log)


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Forgets the compiled programs between files where there are many of them.

    Each takes some ten memory mappings, of which Linux allows a process 65,530; when they run out, XLA ends the process
    with a segmentation fault.
    """
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and len(mappings.read_bytes().splitlines()) > _MANY_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # hands back what was freed


@pytest.fixture(scope="session")
def chromium():
    """The system's Chromium without a window, for tests of the selection `browser`."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("google-chrome")
    assert found, "There is no Chromium on the path; run `bash scripts/test.sh browser`, which gets it."
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """An empty page, of Playwright, that reaches nothing but this machine; an error in its scripts fails the test."""
    here, errors = ("http://127.0.0.1:", "file:", "data:", "blob:"), []
    context = chromium.new_context()
    context.route(lambda url: not url.startswith(here), lambda route: route.abort())
    made = context.new_page()
    made.set_default_timeout(20_000)
    made.on("pageerror", lambda error: errors.append(error))
    yield made
    context.close()
    assert not errors
