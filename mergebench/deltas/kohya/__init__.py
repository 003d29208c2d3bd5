"""Adapters without a config, as diffusers, kohya and LyCORIS write them: names of tensors, and the layers they mean."""
