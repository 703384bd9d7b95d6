"""Start and end vLLM's engine: settings, environment, signals."""

import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil
import torch

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.fingerprint import ModelFingerprint

TESTED = "0.32"
"""The version of vLLM that the tests run with: the connector interface still changes between versions."""
REFUSED = {
    "data_parallel_size": "texts would go to one of the replicas only",
    "hf_overrides": "it would not be the model that thinks",
    "revision": "it may not be the model that thinks; put that revision into a folder and name it with --model",
}


def check_installed() -> None:
    """Raise LatentMASError where vLLM is not installed. This does not import it."""
    if find_spec("vllm") is None:
        raise LatentMASError("vLLM is not installed here; docs/vllm.md says how to make an environment with it")


def kv_config(stamp: ModelFingerprint, folder: Path, *, owner: int | None = None) -> dict[str, Any]:
    """Return vLLM's kv_transfer_config for `LatentConnector`.

    Args:
        owner: id of the process that starts vLLM, with which vLLM is to end.
    """
    extra = {"folder": str(folder), "fingerprint": stamp.fingerprint, **({} if owner is None else {"owner": owner})}
    return {
        "kv_connector": "LatentConnector",
        "kv_connector_module_path": "latentmas.backends.connector",
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": extra,
    }


def environment() -> dict[str, str]:
    """Return environment variables for vLLM's processes; those that the user has set take precedence."""
    defaults = {"VLLM_NO_USAGE_STATS": "1"}
    if not torch.cuda.is_available():
        # Without it several thread pools spin on the same cores: the first request took 17 s instead of 3 on two.
        defaults["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        # In GiB. By default vLLM takes all free memory, and the chain needs some of it.
        defaults["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, min(8, psutil.virtual_memory().available >> 32)))
    return defaults


def start_engine(name: str, dtype: torch.dtype, transfer_config: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """Start and return vLLM's LLMEngine.

    Args:
        name: folder or hub name of the model.
        transfer_config: engine settings that let it take KV files or embeddings.
        settings: EngineArgs of the user.

    Raises:
        LatentMASError: where vLLM is not installed, or cannot run this model or these settings.
    """
    check_installed()
    # Standard output is for the chain's answers.
    defaults = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr", **environment()}
    for variable, value in defaults.items():
        os.environ.setdefault(variable, value)
    # vLLM is optional, and takes seconds to import: here and in the functions below.
    import vllm
    from vllm import EngineArgs, LLMEngine
    from vllm.distributed.kv_transfer import has_kv_transfer_group
    from vllm.platforms import current_platform

    if not vllm.__version__.startswith(f"{TESTED}."):
        warnings.warn(f"vLLM {vllm.__version__} is here; this was tested with {TESTED}", stacklevel=3)
    if has_kv_transfer_group():
        raise LatentMASError(
            "there is an engine with a connector in this process, and vLLM has one at most; close it first"
        )
    # The cache hits of every answer are checked, so statistics are on.
    given = {"model": name, "dtype": str(dtype).removeprefix("torch."), "disable_log_stats": False, **transfer_config}
    _check_settings(given, settings)
    if current_platform.is_cpu():  # compiling for a CPU takes minutes
        settings = {"enforce_eager": True, **settings}
    engine = None
    try:
        with _interruptible():
            config = EngineArgs(**given, **settings).create_engine_config()
            if config.kv_transfer_config is not None:
                from latentmas.backends.vllm.connector import check_supported  # imports vLLM

                check_supported(config)  # here, too: an exception of another process arrives without its text
            engine = LLMEngine.from_vllm_config(config)
            engine.get_supported_tasks()  # the first request would ask for them, before `_watch` could wake it up
    except TypeError as error:  # an unknown setting
        raise LatentMASError(f"vLLM does not take these settings: {error}") from error
    except (ValueError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise LatentMASError(f"vLLM did not start: {lines[0]} (more in its log above)") from error
    finally:
        if engine is None:
            _forget_connector()
    _watch(engine)
    return engine


def end_engine(engine: Any) -> None:
    """End the engine's processes."""
    engine.engine_core.shutdown()
    _forget_connector()


def _forget_connector() -> None:
    """Drop the connector of an engine in this process: the next engine would use it."""
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown  # optional

    ensure_kv_transfer_shutdown()


def _check_settings(given: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    taken = sorted(given.keys() & settings.keys())
    if taken:
        raise LatentMASError(
            f"got {', '.join(taken)} among the settings of vLLM, which are set by the chain; leave them out"
        )
    for setting, why in REFUSED.items():
        if settings.get(setting) not in (None, 1):
            raise LatentMASError(f"got {setting} {settings[setting]!r} among the settings of vLLM: {why}")
    if settings.get("load_format") == "dummy":
        raise LatentMASError("got load_format 'dummy' among the settings of vLLM: its weights would be random")


class _Interrupted(BaseException):
    """Ctrl-C as an exception that vLLM does not catch."""


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the block: vLLM swallows KeyboardInterrupt as it starts, then waits for a process that has ended."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def interrupt(*_: Any) -> None:
        raise _Interrupted

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except _Interrupted:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


def _watch(engine: Any) -> None:
    """Wake up the caller of `step` when vLLM's process is killed: vLLM notices that, and lets the caller wait for ever."""
    from vllm.v1.engine.exceptions import EngineDeadError  # optional

    core = engine.engine_core
    manager = getattr(getattr(core, "resources", None), "engine_manager", None)
    if manager is None:  # it runs in this process
        return

    def wake() -> None:
        connection.wait(manager.sentinels())
        core.resources.engine_dead = True  # the next request must not be sent and waited for
        core.outputs_queue.put(EngineDeadError())

    threading.Thread(target=wake, daemon=True, name="vllm-watch").start()
