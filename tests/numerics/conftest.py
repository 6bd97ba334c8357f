"""One thread, and a summary of the largest relative errors that were measured."""

from __future__ import annotations

import pytest
import step_cases
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if step_cases.LARGEST and terminalreporter.verbosity >= 0:  # pytest -v
        terminalreporter.section("largest relative errors")
        for family, (largest, count) in sorted(step_cases.LARGEST.items()):
            terminalreporter.write_line(f"{family:<40} {largest:8.1e}  in {count} comparisons")
