"""The verdict of the audit on the step that a study was made with."""

from __future__ import annotations

import sys
from pathlib import Path

from truestep.audit import registry
from truestep.audit.formats import found_in_words
from truestep.audit.run import audit_one


def trainer_verdict() -> str:
    """truestep's own step, audited here and now in one process as any framework's: the verdict, and what was
    found."""
    (subject,) = (s for s in registry.TABLE if s.name == "truestep")
    finding = audit_one(subject, subject.configurations[0], Path(sys.executable))
    words = found_in_words(finding.to_json())
    return f"{finding.verdict}: {words}" if words else str(finding.verdict)
