"""What a run learned, for use without keeplora."""
