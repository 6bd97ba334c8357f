"""The verdict of the audit on the step that a study was made with."""

from __future__ import annotations

import sys
from pathlib import Path

from truestep.audit import subjects as registry
from truestep.audit.environments.launch import audit_one
from truestep.audit.present.words import found_in_words, row_of


def trainer_verdict() -> str:
    """truestep's own step, audited here and now in one process as any framework's: the verdict, and what was
    found."""
    (subject,) = (s for s in registry.TABLE if s.name == "truestep")
    finding = audit_one(subject, subject.configurations[0], Path(sys.executable))
    words = found_in_words(row_of(finding))
    return f"{finding.verdict}: {words}" if words else str(finding.verdict)
