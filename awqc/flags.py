"""Debugging aids: each is an argument and an ``AWQC_*`` environment variable."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Flags:
    """How a pipeline runs, apart from what it computes.

    Args:
        skip: names of passes to leave out (``AWQC_SKIP=a,b``).
        dump: names of passes after which the graph text and its diff are written, or ``all``
            (``AWQC_DUMP``).
        dump_to: directory for the dumps (``AWQC_DUMP_TO``); None prints them to stderr.
        check: run the graph before and after every pass that promises an equal function (``AWQC_CHECK=0``
            turns it off).
    """

    skip: frozenset[str] = frozenset()
    dump: frozenset[str] = frozenset()
    dump_to: Path | None = None
    check: bool = True

    @staticmethod
    def from_environment() -> Flags:
        """The flags that the ``AWQC_*`` variables ask for."""
        folder = os.environ.get("AWQC_DUMP_TO")
        return Flags(
            skip=_names("AWQC_SKIP"),
            dump=_names("AWQC_DUMP"),
            dump_to=Path(folder) if folder else None,
            check=os.environ.get("AWQC_CHECK", "1") not in ("0", "false", "no"),
        )

    def wants(self, name: str) -> bool:
        """Whether the graph after the pass ``name`` is to be dumped."""
        return name in self.dump or "all" in self.dump

    def write(self, name: str, text: str, diff: str) -> None:
        """Dump one pass's result."""
        if self.dump_to is None:
            print(f"--- after {name}\n{diff or text}", file=sys.stderr)
            return
        self.dump_to.mkdir(parents=True, exist_ok=True)
        (self.dump_to / f"{name}.txt").write_text(text)
        (self.dump_to / f"{name}.diff").write_text(diff)


def _names(variable: str) -> frozenset[str]:
    return frozenset(part.strip() for part in os.environ.get(variable, "").split(",") if part.strip())
