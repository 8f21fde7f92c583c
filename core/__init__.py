"""What the scripts share. Imports run one way: scripts, then objectives, then core and model.py."""
