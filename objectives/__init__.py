"""What a training step minimises; one file each."""
