"""Shared by all tests: their order, the tiny checkpoint, what needs a GPU. `run_ranks` is in tests/helpers/ranks.py."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
ORDER = (
    "unit",
    "dist",
    "parity",
    "system",
    "gpu",
)  # a mistake shows within seconds, not after the engines have started


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place)  # stable: within a folder the order of the files stays
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(pytest.mark.skip(reason="needs a GPU; this machine has none"))


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that prints, not xdist's workers
        config.pluginmanager.register(Failures(config))


class Failures:
    """Prints a failure when it happens, with its last line: a run that is ended before its summary still says what failed."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            lines = report.longreprtext.strip().splitlines() or [""]
            reason = next((line for line in reversed(lines) if line.startswith("E ")), lines[-1])
            terminal.write_line(f"\nFAILED at {report.when}: {report.nodeid}: {reason[:300]}")


def _place(item: pytest.Item) -> int:
    folder = item.path.relative_to(HERE).parts[0] if item.path.is_relative_to(HERE) else ""
    return ORDER.index(folder) if folder in ORDER else len(ORDER)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL checkpoint, untied, with random biases and norms (zeros and ones hide mistakes). Do not write to it."""
    from eureka_megatron.demo.forms import build_published

    return build_published(tmp_path_factory.mktemp("tiny") / "hf", randomize_all=True)


@pytest.fixture(scope="session")
def tied_tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the output layer tied to the embedding, as in the 3B model."""
    from eureka_megatron.demo.forms import build_published

    return build_published(tmp_path_factory.mktemp("tiny-tied") / "hf", tied=True, randomize_all=True)
