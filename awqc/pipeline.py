"""Passes and the pipeline that proves their order, runs them and checks what they promise."""
