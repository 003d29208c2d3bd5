"""Run checks and report findings, for methods, adapters and deltas alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mergebench.errors import MergebenchError

OK, SKIPPED = "ok", "-"


class Inapplicable(Exception):
    """The check does not apply, and why."""


class Broken(AssertionError):
    """A check fails: a mark and a sentence."""

    def __init__(self, mark: str, why: str) -> None:
        super().__init__(why)
        self.mark = mark


class Finding(NamedTuple):
    """The result of one check: `mark` is `ok`, `-` (does not apply) or a few words on the fault; `why` is a
    sentence."""

    check: str
    mark: str
    why: str = ""

    @property
    def failed(self) -> bool:
        return self.mark not in (OK, SKIPPED)


class Report(NamedTuple):
    """All findings about one method, adapter or delta kind, in the order of its checks."""

    name: str
    package: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not any(finding.failed for finding in self.findings)


def find(check: str, run: Callable[[], object]) -> Finding:
    """Run a check; any exception is a finding, since another package's code may raise anything."""
    try:
        run()
    except Inapplicable as reason:
        return Finding(check, SKIPPED, str(reason))
    except Broken as broken:
        return Finding(check, broken.mark, str(broken))
    except AssertionError as broken:
        return Finding(check, "wrong", str(broken))
    except Exception as error:
        return Finding(check, "error", words(error))
    return Finding(check, OK)


def words(error: Exception) -> str:
    """An error in one line."""
    return error.message if isinstance(error, MergebenchError) else f"{type(error).__name__}: {error}"
