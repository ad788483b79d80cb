"""The arithmetic of searching, clipping and rounding on Gram matrices, and the facts it leaves."""
