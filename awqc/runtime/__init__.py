"""What runs a quantized linear: packed modules, their lowering and the compiled model."""
