"""Typed settings: what they are, how a config file and the launch line set them, and how mistakes are
reported."""
