"""What the compiler made of a model, for whoever looks at it: lines, kernels, costs, code, history.

Of awqc this package knows kernels, beside the driver: it is about them.
"""

from __future__ import annotations
