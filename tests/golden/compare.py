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
