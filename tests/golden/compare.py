"""Golden files: what a text was when somebody last read it and agreed."""

import os
from pathlib import Path

FOLDER = Path(__file__).parent
#: Set it to write the golden files anew; then read the difference before committing it.
UPDATE = "AWQC_UPDATE_GOLDEN"


def check_golden(name: str, text: str) -> None:
    """Compare ``text`` with the golden file ``name``, line by line."""
    path = FOLDER / name
    if os.environ.get(UPDATE):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.is_file(), f"there is no golden file {name}: run with {UPDATE}=1 and read what is written"
    assert text.splitlines() == path.read_text().splitlines(), (
        f"{name} differs: if the change is right, run with {UPDATE}=1 and commit the file"
    )


def check_golden_line(name: str, line: str) -> None:
    """Compare ``line`` with the one that begins with the same word in the golden file ``name``; with
    :data:`UPDATE`, write it there, the lines in order (one process at a time)."""
    path = FOLDER / name
    lines = {text.split()[0]: text for text in path.read_text().splitlines()} if path.is_file() else {}
    key = line.split()[0]
    if os.environ.get(UPDATE):
        path.write_text("\n".join(text for _, text in sorted({**lines, key: line}.items())) + "\n")
        return
    assert line == lines.get(key), (
        f"{key!r} differs in {name}: if the change is right, run with {UPDATE}=1 and commit the file"
    )
