"""Folders of safetensors files with a config, whatever is written in them."""
