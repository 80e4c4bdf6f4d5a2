"""What an import says, in short: for comparing with one equality."""

from fsdpq.importing.result import ImportResult, Outcome


def told(result: ImportResult, outcome: Outcome) -> dict[str, int]:
    """Returns key -> line of the findings with ``outcome``."""
    return {f.key: f.location.line if f.location else 0 for f in result.of(outcome)}


def messages(result: ImportResult, key: str) -> list[str]:
    """Returns what is said about ``key`` of the source."""
    return [finding.message for finding in result.findings if finding.key == key]
