"""A property-test kit that judges any attention function."""
