"""Raw text -> documents -> token files -> batches: downloads, readers, tokenizers, chat template, dataset folders.
Imports the files at the top of core/ and nothing above them.
"""
