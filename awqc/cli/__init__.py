"""The command line: one command per file, assembled in :mod:`awqc.cli.main`.

Nothing here imports torch or transformers before a command runs, so that ``awqc --help`` answers at once.
"""
