"""The journal of a compile: what its finished stages have left on disk, so that a killed job continues."""

from awqc.journal.follower import Follower
from awqc.journal.identity import Identity, SourceDigest
from awqc.journal.journal import Journal, journal_path

__all__ = ["Follower", "Identity", "Journal", "SourceDigest", "journal_path"]
