"""The temporal Vision Transformer, its pretrained weights, its adapters, and its folder on disk."""
