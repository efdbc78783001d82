"""Selection: which channels or samples a backward keeps."""
