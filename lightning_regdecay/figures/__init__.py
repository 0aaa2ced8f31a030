"""What is measured of a group. Uses ``groups``."""
