"""A pytest fixture that turns the audit of a training step into a test.

    def test_my_step(audit_step):
        audit_step(my_step)                       # fails with the recovered weights unless it is right
        assert audit_step(other, fail=False).verdict == "FAULT"

``my_step(model, optimizer, microbatches)`` as in ``truestep audit FILE.py:my_step``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from truestep.audit.judge import Finding, Verdict


@pytest.fixture
def audit_step() -> Callable[..., Finding]:
    """Judge a step function; a verdict other than RIGHT fails the test unless ``fail`` is False."""

    def audit(step: Callable[..., Any], *, fail: bool = True, **options: Any) -> Finding:
        from truestep.audit.formats import as_text
        from truestep.audit.inside import audit_function

        finding = audit_function(step, **options)
        if fail and finding.verdict != Verdict.RIGHT:
            pytest.fail(as_text(finding.to_json()), pytrace=False)
        return finding

    return audit
