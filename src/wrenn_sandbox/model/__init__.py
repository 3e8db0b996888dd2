"""Pure rules of the platform: no input or output, no await."""
