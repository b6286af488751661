"""Model code that an export carries: imports torch, PyAV, transformers and itself only."""
