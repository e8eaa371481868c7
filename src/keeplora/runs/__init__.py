"""The continual loop and its run directory."""
