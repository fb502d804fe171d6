"""Image data: data sets in files and folders, arrays, pixel conversion, and writing pictures."""
