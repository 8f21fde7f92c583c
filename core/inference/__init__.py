"""A trained model writes or scores: the sampling loop, chat, the HTTP server, log-likelihoods.
Imports core/text, the files at the top of core/ and model.py.
"""
