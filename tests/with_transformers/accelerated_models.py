"""A pytest plugin for transformers' own tests: every causal LM that they build is accelerated.

`run.py` loads it with `-p accelerated_models`. It writes what became of each test, which `run.py` compares. A test that
needs a model or a tokenizer from the Hub is skipped, since there is none offline.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import GenerationMixin, PreTrainedModel

from latentmas_kernels import accelerate
from latentmas_kernels.hf import accelerated, decode

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
outcomes: dict[str, str] = {}
need_the_hub: set[str] = set()
loops = Counter({"all": 0, "engine": 0})
"""Calls of transformers' decoding loop for greedy search and sampling; those that ran on an engine; why others did not."""
NEEDS_THE_HUB = "needs the Hub"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, required=True, help="the file that is told what became of each test")
    parser.addoption("--plain", action="store_true", help="accelerate nothing")


def pytest_configure(config: pytest.Config) -> None:
    PreTrainedModel.__init__ = _with_silu(PreTrainedModel.__init__)
    if not config.getoption("--plain"):
        PreTrainedModel.post_init = _then_accelerate(PreTrainedModel.post_init)
        accelerated.decode = _counted(accelerated.decode)
        decode._Call.run = _engine_counted(decode._Call.run)
        decode.warn_once = _reason_counted(decode.warn_once)


def _with_silu(init: Callable[..., None]) -> Callable[..., None]:
    """Of these families the tests build models with GELU, which no released model of them has and no fast engine covers."""

    @functools.wraps(init)
    def init_with_silu(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if config.model_type in FAMILIES and config.hidden_act == "gelu":
            config.hidden_act = "silu"
        init(self, config, *args, **kwargs)

    return init_with_silu


def _then_accelerate(post_init: Callable[[Any], None]) -> Callable[[Any], None]:
    """The last call of a model's constructor, for the model that was asked for and for each that it is made of."""

    def post_init_and_accelerate(self: Any) -> None:
        post_init(self)
        if isinstance(self, GenerationMixin):
            accelerate(self)

    return post_init_and_accelerate


def _counted(run: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        loops["all"] += 1
        return run(*args, **kwargs)

    return counted


def _engine_counted(run: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        out = run(*args, **kwargs)
        loops["engine"] += 1
        return out

    return counted


def _reason_counted(warn_once: Callable[[str], None]) -> Callable[[str], None]:
    def counted(message: str) -> None:
        _, told, reason = message.partition("own loop, since ")
        if told:
            loops[reason] += 1
        warn_once(message)

    return counted


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed and call.excinfo is not None and _needs_the_hub(call.excinfo.value):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, NEEDS_THE_HUB)
    return report


def _needs_the_hub(error: BaseException | None) -> bool:
    """By the error or what it was raised from. transformers says in an OSError of its own that it cannot connect."""
    while error is not None:
        if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError) or "couldn't connect to" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """The worst that was said of a test: subtests that were skipped do not count, and an expected failure is a skip."""
    if report.when == "call" or not report.passed:
        worst = ("failed", "passed", "skipped")
        outcomes[report.nodeid] = min(outcomes.get(report.nodeid, "skipped"), report.outcome, key=worst.index)
        if report.skipped and isinstance(report.longrepr, tuple) and report.longrepr[2] == NEEDS_THE_HUB:
            need_the_hub.add(report.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Adds up what a process of pytest-xdist counted."""
    loops.update(getattr(node, "workeroutput", {}).get("loops", {}))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    workeroutput = getattr(session.config, "workeroutput", None)
    if workeroutput is not None:
        workeroutput["loops"] = dict(loops)
    else:
        text = json.dumps({"outcomes": outcomes, "need_the_hub": len(need_the_hub), "loops": loops})
        session.config.getoption("--outcomes").write_text(text)
