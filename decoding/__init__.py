"""Writing text with a trained model.

sampling.py          `generate`: one text, the plain way; drawing a token from logits
engine.py            `BatchedDecoder`: many requests at once
backend.py           what runs the model for it: PyTorch, or the compiled backend where it supports the model
compiled.py          the compiled backend: the forward pass as one function, compiled by Numba
compiled_backend.py  its weights, KV cache and threads
compile_cache.py     where the compiled code is kept
packed.py            weights laid out for the compiled backend, in float32 or 8 bits
text.py              from tokens to text, and stop strings
text_generator.py    `TextGenerator`: a prompt or a conversation in, text out; loading a model

Import from these files: nothing is imported here, so that scripts start without waiting for torch.
"""
