"""A pytest fixture that turns the audit of a training step into a test.

    def test_my_step(audit_step):
        audit_step(my_step)                       # fails with the recovered weights if it is a FAULT
        assert audit_step(other, fail=False).verdict == "FAULT"

``my_step(model, optimizer, microbatches)`` is the same function as for ``truestep audit FILE.py:my_step``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from truestep.audit.measure.findings import Finding, Verdict, cause


@pytest.fixture
def audit_step() -> Callable[..., Finding]:
    """Return a function that judges a step function. Unless ``fail`` is False, it raises the step's own
    errors, and the test fails if the update depends on how a batch is split (neither RIGHT nor DEFAULT)."""

    def audit(step: Callable[..., Any], *, fail: bool = True, **options: Any) -> Finding:
        from truestep.audit.environments.in_process import audit_function, subject_module
        from truestep.audit.present.words import as_text, row_of

        with subject_module("harness").Attempt() as attempt:
            finding = audit_function(step, **options)
        if (error := attempt.error) is not None:
            if fail:
                raise error
            why = cause("", "said", text=f"{type(error).__name__}: {error}")
            finding = Finding(subject=getattr(step, "__qualname__", "step"), reasons=(why,))
        if fail and finding.verdict not in (Verdict.RIGHT, Verdict.DEFAULT):
            pytest.fail(as_text(row_of(finding)), pytrace=False)
        return finding

    return audit
