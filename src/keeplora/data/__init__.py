"""From files to labelled images: readers, benchmarks, and the cache of decoded images."""
