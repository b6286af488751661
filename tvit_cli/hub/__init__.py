"""Files that exports carry: they import each other, torch, PyAV and transformers, and never tvit."""
