"""Resources in front of the models."""
