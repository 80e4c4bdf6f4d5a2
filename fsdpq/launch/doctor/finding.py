"""What the doctor says about one thing."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: the group that it belongs to, ``software``.
        name: the thing itself, unique within the subject.
        status: ``ok``, ``warn`` (training works, something does not) or ``fail`` (it cannot work).
        value: what was found.
        remedy: one action that the user can take; empty where nothing is wrong. With ``ok`` it is
            what a package that is not needed would be installed with.

    Raises:
        ValueError: something is wrong and there is no remedy.
    """

    subject: str
    name: str
    status: str
    value: str
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.status != OK and not self.remedy:
            raise ValueError(f"the finding `{self.name}` has no remedy")
