"""Videos and what is done to them before the model: layout, decoding, sampling, augmentation."""
