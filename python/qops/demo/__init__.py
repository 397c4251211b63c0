"""The demonstration behind ``python -m qops.demo``: a real 4-bit model answers, proves its answer and is measured.

``cli`` reads the arguments and runs the steps, ``artefact`` fetches, verifies and caches the model, ``chat`` is the
tokenizer with its chat template, ``proof`` holds the answer against a dense float32 model, ``compare`` measures speed
and accuracy, ``console`` holds what talks to the terminal.
Everything heavy (transformers, gguf) is imported where it is first needed: the first token has to appear quickly.
"""
