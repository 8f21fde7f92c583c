"""A model on disk and in other formats: checkpoints, Hugging Face folders, GGUF, LoRA adapters, quantised weights.
Imports core/text, the files at the top of core/ and model.py.
"""
