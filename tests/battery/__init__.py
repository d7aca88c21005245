"""The property battery: what every method and every backend must keep. See docs/design.md for the list."""
